"""Input that was once taken silently, or refused without a word of what is wrong."""

import copy
import pickle

import pytest
import torch
from gymnasium.spaces import Box
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.schedules import LinearSchedule
from tests.oracles_predictors import filled_buffer


class Sum(nn.Module):
    """Broadcasts whatever it is given."""

    def forward(self, latent, context, action):
        return (latent.sum(-1, keepdim=True) + action.sum(-1, keepdim=True)) / 2


class Plain(nn.Module):
    """A value without parameters."""

    def forward(self, latent, context):
        return latent[..., :1]


def predictor_of(value=None, reward=None, **options) -> RewardPredictor:
    options = {"learn_encoder": False} | options
    model = ProbabilisticEnsemble(3, 0, Box(-1, 1, (1,)))
    return RewardPredictor(model, value, reward, IdentityEncoder(3), 3, 0, **options)


def moved_parts(predictor, before) -> set[str]:
    now = predictor.state_dict()
    return {k.split(".")[0] for k, x in before.items() if not torch.equal(x, now[k])}


def tensors(predictor) -> dict[str, torch.Tensor]:
    state = predictor.state_dict()
    return {k: x.clone() for k, x in state.items() if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("shape", [(4, 2), (1, 1), (4,), (3, 1)])
def test_a_plain_module_does_not_broadcast_actions(shape):
    predictor = predictor_of(reward=Sum())
    with pytest.raises(ValueError, match=r"action: expected shape \[4, 1\]"):
        predictor.predict_reward(torch.zeros(4, 3), torch.zeros(shape))


def test_integers_are_no_indices_where_actions_are_continuous():
    predictor = predictor_of(reward=RewardNet(3, 0, 1))
    with pytest.raises(ValueError, match=r"action: expected shape \[4, 1\], got \[4\]"):
        predictor.predict(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))


def test_a_predictor_without_reward_has_nothing_to_warm_up():
    """With nothing but the dynamics, the default warm-up of 20 steps learned nothing at all."""
    predictor = predictor_of(learn_encoder=True)
    before = tensors(predictor)
    predictor.learn(filled_buffer().buffer, 1, 8, 8, 0)
    assert "model" in moved_parts(predictor, before)


def test_a_value_without_parameters_has_no_target_to_move():
    predictor = predictor_of(value=Plain(), reward=RewardNet(3, 0, 1))
    _, info = predictor.learn(filled_buffer().buffer, 2, 8, 8, 0)
    assert info["skipped"] == 0 and info["loss_value"] > 0


@pytest.mark.parametrize("rate", [-1.0, float("nan"), "x", None])
def test_learning_rates_out_of_range(rate):
    with pytest.raises(ValueError, match="model_lr must be a finite number of at least 0"):
        predictor_of(model_lr=rate)


def test_a_schedule_that_turns_negative_changes_nothing():
    predictor = predictor_of(reward=RewardNet(3, 0, 1), model_lr=lambda steps: 1.0 - steps)
    before = tensors(predictor)
    text = r"model_lr must be finite and at least 0, got -1.0 at 2 steps"
    with pytest.raises(ValueError, match=text):
        predictor.learn(filled_buffer().buffer, 1, 8, 8, 2)
    assert moved_parts(predictor, before) == set()


@pytest.mark.parametrize(
    "name", ["consistency_loss_weight", "value_loss_weight", "rew_loss_weight"]
)
def test_loss_weights_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        predictor_of(**{name: -1.0})


def test_learning_rates_are_restored_but_for_plain_functions():
    schedule = LinearSchedule(1e-2, 1e-3, 100)
    saved = predictor_of(model_lr=schedule, delta_standardizer_lr=0.5, value_lr=lambda _: 0.1)
    loaded = predictor_of(model_lr=0.3, value_lr=0.2)
    loaded.load_state_dict(saved.state_dict())
    rates = loaded.get_extra_state()["rates"]
    assert rates["model"] == schedule.state_dict()
    assert rates["delta_standardizer"] == 0.5 and rates["value"] == 0.2
    _, info = loaded.learn(filled_buffer().buffer, 1, 8, 8, 50)
    assert info["lr_model"] == schedule(50) and info["lr_delta_standardizer"] == 0.5


