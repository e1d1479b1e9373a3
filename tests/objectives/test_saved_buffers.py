"""Buffers are put back: their numbers, and where another tensor has taken their place."""

import pytest
import torch
from torch import nn
from torchrl.objectives import SoftUpdate

from layeredrl_trl.objectives import RewardPredictorLoss
from layeredrl_trl.objectives.saved_buffers import SavedBuffers, statistics_of
from tests.small_predictors import small_parts


class Value(nn.Module):
    """With running statistics, of which its target network has its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(2), nn.Linear(2, 1)

    def forward(self, latent, context):
        return self.out(self.norm(latent))


def make_loss() -> RewardPredictorLoss:
    dynamics, _, reward, encoder = small_parts(None)
    loss = RewardPredictorLoss(encoder, dynamics, reward, Value())
    SoftUpdate(loss, tau=0.1)
    return loss


def tensors(slots) -> dict[int, torch.Tensor]:
    return {id(buffers[name]): buffers[name] for buffers, name in slots}


def test_all_buffers_are_listed_but_the_targets_of_parameters():
    loss = make_loss()
    found = tensors(statistics_of(loss))
    norm, out = "target_value_network_params.module.norm", "target_value_network_params.module.out"
    targets = {f"{part}.{name}" for part in (norm, out) for name in ("weight", "bias")}
    buffers = dict(loss.named_buffers())
    assert buffers.keys() > {*targets, f"{norm}.running_mean", "dynamics.input_moments.mean"}
    assert found.keys() == {id(x) for name, x in buffers.items() if name not in targets}


def some_module() -> nn.Module:
    module = nn.Module()
    module.register_buffer("a", torch.zeros(3))
    module.register_buffer("b", torch.arange(2))
    module.register_buffer("none", None)
    return module


def change(module) -> None:
    module.a.add_(1)  # in place
    module.b = module.b + 1  # another tensor


def test_buffers_are_what_they_were():
    module = some_module()
    own = module.a, module.b
    saved = SavedBuffers(statistics_of(module))
    change(module)
    saved.restore()
    assert module.a is own[0] and module.b is own[1] and module.none is None
    assert module.a.tolist() == [0, 0, 0] and module.b.tolist() == [0, 1]


@pytest.mark.parametrize("where", [False, True])
def test_a_tensor_decides_whether_they_are_restored(where):
    module = some_module()
    own = module.a, module.b
    saved = SavedBuffers(statistics_of(module))
    change(module)
    saved.restore(torch.tensor(where))
    assert module.a is own[0] and module.b is own[1]
    assert module.a.tolist() == ([0, 0, 0] if where else [1, 1, 1])
    assert module.b.tolist() == ([0, 1] if where else [1, 2])


def test_a_module_without_buffers():
    saved = SavedBuffers(statistics_of(nn.Linear(2, 1)))
    saved.restore()
    saved.restore(torch.tensor(True))
