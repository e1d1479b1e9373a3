"""What losses on slices share: names of entries, and a target network that is a network."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.objectives import SoftUpdate, ValueEstimators

from layeredrl_trl import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.modules import Encoder
from layeredrl_trl.objectives import RewardPredictorLoss


class Pixels(Encoder):
    """Images to a latent state; reads ``pixels``."""

    def __init__(self):
        super().__init__((1, 4, 4), 2, 0, in_keys=["pixels"])
        self.net = nn.Linear(16, 2)

    def embed(self, observation):
        return self.net(observation.flatten(-3)), observation[..., 0, 0, :0]


def make_slices(observation="observation", shape=(3,), action="action", length=3) -> TensorDict:
    flags = {"terminated": torch.zeros(4, length, 1).bool()}
    steps = {
        observation: torch.randn(4, length, *shape),
        action: torch.randn(4, length, 1),
        "next": {
            observation: torch.randn(4, length, *shape),
            "reward": torch.randn(4, length, 1),
            **flags,
        },
        "collector": {"mask": torch.ones(4, length, 1).bool()},
    }
    return TensorDict(steps, batch_size=[4, length])


def make_loss(value=None, **options) -> RewardPredictorLoss:
    value = ValueNet(3, 0, hidden_sizes=(8,)) if value is None else value
    dynamics, reward = ProbabilisticEnsemble(3, 0, 1, hidden_sizes=(8,)), RewardNet(3, 0, 1)
    loss = RewardPredictorLoss(IdentityEncoder(3), dynamics, reward, value, n_steps=3, **options)
    SoftUpdate(loss, tau=0.1)
    return loss


def bootstrap_by_hand(loss, slices) -> torch.Tensor:
    """The target parameters in a fresh copy of the value, at the state after the slice."""
    network = copy.deepcopy(loss.value_network)
    params = loss.target_value_network_params
    with torch.no_grad(), params.to_module(network, preserve_module_state=False):
        latent = slices["next", "observation"][:, -1:]
        return network.module(latent, latent[..., :0])


# --- names


def test_an_encoder_that_reads_pixels_works_in_the_bare_loss():
    parts = ProbabilisticEnsemble(2, 0, 1), RewardNet(2, 0, 1), ValueNet(2, 0)
    loss = RewardPredictorLoss(Pixels(), *parts)
    SoftUpdate(loss, tau=0.1)
    assert loss.tensor_keys.observation == "pixels" and "pixels" in loss.in_keys
    assert loss(make_slices("pixels", (1, 4, 4), length=1))["loss_reward"].isfinite()


def test_dynamics_that_read_another_action_work_in_the_bare_loss():
    names = ("latent", "context", "torque")
    dynamics = ProbabilisticEnsemble(3, 0, 1, in_keys=names)
    reward = RewardNet(3, 0, 1, in_keys=names)
    loss = RewardPredictorLoss(IdentityEncoder(3), dynamics, reward, None)
    assert loss(make_slices(action="torque", length=1))["loss_reward"].isfinite()


@pytest.mark.parametrize("given", [(), (None,), (ValueEstimators.TD0,), ("td_lambda",)])
def test_make_value_estimator_said_unknown_value_type_none(given):
    with pytest.raises(NotImplementedError, match="n-step returns, set by gamma, n_steps"):
        make_loss().make_value_estimator(*given, gamma=0.9)


# --- the target network


@pytest.mark.parametrize(
    "how",
    [
        lambda loss: loss,
        copy.deepcopy,
        lambda loss: pickle.loads(pickle.dumps(loss)),
        lambda loss: loss.to("cpu").float(),
        lambda loss: (loss.load_state_dict(make_loss().state_dict()), loss)[1],
        lambda loss: (loss.load_state_dict(make_loss().state_dict(), assign=True), loss)[1],
    ],
    ids=["made", "copied", "pickled", "moved", "loaded", "assigned"],
)
def test_the_target_network_holds_the_target_parameters(how):
    loss, slices = how(make_loss()), make_slices()
    SoftUpdate(loss, tau=0.1)
    loss(slices)  # gives the value a unit
    for p in loss.target_value_network_params.values(True, True):
        p.data.normal_()
    bootstrap = loss.compute_targets(slices)["bootstrap_value"]
    torch.testing.assert_close(bootstrap, bootstrap_by_hand(loss, slices))
    updater = SoftUpdate(loss, tau=0.5)
    loss.value_network_params.data.zero_()
    for _ in range(40):
        updater.step()
    assert loss.compute_targets(slices)["bootstrap_value"].abs().max() < 1e-6


def test_modes_reach_the_target_network():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, latent, context):
            return self.net(latent)

    loss, slices = make_loss(Dropped()), make_slices()
    for mode, differs in ((True, True), (False, False)):
        loss.train(mode)
        values = [loss.compute_targets(slices)["bootstrap_value"] for _ in range(2)]
        assert torch.equal(*values) is not differs


def test_the_target_network_is_no_part_of_the_state():
    loss = make_loss()
    assert not any("_target_network." in key for key in loss.state_dict())
    assert len({id(p) for p in loss.parameters()}) == len(list(loss.parameters()))
