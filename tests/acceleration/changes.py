"""A module that has one of everything that a replay would not see change, and each change."""

import torch
from torch import nn


class Scale(nn.Module):
    """Holds parameters, a buffer, a number, a list and a dictionary."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.register_buffer("total", torch.zeros(2))
        self.factor = 1.0
        self.options = ["a", object()]
        self.table = {"a": torch.zeros(2)}


def change_attribute(module):
    module.factor = 2.0


def change_training(module):
    module.eval()


def change_part(module):
    module.net = nn.Linear(2, 2)


def change_parameter(module):
    module.net.weight = nn.Parameter(torch.randn(2, 2))


def change_memory(module):
    module.net.weight.data = torch.randn(2, 2)


def change_buffer(module):
    module.total = torch.ones(2)


def change_hooks(module):
    module.register_forward_hook(lambda *_: None)


def change_what_learns(module):
    module.net.requires_grad_(False)


def change_strides(module):
    module.net.weight.data = module.net.weight.data.t()


def change_an_entry(module):
    module.options[1] = object()


def change_a_name(module):
    module.table["b"] = module.table.pop("a")


def change_a_tensor_in_a_table(module):
    module.table["a"].data = torch.ones(2)


CHANGES = [
    change_what_learns,
    change_strides,
    change_an_entry,
    change_a_name,
    change_a_tensor_in_a_table,
    change_attribute,
    change_training,
    change_part,
    change_parameter,
    change_memory,
    change_buffer,
    change_hooks,
]