def test_learning_rates_stay_where_learn_fails():
    predictor = predictor_of(reward=RewardNet(3, 0, 1), model_lr=lambda steps: 0.1 * steps)
    before = [group["lr"] for group in predictor.update.optimizer.param_groups]
    toy = filled_buffer()
    with pytest.raises(ValueError, match="batch_size"):
        predictor.learn(toy.buffer, 1, 0, 8, 5)
    assert [group["lr"] for group in predictor.update.optimizer.param_groups] == before


def test_a_predictor_with_a_writer_can_be_copied_and_pickled(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    predictor = predictor_of(reward=RewardNet(3, 0, 1), writer=writer)
    predictor.learn(filled_buffer().buffer, 1, 8, 8, 0)
    for other in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert other.writer is None
        other.learn(filled_buffer().buffer, 1, 8, 8, 0)
    assert predictor.writer is writer
    writer.close()


def test_standardized_log_prob_casts_float64_and_refuses_a_std_of_zero():
    predictor = predictor_of()
    entries = [torch.zeros(4, n, dtype=torch.float64) for n in (3, 0, 1, 3)]
    log_prob, _, _ = predictor.get_standardized_log_prob(*entries, torch.tensor(0.5))
    assert log_prob.shape == (4,) and log_prob.dtype is torch.float32
    with pytest.raises(ValueError, match="fixed_std: every standard deviation must be positive"):
        predictor.get_standardized_log_prob(*entries, torch.tensor([0.5, 0.0, 1.0]))


def test_parts_with_names_of_their_own_and_nested_flags():
    model = ProbabilisticEnsemble(3, 0, 1, in_keys=["latent", "context", ("agent", "act")])
    encoder = IdentityEncoder(3, in_keys=[("agent", "obs")])
    value, reward = ValueNet(3, 0), Sum()
    predictor = RewardPredictor(model, value, reward, encoder, 3, 0, n_steps=2)
    predictor.set_keys(
        reward=("agent", "rew"), terminated=("agent", "terminated"), planned=("agent", "planned")
    )
    toy = filled_buffer()
    data = toy.buffer[:].exclude("index")
    renamed = data.empty()
    for old, new in {
        "observation": ("agent", "obs"),
        "action": ("agent", "act"),
        ("next", "observation"): ("next", "agent", "obs"),
        ("next", "reward"): ("next", "agent", "rew"),
        ("next", "terminated"): ("next", "agent", "terminated"),
        ("next", "done"): ("next", "agent", "done"),
    }.items():
        renamed.set(new, data.get(old))
    other = filled_buffer().buffer
    other.empty(empty_write_count=True)
    fresh = type(other)(storage=type(other.storage)(60))
    fresh.extend(renamed)
    predictor.update.warm_up = 0
    _, info = predictor.learn(fresh, 2, 8, 8, 0)
    assert info["skipped"] == 0 and info["loss_value"] > 0


# --- found by a user


def test_a_lambda_as_val_func_crashed():
    predictor = predictor_of(value=lambda latent, context: latent[..., :1])
    assert predictor.value(torch.zeros(4, 3)).shape == (4,)
    predictor = predictor_of(value=lambda latent, context, action: action)
    predictor.learn(filled_buffer().buffer, 1, 8, 8, 0)
    with pytest.raises(ValueError, match="is a Q-function"):
        predictor.value(torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"value": ValueNet(3, 0)}, r"whose parts .*'value'.* learn; here \['model', 'reward'"),
        ({"delta_standardizer": False}, "whose parts"),
        ({"reward": RewardNet(3, 0, 1, hidden_sizes=(7,))}, "expected parameters of 'reward'"),
    ],
)
@pytest.mark.parametrize("has_learned", [True, False])
def test_a_state_of_another_architecture_changed_half_of_a_predictor(change, text, has_learned):
    saved = predictor_of(**{"reward": RewardNet(3, 0, 1)} | change)
    if has_learned:
        saved.learn(filled_buffer().buffer, 1, 8, 8, 0)
    loaded = predictor_of(reward=RewardNet(3, 0, 1), model_lr=0.5)
    before = tensors(loaded)
    with pytest.raises(ValueError, match=rf"state_dict: .*{text}"):
        loaded.load_state_dict(saved.state_dict())
    assert moved_parts(loaded, before) == set()
    assert loaded.get_extra_state()["rates"]["model"] == 0.5 and loaded.update.steps == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
