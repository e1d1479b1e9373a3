"""Asking a module with the parameters of another."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn.utils import parametrizations

from layeredrl_trl.objectives.target_network import tensors_of, with_parameters


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(3, 3)

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Counter(nn.Module):
    """Puts another tensor in the place of its buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("seen", torch.randn(()))

    def forward(self, x):
        self.seen = 0.9 * self.seen + 0.1 * x.mean()
        return self.layer(x) + self.seen


def normed():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    net(torch.randn(7, 3) + 2)
    return net.eval()


MODULES = {
    "plain": lambda: nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1)),
    "one layer": lambda: nn.Linear(3, 1),
    "buffers": normed,
    "tied": Tied,
    "one layer under two names": Twice,
    "that layer in a sequence": lambda: nn.Sequential(layer := nn.Linear(3, 3), nn.Tanh(), layer),
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
}


@pytest.fixture(params=MODULES)
def pair(request):
    """A module, and parameters of another of its kind."""
    torch.manual_seed(0)
    make = MODULES[request.param]
    module, other = make(), make()
    return module, other, TensorDict.from_module(other, as_module=True)


def test_a_module_answers_as_the_other(pair):
    module, other, params = pair
    x = torch.randn(5, 3)
    before = module(x)
    torch.testing.assert_close(with_parameters(module, params, lambda: module(x)), other(x))
    assert torch.equal(module(x), before)


def test_a_module_gets_its_own_back_after_an_error(pair):
    module, _, params = pair
    own = {name: id(x) for name, x in module.state_dict(keep_vars=True).items()}

    def fail():
        raise RuntimeError("asked in vain")

    with pytest.raises(RuntimeError, match="asked in vain"):
        with_parameters(module, params, fail)
    assert {name: id(x) for name, x in module.state_dict(keep_vars=True).items()} == own


def test_buffers_that_are_changed_meanwhile_are_the_others():
    """A batch norm in training mode moves the statistics of the network that is asked."""
    module, other = normed().train(), normed().train()
    params = TensorDict.from_module(other, as_module=True)
    own, others = module[1].running_mean.clone(), other[1].running_mean.clone()
    with_parameters(module, params, lambda: module(torch.randn(9, 3) - 5))
    assert torch.equal(module[1].running_mean, own)
    assert not torch.equal(other[1].running_mean, others)


def test_all_tensors_are_named_as_the_module_names_them(pair):
    _, other, params = pair
    tensors = tensors_of(params)
    assert tensors.keys() == other.state_dict().keys()
    for name, x in other.state_dict(keep_vars=True).items():
        assert tensors[name].data_ptr() == x.data_ptr()


def test_a_buffer_that_is_replaced_meanwhile_is_the_others():
    module, other, alone = Counter(), Counter(), Counter()
    alone.load_state_dict(other.state_dict())
    params, own, x = TensorDict.from_module(other, as_module=True), module.seen, torch.ones(4, 3)
    for _ in range(2):
        answer = with_parameters(module, params, lambda: module(x))
        torch.testing.assert_close(answer, alone(x))
    assert module.seen is own
    torch.testing.assert_close(params.get("seen"), alone.seen)