@pytest.mark.parametrize("k_steps", [1, 2])
def test_rewards_that_are_no_floats_crashed_or_cut_targets_off(dtype, k_steps):
    buffers = []
    for to in (dtype, torch.float32):
        data = filled_buffer().buffer[:].exclude("index")
        data["next", "reward"] = (torch.arange(60) % 2).unsqueeze(-1).to(to)
        buffers.append(TensorDictReplayBuffer(storage=LazyTensorStorage(60)))
        buffers[-1].extend(data)
        torch.manual_seed(0)
    found = []
    for buffer in buffers:
        torch.manual_seed(0)
        value, reward = ValueNet(3, 0), RewardNet(3, 0, 1)
        predictor = predictor_of(value, reward, n_steps=3, k_steps=k_steps)
        buffer.storage[:]["observation"].copy_(torch.ones(60, 3))
        buffer.storage[:]["next", "observation"].copy_(torch.ones(60, 3))
        buffer.storage[:]["action"].copy_(torch.ones(60, 1))
        targets = predictor.compute_targets(buffer, 8, k_steps, 3)
        assert targets["value_target"].dtype is torch.float32
        assert targets["next", "reward"].dtype is torch.float32
        _, info = predictor.learn(buffer, 1, 8, 8, 0)
        found.append((targets["value_target"], info["loss_reward"], info["loss_value"]))
    for given, expected in zip(*found, strict=True):
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(
    ("obs", "act"), [((3,), (4, 1)), ((3,), (4,)), ((2, 4, 3), (2, 4, 5, 1)), ((4, 3), (4,))]
)
def test_rollout_says_which_dims_it_expects(obs, act):
    with pytest.raises(ValueError, match=r"rollout: expected obs \[B, O\] and act \[B, H, A\]"):
        predictor_of().rollout(torch.zeros(obs), torch.zeros(act))


@pytest.mark.parametrize("name", ["deterministic", "set_truncated"])
def test_rollout_with_a_flag_of_another_kind(name):
    with pytest.raises(TypeError, match=f"rollout: {name} must be True or False, got 'no'"):
        predictor_of().rollout(torch.zeros(4, 3), torch.zeros(4, 5, 1), **{name: "no"})


@pytest.mark.parametrize("name", ["n_steps", "batch_size", "model_batch_size"])
def test_learn_with_a_number_that_is_no_integer(name):
    numbers = {"n_steps": 1, "batch_size": 8, "model_batch_size": 8, "n_total_env_steps": 0}
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 8.0"):
        predictor_of().learn(filled_buffer().buffer, **numbers | {name: 8.0})


@pytest.mark.parametrize("shape", [(2,), (5, 3), (4, 1, 1, 2), (1, 4, 1, 1, 3)])
def test_a_fixed_std_of_another_width_is_named(shape):
    entries = [torch.zeros(4, n) for n in (3, 0, 1, 3)]
    with pytest.raises(ValueError, match=r"fixed_std: expected .* broadcasts to \[4, 1, 1, 3\]"):
        predictor_of().get_standardized_log_prob(*entries, torch.ones(shape))


def test_what_is_no_buffer_is_named():
    predictor, data = predictor_of(), filled_buffer().data
    for call in (
        lambda: predictor.learn(data, 1, 8, 8, 0),
        lambda: predictor.compute_targets(data, 8, 1, 1),
        lambda: predictor.sample_model_batch(data, 8),
        lambda: predictor.sample_partial_trajectories(data, 8, 1),
    ):
        with pytest.raises(TypeError, match=r"buffer: expected a TorchRL replay buffer, got tens"):
            call()
