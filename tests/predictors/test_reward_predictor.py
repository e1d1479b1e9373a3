"""RewardPredictor: contract, oracle, property, one test per argument, errors, state, learning."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.record import CSVLogger, TensorboardLogger

from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.predictors import RewardPredictor
from tests.oracles_predictors import (
    SplitEncoder,
    ToyQ,
    ToyValue,
    episodes,
    filled_buffer,
    read_csv,
    read_tensorboard,
    target_oracle,
)
from tests.small_predictors import learn, small_parts, small_predictor, snapshot

MASK = ("collector", "mask")
PARTS = ("encoder", "model", "rew_func", "val_func", "standardizer")
TERMS = {"loss_reward", "loss_value", "loss_consistency", "loss_standardizer"}


def toy_predictor(value: nn.Module | None, **options) -> RewardPredictor:
    """With an encoder without parameters, and a target network unlike the value network."""
    dynamics, _, reward, encoder = small_parts(None, SplitEncoder())
    predictor = RewardPredictor(dynamics, value, reward, encoder, 2, 1, **options)
    if value is not None:
        predictor.target_val_params.data.mul_(1.7)
    return predictor


def moved(before: dict, predictor) -> set[str]:
    """The parts of which any tensor changed."""
    after = snapshot(predictor)
    assert before.keys() == after.keys()
    return {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}


def assert_same(a: RewardPredictor, b: RewardPredictor) -> None:
    torch.testing.assert_close(snapshot(a), snapshot(b), rtol=0, atol=0)


# --- contract


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("value", [None, "state", "q"])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 2)])
def test_keys_and_shapes_of_targets(ndim, value, k, n):
    toy = filled_buffer(ndim=ndim)
    targets = small_predictor(value).compute_targets(toy.buffer, 5, k, n)
    assert targets.batch_size == (5, k)
    assert {key: tuple(x.shape) for key, x in targets.items(True, True)} == {
        "latent": (5, k, 2),
        "context": (5, k, 1),
        "action": (5, k, 1),
        ("next", "reward"): (5, k, 1),
        ("next", "terminated"): (5, k, 1),
        "value_target": (5, k, 1),
        "bootstrap_value": (5, k, 1),
        MASK: (5, k, 1),
        "planned": (5, k, 1),
        "index": (5, k) if ndim == 1 else (5, k, 2),
    }
    flags = (("next", "terminated"), MASK, "planned")
    assert {targets[key].dtype for key in flags} == {torch.bool}
    assert targets["index"].dtype == torch.long


@pytest.mark.parametrize("ndim", [1, 2])
def test_keys_and_shapes_of_a_model_batch(ndim):
    toy = filled_buffer(ndim=ndim)
    batch = small_predictor().sample_model_batch(toy.buffer, 5)
    assert batch.batch_size == (5,)
    assert {key: tuple(x.shape) for key, x in batch.items(True, True)} == {
        "latent": (5, 2),
        "context": (5, 1),
        "action": (5, 1),
        ("next", "latent"): (5, 2),
        ("next", "context"): (5, 1),
        ("next", "terminated"): (5, 1),
        MASK: (5, 1),
        "index": (5,) if ndim == 1 else (5, 2),
    }
    assert batch[MASK].dtype == torch.bool and batch[MASK].all()
    assert not any(x.requires_grad for x in batch.values(True, True))


@pytest.mark.parametrize("value", [None, "state", "q"])
def test_loss_and_its_terms(value):
    predictor, toy = small_predictor(value, k_steps=2), filled_buffer()
    batch = predictor.compute_targets(toy.buffer, 6, 2, 3)
    total, terms = predictor.loss(batch, predictor.sample_model_batch(toy.buffer, 7))
    expected = TERMS if value else TERMS - {"loss_value"}
    assert {key for key in terms if key.startswith("loss_")} == expected
    assert total.shape == () and total.requires_grad
    torch.testing.assert_close(total, sum(terms[key] for key in expected))
    assert not any(x.requires_grad for key, x in terms.items() if key not in expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("all_count", [True, False])
def test_errors_are_squared_once_with_and_without_padding(reduction, all_count):
    predictor = small_predictor("state", rew_loss_weight=2.0)
    loss, buffer = predictor.loss_module, filled_buffer().buffer
    loss.reduction = reduction
    batch = predictor.compute_targets(buffer, 6, 2, 3)
    mask = torch.ones(6, 2, 1, dtype=torch.bool)
    if not all_count:
        mask[2:, 1] = False
    terms = loss.terms(batch.set(MASK, mask), predictor.sample_model_batch(buffer, 7))
    latent, context, action = batch["latent"], batch["context"], batch["action"]
    reward, value = predictor.rew_func, predictor.val_func
    assert reward.target_scale != 1 and value.target_scale != 1
    for key, weight, scale, predicted, target in (
        (
            "reward",
            2.0,
            reward.target_scale,
            reward(latent, context, action),
            batch["next", "reward"],
        ),
        ("value", 1.0, value.target_scale, value(latent, context), batch["value_target"]),
    ):
        squares = torch.where(mask, ((predicted - target) / scale) ** 2, 0.0)
        reduced = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / mask.sum()}
        torch.testing.assert_close(terms[f"loss_{key}"], weight * reduced[reduction])


def test_loss_of_slices_alone():
    predictor, data = small_predictor(k_steps=2, n_steps=2), episodes(15, [])
    slices = data.reshape(5, 3).set(MASK, torch.ones(5, 3, 1, dtype=torch.bool))
    total, _ = predictor.loss(slices)
    assert total.isfinite()


@pytest.mark.parametrize("value", [None, "state", "q"])
def test_loss_of_slices_and_a_model_batch_is_that_of_their_targets(value):
    predictor, toy = small_predictor(value, n_steps=2).eval(), filled_buffer()
    length = predictor.loss_module.slice_len
    slices = toy.data.reshape(-1)[: 5 * length].reshape(5, length)
    slices = slices.set(MASK, torch.ones(5, length, 1, dtype=torch.bool))
    batch = predictor.sample_model_batch(toy.buffer, 7)
    targets = predictor.loss_module.compute_targets(slices)
    expected = predictor.loss(targets, batch)
    torch.testing.assert_close(predictor.loss(slices, batch), expected, rtol=0, atol=0)


def test_targets_need_a_model_batch():
    predictor = small_predictor()
    targets = predictor.compute_targets(filled_buffer().buffer, 4, 1, 1)
    with pytest.raises(ValueError, match="need transitions as second argument"):
        predictor.loss(targets)


def test_info_of_learn():
    loss, info = learn(small_predictor(), n_steps=3)
    assert loss.shape == () and not loss.requires_grad
    rates = {f"lr_{x}" for x in ("model", "value", "reward", "encoder", "delta_standardizer")}
    others = {"nll", "term_bce", "value_target_mean", "loss", "grad_norm", "target_scale"}
    assert set(info) == TERMS | rates | others | {"skipped"}
    assert {type(x) for x in info.values()} == {float}
    assert info["loss"] == pytest.approx(sum(info[key] for key in TERMS), rel=1e-5)
    assert loss.item() == pytest.approx(info["loss"], rel=1e-5)


def test_target_scale_is_that_of_latent_changes():
    predictor, toy = toy_predictor(None), filled_buffer(400)
    for _ in range(5):
        _, info = learn(predictor, toy, batch_size=400)
    delta = toy.data["next", "observation"] - toy.data["observation"]
    expected = delta[..., :2].flatten(0, 1).std(0).mean()
    assert info["target_scale"] == pytest.approx(expected.item(), rel=0.1)


# --- oracle: targets of a real replay buffer

lengths = st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=4)
small_or_large = st.integers(1, 8) | st.sampled_from([33, 64])
VALUES = {"none": None, "state": ToyValue, "q": ToyQ}


@settings(max_examples=100)
@given(
    ends=lengths,
    written=st.integers(1, 60),
    capacity=st.integers(8, 40),
    ndim=st.sampled_from([1, 2]),
    k=small_or_large,
    n=small_or_large,
    gamma=st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]),
    value=st.sampled_from(sorted(VALUES)),
    planned=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_targets_are_those_of_a_walk_through_the_storage(
    ends, written, capacity, ndim, k, n, gamma, value, planned, seed
):
    torch.manual_seed(seed)
    toy = filled_buffer(written, ends, capacity=capacity, ndim=ndim, planned=planned)
    module = VALUES[value] and VALUES[value]()
    predictor = toy_predictor(module)
    value_oracle = None
    if module is not None:
        weights = (module.w.detach() * 1.7).tolist()
        value_oracle = lambda *args: module.oracle(weights, *args)  # noqa: E731
    targets = predictor.compute_targets(toy.buffer, 6, k, n, gamma).detach()
    index = targets["index"].reshape(6, k, -1)
    for b in range(6):
        row, lane = index[b, 0, 0].item(), index[b, 0, 1].item() if ndim == 2 else 0
        path = target_oracle(toy, (row, lane), k, n, gamma, value_oracle, q=value == "q")
        rows = [step["row"] for step in path]
        assert index[b, :, 0].tolist() == rows
        assert ndim == 1 or (index[b, :, 1] == lane).all()
        assert targets[MASK][b].flatten().tolist() == [step["mask"] for step in path]
        if value == "q":
            unknown = (targets["value_target"].isnan() & targets[MASK])[b].flatten().tolist()
            assert unknown == [step["mask"] and not step["has_target"] for step in path]
        for j in (j for j in range(k) if path[j]["has_target"]):
            got, want = targets["value_target"][b, j].item(), path[j]["target"]
            assert abs(got - want) <= 1e-5 * max(1.0, abs(want), path[j]["size"])
            bootstrap = targets["bootstrap_value"][b, j].item()
            assert bootstrap == pytest.approx(path[j]["bootstrap"], rel=1e-5, abs=1e-6)
        without = [j for j in range(k) if not path[j]["has_target"]]
        assert (targets["bootstrap_value"][b, without] == 0).all()
        stored = toy.data[torch.tensor(rows), lane]
        torch.testing.assert_close(targets["latent"][b], stored["observation"][:, :2])
        assert (targets["context"][b] == stored["observation"][0, 2:]).all()
        for key in ("action", ("next", "reward"), ("next", "terminated")):
            assert torch.equal(targets[key][b], stored[key])
        if planned:
            assert torch.equal(targets["planned"][b], stored["planned"])
        else:
            assert targets["planned"][b].all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 0.99, 1.0])
def test_targets_of_64_by_64_steps(gamma):
    toy, module = filled_buffer(150, [(90, True), (60, False)]), ToyValue()
    predictor = toy_predictor(module)
    targets = predictor.compute_targets(toy.buffer, 20, 64, 64, gamma)
    weights = (module.w.detach() * 1.7).tolist()
    for b in range(20):
        start = (targets["index"][b, 0].item(), 0)
        path = target_oracle(toy, start, 64, 64, gamma, lambda *x: module.oracle(weights, *x))
        for j, step in enumerate(path):
            if step["has_target"]:
                error = abs(targets["value_target"][b, j].item() - step["target"])
                assert error <= 1e-5 * max(1.0, step["size"])


def one_start(toy, row):
    """Let every slice of a predictor's sampler start at one row."""

    def of(predictor):
        sampler = predictor._sampler
        sampler.sample_slices = lambda storage, n, length: sampler.slices_from(
            storage, (torch.full((n,), row),), length
        )
        return predictor

    return of


def test_a_truncated_end_is_bootstrapped_with_the_state_after_it():
    """LayeredRL took the last state itself, or the first one of the next episode."""
    toy = filled_buffer(10, [(4, False)])
    predictor = one_start(toy, 3)(toy_predictor(ToyValue()))
    target = predictor.compute_targets(toy.buffer, 1, 1, 5, 0.9)["value_target"].item()
    step = toy.data[3, 0]
    weights = (predictor.val_func.module.w.detach() * 1.7).tolist()
    tail = ToyValue.oracle(
        weights, step["next", "observation"][:2].tolist(), step["observation"][2:].tolist(), None
    )
    assert target == pytest.approx(step["next", "reward"].item() + 0.9 * tail, rel=1e-5)


@pytest.mark.parametrize(("row", "terminated"), [(3, False), (3, True), (9, False)])
def test_q_has_no_target_at_the_last_step_without_action_behind_it(row, terminated):
    """Row 3 ends an episode; row 9 is the last one written."""
    toy = filled_buffer(10, [(4, terminated), (90, True)])
    predictor = one_start(toy, row)(toy_predictor(ToyQ()))
    targets = predictor.compute_targets(toy.buffer, 1, 1, 5, 0.9)
    assert targets[MASK].item() and targets["value_target"].isnan().item() is not terminated
    if terminated:
        assert targets["value_target"].item() == toy.data[3, 0]["next", "reward"].item()


def test_model_batches_are_stored_transitions_drawn_evenly():
    toy = filled_buffer(20, [(5, True)])
    batch = toy_predictor(None).sample_model_batch(toy.buffer, 4000)
    stored = toy.data["observation"][:, 0, :2]
    match = (batch["latent"][:, None] == stored).all(-1)
    assert (match.sum(-1) == 1).all()
    row = match.byte().argmax(-1)
    counts = row.bincount(minlength=20)
    assert counts.min() > 130 and counts.max() < 280  # 200 each
    expected = toy.data[row, 0]
    torch.testing.assert_close(batch["action"], expected["action"])
    torch.testing.assert_close(batch["next", "latent"], expected["next", "observation"][:, :2])
    assert torch.equal(batch["next", "terminated"], expected["next", "terminated"])
    torch.testing.assert_close(batch["context"], expected["observation"][:, 2:])
    torch.testing.assert_close(batch["next", "context"], expected["next", "observation"][:, 2:])
    assert batch[MASK].all()


def test_log_prob_is_that_of_the_whitened_change():
    predictor = small_predictor(n_models=3)
    learn(predictor, n_steps=25)
    with torch.no_grad():
        predictor.standardizer.raw.add_(0.3 * torch.randn(2, 2))
    state, context, action, std = (torch.randn(5, d) for d in (2, 1, 1, 2))
    after, std = torch.randn(5, 2), std[0].abs() + 0.1
    log_prob, term_prob, extra = predictor.get_standardized_log_prob(
        state, context, action, after, std
    )
    matrix = predictor.standardizer.matrix.double()
    mean, weight, _, term = predictor.model.predict(state, context, action)
    change = (after - state).double() @ matrix.T
    means = (mean - state[:, None, None]).double() @ matrix.T
    normal = torch.distributions.Normal(means, std.double())
    components = normal.log_prob(change[:, None, None]).sum(-1) + weight.double().log()
    expected = components.flatten(1).logsumexp(-1) - math.log(3)
    assert log_prob.shape == term_prob.shape == (5,)
    assert extra["standardized_delta"].shape == (5, 2)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(extra["standardized_delta"].double(), change, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(term_prob, term)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("dim", [1, 2])
def test_log_prob_in_few_dims_and_without_standardizer(dim, on):
    """LayeredRL failed with ``delta_standardizer=False``."""
    predictor = identity_predictor(dim, delta_standardizer=on)
    state, context, action, after = torch.randn(5, dim), torch.zeros(5, 0), torch.ones(5, 1), 1.0
    after = torch.randn(5, dim)
    log_prob, _, extra = predictor.get_standardized_log_prob(
        state, context, action, after, torch.tensor(0.5)
    )
    assert log_prob.shape == (5,) and log_prob.isfinite().all()
    if not on:
        torch.testing.assert_close(extra["standardized_delta"], after - state)
        expected, _ = predictor.model.log_prob(state, context, action, after, std=torch.tensor(0.5))
        torch.testing.assert_close(log_prob, expected)


def test_log_prob_is_finite_far_away():
    predictor = small_predictor()
    far = torch.full((5, 2), 1e4)
    parts = torch.zeros(5, 2), torch.zeros(5, 1), torch.zeros(5, 1), far, torch.tensor(0.1)
    assert predictor.get_standardized_log_prob(*parts)[0].isfinite().all()


def identity_predictor(dim: int, **options) -> RewardPredictor:
    hidden = {"hidden_sizes": (8,)}
    return RewardPredictor(
        ProbabilisticEnsemble(dim, 0, 1, n_models=2, **hidden),
        ValueNet(dim, 0, **hidden),
        RewardNet(dim, 0, 1, **hidden),
        IdentityEncoder(dim),
        dim,
        0,
        **options,
    )


# --- property


def test_reading_leaves_buffer_and_predictor_alone():
    predictor, toy = small_predictor(), filled_buffer()
    before, stored = snapshot(predictor), toy.buffer.storage[:].clone()
    predictor.compute_targets(toy.buffer, 5, 2, 3)
    predictor.sample_model_batch(toy.buffer, 5)
    assert not moved(before, predictor)
    assert (toy.buffer.storage[:] == stored).all()


def test_stored_padding_is_not_learned_from():
    """A stored mask says which rows are real; the others may hold anything."""
    data = episodes(40, [(10, True)])
    data[MASK] = (torch.arange(40) % 10 < 2).unsqueeze(-1)
    data["next", "done"] = data["next", "done"] | (torch.arange(40) % 10 == 1).unsqueeze(-1)
    padding = ~data[MASK].squeeze(-1)
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        data[key][padding] = torch.nan
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(40))
    buffer.extend(data)
    predictor = small_predictor(k_steps=3, encoder_warm_up=0)
    _, info = learn(predictor, buffer, n_steps=5, batch_size=64)
    assert all(math.isfinite(x) for x in info.values()) and info["skipped"] == 0
    # where all draws of a start fall on padding, a real transition takes its place
    sampler = predictor._sampler
    sampler.sample_slices = lambda storage, n, length: sampler.slices_from(
        storage, (torch.arange(n) % 10,), length
    )
    assert predictor.sample_model_batch(buffer, 10)["latent"].isfinite().all()
    targets = predictor.compute_targets(buffer, 10, 3, 2)
    assert targets["latent"].isfinite().all() and targets["value_target"].isfinite().all()
    assert targets[MASK].flatten(1).sum(-1).tolist() == [2, 1] + [0] * 8


@pytest.mark.parametrize("value", ["state", "q"])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_short_episodes_and_long_slices_learn(value, k):
    toy = filled_buffer(20, [(1, True), (2, False)])
    _, info = learn(small_predictor(value, k_steps=k, n_steps=4), toy, n_steps=3)
    assert all(math.isfinite(x) for x in info.values())


def test_learn_is_reproducible():
    toy, predictors = filled_buffer(), []
    for _ in range(2):
        torch.manual_seed(3)
        predictors.append(small_predictor())
        learn(predictors[-1], toy, n_steps=3)
    assert_same(*predictors)


def test_float64_observations_and_rewards():
    toy = filled_buffer()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(60))
    data = toy.buffer.storage[:]
    buffer.extend(data.apply(lambda x: x.double() if x.is_floating_point() else x))
    results = []
    for b in (toy.buffer, buffer):
        torch.manual_seed(3)
        results.append(small_predictor())
        learn(results[-1], b, n_steps=3, seed=1)
    assert_same(*results)


# --- one test per argument


def test_gamma_and_n_steps_are_those_of_learn():
    """With rewards of 1, no end and a target network of 0, the target is a geometric sum."""
    data = episodes(100, [])
    data["next", "reward"] = torch.ones(100, 1)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(200))
    buffer.extend(data)
    for gamma, n in ((0.5, 1), (0.5, 3), (0.0, 3), (1.0, 3)):
        predictor = toy_predictor(ToyValue(), gamma=gamma, n_steps=n, encoder_warm_up=0, tau=0.0)
        predictor.target_val_params.data.zero_()
        predictor._sampler.sample_slices = lambda storage, n, length, s=predictor._sampler: (
            s.slices_from(storage, (torch.randint(90, (n,)),), length)
        )
        predictor.target_val_params.data.zero_()
        bootstrap = toy_targets(predictor, buffer, gamma, n)
        _, info = learn(predictor, buffer, batch_size=400, seed=1)
        assert info["value_target_mean"] == pytest.approx(bootstrap, abs=1e-5)


def toy_targets(predictor, buffer, gamma, n) -> float:
    """Mean target on the batch that ``learn`` draws after ``manual_seed(1)``.

    A target network of zeros still values the context at half of it.
    """
    torch.manual_seed(1)
    context = predictor.compute_targets(buffer, 400, 1, 1)["context"].mean().item()
    return sum(gamma**i for i in range(n)) + gamma**n * 0.5 * context


@pytest.mark.parametrize("tau", [0.0, 0.2, 1.0])
def test_tau(tau):
    """Above 0.5 TorchRL's SoftUpdate warns."""
    predictor, toy = small_predictor(tau=tau, encoder_warm_up=0), filled_buffer()
    expected = [p.clone() for p in predictor.target_val_params.values(True, True)]
    for _ in range(3):
        learn(predictor, toy)
        values = [p.detach() for p in predictor.loss_module.value_network_params.values(True, True)]
        expected = [(1 - tau) * a + tau * b for a, b in zip(expected, values, strict=True)]
    got = [p.clone() for p in predictor.target_val_params.values(True, True)]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("k", [1, 4])
def test_k_steps(k):
    """Every one of the first k steps trains the reward: its gradient sees k steps' actions."""
    predictor, toy = small_predictor(k_steps=k), filled_buffer(60, [])
    seen = []
    predictor.rew_func.module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    learn(predictor, toy)
    assert seen == [(8, k, 1)]


@pytest.mark.parametrize("on", [True, False])
def test_learn_encoder(on):
    predictor = small_predictor(learn_encoder=on)
    before = snapshot(predictor)
    _, info = learn(predictor, n_steps=22)
    assert ("encoder" in moved(before, predictor)) is on
    assert ("lr_encoder" in info) is on


@pytest.mark.parametrize(
    ("weight", "part"),
    [
        ("consistency_loss_weight", "model.net"),
        ("value_loss_weight", "val_func"),
        ("rew_loss_weight", "rew_func"),
    ],
)
def test_loss_weights(weight, part):
    term = {"c": "loss_consistency", "v": "loss_value", "r": "loss_reward"}[weight[0]]
    toy, infos, changes = filled_buffer(), [], []
    for factor in (1.0, 10.0, 0.0):
        torch.manual_seed(3)
        predictor = small_predictor(
            **{weight: factor}, encoder_warm_up=0, clip_grad_max_norm=None, tau=0.0
        )
        before = snapshot(predictor)
        infos.append(learn(predictor, toy, seed=1)[1])
        after = snapshot(predictor)
        learned = [k for k in before if part in k and "moments" not in k]
        changes.append(sum((after[k] - before[k]).abs().sum() for k in learned))
    for key in TERMS:
        ratios = [infos[i][key] / infos[0][key] for i in (1, 2)]
        assert ratios == pytest.approx([10.0, 0.0] if key == term else [1.0, 1.0], rel=1e-5)
    assert changes[0] > 0 and changes[2] == 0


RATES = {
    "delta_standardizer_lr": "standardizer.raw",
    "encoder_lr": "encoder",
    "reward_lr": "rew_func",
    "model_lr": "model.net",
    "value_lr": "val_func",
}


@pytest.mark.parametrize("argument", RATES)
@pytest.mark.parametrize("kind", ["float", "function"])
def test_learning_rates(argument, kind):
    """Adam's first step is as large as its learning rate."""
    others = {name: 1e-4 for name in RATES if name != argument}
    rate = 1e-2 if kind == "float" else lambda env_steps: env_steps * 1e-5
    predictor = small_predictor(**{argument: rate}, **others, encoder_warm_up=0)
    before = snapshot(predictor)
    _, info = learn(predictor, env_steps=1000)
    after = snapshot(predictor)
    for name, part in RATES.items():
        keys = [key for key in before if key.startswith(part) and "moments" not in key]
        largest = max((after[key] - before[key]).abs().max().item() for key in keys)
        expected = 1e-2 if name == argument else 1e-4
        assert largest == pytest.approx(expected, rel=0.02), name
        assert info[f"lr_{name[:-3]}"] == pytest.approx(expected)
    if kind == "function":
        assert learn(predictor, env_steps=0)[1][f"lr_{argument[:-3]}"] == 0.0


def test_default_learning_rates():
    _, info = learn(small_predictor())
    rates = {key: x for key, x in info.items() if key.startswith("lr_")}
    assert rates.pop("lr_delta_standardizer") == 1e-3
    assert set(rates.values()) == {3e-4}


@pytest.mark.parametrize("warm_up", [0, 1, 3])
def test_encoder_warm_up_learns_and_ends(warm_up):
    """LayeredRL's warm-up learned nothing at all."""
    predictor, toy = small_predictor(encoder_warm_up=warm_up), filled_buffer()
    trained = {"encoder", "rew_func", "model.net", "val_func", "standardizer.raw"}

    def part(key):
        return ".".join(key.split(".")[: 2 if key.startswith(("model", "standardizer")) else 1])

    for step in range(warm_up + 2):
        before = snapshot(predictor)
        learn(predictor, toy)
        after = snapshot(predictor)
        params = {key for key in before if "moments" not in key}
        learned = {part(key) for key in params if not torch.equal(before[key], after[key])}
        expected = {"encoder", "rew_func"} if step < warm_up else trained
        assert learned & trained == expected


def test_no_warm_up_of_an_encoder_that_does_not_learn():
    predictor = small_predictor(encoder_warm_up=50, learn_encoder=False)
    before = snapshot(predictor)
    learn(predictor)
    assert moved(before, predictor) >= {"model", "val_func", "rew_func", "standardizer"}


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("dim", [1, 2])
def test_delta_standardizer(on, dim):
    toy = filled_buffer()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(60))
    data = toy.buffer.storage[:].clone()
    for key in ("observation", ("next", "observation")):
        data[key] = data[key][..., :dim]
    buffer.extend(data)
    predictor = identity_predictor(dim, delta_standardizer=on, encoder_warm_up=0)
    _, info = learn(predictor, buffer, n_steps=3)
    assert ("loss_standardizer" in info) is on
    assert ("lr_delta_standardizer" in info) is on
    assert (predictor.standardizer is not None) is on
    assert any("standardizer" in key for key in predictor.state_dict()) is on
    assert all(math.isfinite(x) for x in info.values())


def test_delta_standardizer_whitens():
    data = episodes(400, [])
    change = torch.randn(400, 3) @ torch.tensor([[2.0, 0.0, 0.0], [1.5, 0.1, 0.0], [0, 0, 1.0]])
    data["next", "observation"] = data["observation"] + change
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(400))
    buffer.extend(data)
    predictor = toy_predictor(None, delta_standardizer_lr=3e-2, encoder_warm_up=0)
    learn(predictor, buffer, n_steps=150, batch_size=128)
    white = change[:, :2] @ predictor.standardizer.matrix.detach().T
    torch.testing.assert_close(torch.cov(white.T), torch.eye(2), rtol=0, atol=0.15)


def test_clip_grad_max_norm_is_that_of_each_part():
    """With a global norm, a large reward starved the dynamics."""
    toy, free = filled_buffer(), {}
    for max_norm in (None, 0.01):
        torch.manual_seed(3)
        predictor = small_predictor(clip_grad_max_norm=max_norm, encoder_warm_up=0)
        _, info = learn(predictor, toy, seed=1)
        groups = predictor.update.optimizer.param_groups
        assert {group["name"] for group in groups} == {
            "model", "value", "reward", "encoder", "delta_standardizer"
        }  # fmt: skip
        parts = {g["name"]: torch.cat([p.grad.flatten() for p in g["params"]]) for g in groups}
        if max_norm is None:
            free, norm = parts, torch.cat(list(parts.values())).norm().item()
            assert info["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.1
        else:
            assert info["grad_norm"] == pytest.approx(norm, rel=1e-5)
            for name, grad in parts.items():
                factor = min(1.0, 0.01 / free[name].norm().item())
                torch.testing.assert_close(grad, free[name] * factor, rtol=1e-3, atol=1e-8)


@pytest.mark.gpu
def test_device_moves_everything_and_learning_works_there():
    predictor = small_predictor(device="cuda", encoder_warm_up=0)
    assert predictor.device.type == "cuda"
    assert {x.device.type for x in snapshot(predictor).values()} == {"cuda"}
    before = snapshot(predictor)
    _, info = learn(predictor, n_steps=3)
    assert moved(before, predictor) == {*PARTS, "target_val_params"}
    assert info["skipped"] == 0
    assert predictor.compute_targets(filled_buffer().buffer, 4, 2, 2)["index"].is_cuda
    cpu, on_gpu = small_predictor(encoder_warm_up=0), snapshot(predictor)
    cpu.load_state_dict(predictor.state_dict())
    torch.testing.assert_close(snapshot(cpu), {key: x.cpu() for key, x in on_gpu.items()})
    learn(cpu)
    obs, act = torch.randn(4, 3), torch.randn(4, 5, 1)
    assert predictor.rollout(obs, act)[0]["next", "reward"].is_cuda
    learn(predictor.to("cpu"))
    assert predictor.rollout(obs, act)[0].device.type == "cpu"


def test_a_predictor_does_not_hold_a_device_of_its_own():
    predictor = small_predictor()
    assert not any(isinstance(x, torch.device) for x in vars(predictor).values())
    assert predictor.device == torch.device("cpu")


@pytest.mark.parametrize("kind", ["SummaryWriter", "TensorboardLogger", "CSVLogger"])
def test_writer_and_log_interval(kind, tmp_path):
    path = tmp_path
    if kind == "SummaryWriter":
        writer = SummaryWriter(tmp_path)
    elif kind == "CSVLogger":
        writer = CSVLogger("run", log_dir=str(tmp_path))
    else:
        writer, path = TensorboardLogger("run", log_dir=str(tmp_path)), tmp_path / "run"
    predictor, toy = small_predictor(writer=writer, log_interval=2), filled_buffer()
    infos = {step: learn(predictor, toy, env_steps=step)[1] for step in (10, 20, 30, 40, 50)}
    if kind != "CSVLogger":
        getattr(writer, "experiment", writer).close()
    logged = (read_csv if kind == "CSVLogger" else read_tensorboard)(path)
    assert set(logged) == {f"predictor/{key}" for key in infos[10]}
    for name, points in logged.items():
        assert [step for step, _ in points] == [10, 30, 50]
        expected = [infos[step][name.split("/")[1]] for step in (10, 30, 50)]
        assert [value for _, value in points] == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("value", [None, "state", "q"])
def test_without_reward(value):
    model, val_func, _, encoder = small_parts(value)
    predictor = RewardPredictor(model, val_func, None, encoder, 2, 1, encoder_warm_up=2)
    before = snapshot(predictor)
    _, info = learn(predictor, n_steps=3)
    assert "loss_reward" not in info and info["skipped"] == 0
    assert "model" in moved(before, predictor)


# --- errors


def empty_buffer():
    return TensorDictReplayBuffer(storage=LazyTensorStorage(10))


def buffer_without(*key):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20))
    buffer.extend(episodes(20, [(5, True)]).exclude(*key))
    return buffer


def buffer_with(key, value):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20))
    buffer.extend(episodes(20, [(5, True)]).set(key, value))
    return buffer


@pytest.mark.parametrize(
    ("buffer", "error", "text"),
    [
        (empty_buffer(), ValueError, "empty"),
        (buffer_without("observation"), KeyError, r"no entry 'observation'; it has .*'action'"),
        (buffer_without("action"), KeyError, "no entry 'action'"),
        (buffer_without(("next", "reward")), KeyError, "no entry .*reward"),
        (buffer_without(("next", "terminated")), KeyError, "no entry .*terminated"),
        (buffer_without(("next", "observation")), KeyError, "no entry .*next.*observation"),
        (buffer_with("observation", torch.zeros(20, 4)), ValueError, r"observation: expected.*3\]"),
        (buffer_with("action", torch.zeros(20, 2)), ValueError, r"last dims|action: expected"),
        (buffer_with(("next", "reward"), torch.zeros(20)), ValueError, "reward.*trailing dim of 1"),
        (buffer_with(("next", "reward"), torch.zeros(20, 2)), ValueError, "reward.*expected shape"),
        (buffer_with("planned", torch.ones(20).bool()), ValueError, "planned.*trailing dim of 1"),
    ],
)
def test_bad_buffers_change_nothing(buffer, error, text):
    predictor = small_predictor()
    before = snapshot(predictor)
    with pytest.raises(error, match=text):
        learn(predictor, buffer)
    assert not moved(before, predictor)
    assert (predictor.update.steps, predictor.n_learn_calls) == (0, 0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_steps": 0}, "n_steps must.* 0"),
        ({"n_steps": -1}, "n_steps must.* -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"model_batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"n_total_env_steps": -1}, "n_total_env_steps must.* -1"),
    ],
)
def test_bad_numbers_to_learn(options, text):
    numbers = {"n_steps": 1, "batch_size": 4, "model_batch_size": 4, "n_total_env_steps": 0}
    predictor, toy = small_predictor(), filled_buffer()
    predictor.learn(toy.buffer, **numbers)
    before = snapshot(predictor)
    with pytest.raises(ValueError, match=text):
        predictor.learn(toy.buffer, **numbers | options)
    assert not moved(before, predictor)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k_steps": 0}, "k_steps must be at least 1, got 0"),
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"gamma": 1.5}, "gamma must be in .0, 1., got 1.5"),
    ],
)
def test_bad_numbers_to_compute_targets(options, text):
    numbers = {"batch_size": 4, "k_steps": 1, "n_steps": 1}
    with pytest.raises(ValueError, match=text):
        small_predictor().compute_targets(filled_buffer().buffer, **numbers | options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gamma": 1.01}, "gamma"),
        ({"tau": -0.1}, "tau must be in .0, 1., got -0.1"),
        ({"tau": 1.1}, "tau"),
        ({"k_steps": 0}, "k_steps"),
        ({"n_steps": 0}, "n_steps"),
        ({"encoder_warm_up": -1}, "warm_up must be at least 0, got -1"),
        ({"clip_grad_max_norm": 0.0}, "clip_grad_max_norm must be positive"),
        ({"log_interval": 0}, "log_interval"),
    ],
)
def test_arguments_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        small_predictor(**options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("options", [{"n_models": 1}, {"n_models": 2, "value": "q"}], ids=str)
def test_compiled_learning_is_eager_learning(options):
    data = filled_buffer()
    results = []
    for compile in (False, True):
        torch.manual_seed(2)
        predictor = small_predictor(compile=compile, **options)
        for seed in range(3):
            _, info = learn(predictor, data, n_steps=3, seed=seed)
        results.append(({**snapshot(predictor)}, info))
    for key, expected in results[0][0].items():
        torch.testing.assert_close(results[1][0][key], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[1][1]["nll"], results[0][1]["nll"], rtol=1e-3, atol=1e-3)


def test_positional_arguments_are_those_of_the_contract():
    """Names, order and defaults are what users of LayeredRL pass."""
    import inspect

    parameters = inspect.signature(RewardPredictor).parameters
    positional = {name: p for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY}
    assert {name: p.default for name, p in list(positional.items())[6:]} == {
        "gamma": 0.99,
        "tau": 0.005,
        "k_steps": 1,
        "n_steps": 1,
        "learn_encoder": True,
        "consistency_loss_weight": 1.0,
        "value_loss_weight": 1.0,
        "rew_loss_weight": 1.0,
        "delta_standardizer_lr": 1e-3,
        "encoder_lr": 3e-4,
        "reward_lr": 3e-4,
        "model_lr": 3e-4,
        "value_lr": 3e-4,
        "encoder_warm_up": 20,
        "delta_standardizer": True,
        "clip_grad_max_norm": 20.0,
        "device": torch.device("cpu"),
        "writer": None,
        "log_interval": 10,
    }


class GivenSteps:
    """Stands in for an update: steps of the given ``nll`` and ``grad_norm``."""

    def __init__(self, update, steps):
        self.optimizer, self.skipped, self.coming = update.optimizer, 0, iter(steps)

    def __call__(self, *batch):
        nll, norm = next(self.coming)
        self.skipped += not math.isfinite(norm)
        return TensorDict({"nll": nll, "loss": nll, "grad_norm": norm})


@pytest.mark.parametrize("norm", [torch.inf, torch.nan])
@pytest.mark.parametrize("nll", [100.0, torch.inf, torch.nan])
def test_info_is_the_mean_over_the_steps_that_were_taken(nll, norm):
    """A skipped batch may have terms that are finite."""
    predictor = small_predictor()
    predictor.update = GivenSteps(predictor.update, [(1.0, 1.0), (nll, norm), (3.0, 2.0)])
    loss, info = learn(predictor, n_steps=3)
    assert loss == 2.0 and info["nll"] == 2.0 and info["skipped"] == 1.0
    assert info["grad_norm"] == 1.5


def test_info_of_many_steps_is_their_mean():
    predictor, steps = small_predictor(), torch.rand(150, 2).tolist()
    for i in range(0, 150, 7):
        steps[i][1] = torch.inf
    taken = [nll for nll, norm in steps if norm != torch.inf]
    predictor.update = GivenSteps(predictor.update, steps)
    loss, info = learn(predictor, n_steps=150)
    assert info["nll"] == pytest.approx(sum(taken) / len(taken), rel=1e-5)
    assert loss.item() == pytest.approx(info["nll"], rel=1e-5)


def test_of_steps_that_were_all_skipped_there_is_no_mean():
    predictor = small_predictor()
    predictor.update = GivenSteps(predictor.update, [(1.0, torch.inf)] * 2)
    loss, info = learn(predictor, n_steps=2)
    assert loss.isnan() and "nll" not in info and info["skipped"] == 2.0


def test_bad_batches_are_skipped_counted_and_warned_of_once():
    data = episodes(20, [])
    data["next", "reward"][:] = torch.nan
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20))
    buffer.extend(data)
    predictor = small_predictor()
    before = snapshot(predictor)
    with pytest.warns(UserWarning, match="skipped") as record:
        _, info = learn(predictor, buffer, n_steps=3)
        _, info = learn(predictor, buffer, n_steps=2)
    assert len(record) == 1
    assert info["skipped"] == 5.0
    assert not moved(before, predictor)


# --- state


def through_file(predictor) -> dict:
    file = io.BytesIO()
    torch.save(predictor.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("value", [None, "state", "q"])
@pytest.mark.parametrize("how", ["direct", "file"])
def test_state_dict_round_trip_goes_on_identically(value, how):
    """The loaded predictor shared the moments of Adam with the one it was loaded from."""
    toy, options = filled_buffer(), {"encoder_warm_up": 4, "writer": None}
    a, b = small_predictor(value, **options), small_predictor(value, **options)
    learn(a, toy, n_steps=3)
    b.load_state_dict(through_file(a) if how == "file" else a.state_dict())
    assert_same(a, b)
    assert (b.update.steps, b.n_learn_calls) == (3, 1)
    for seed in range(3):  # in turn, over the end of the warm-up
        for predictor in (a, b):
            learn(predictor, toy, n_steps=2, seed=seed)
        assert_same(a, b)


def test_counters_are_restored():
    predictor, toy = small_predictor(log_interval=3), filled_buffer()
    bad = buffer_with(("next", "reward"), torch.full((20, 1), torch.nan))
    with pytest.warns(UserWarning, match="skipped"):
        learn(predictor, bad)
    learn(predictor, toy)
    other = small_predictor()
    other.load_state_dict(predictor.state_dict())
    assert (other.update.steps, other.update.skipped, other.n_learn_calls) == (2, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned of already
        assert learn(other, bad)[1]["skipped"] == 2


@pytest.mark.parametrize("value", [None, "state", "q"])
def test_nothing_is_in_the_state_twice(value):
    predictor = small_predictor(value)
    state = snapshot_pointers(predictor)
    assert len(set(state.values())) == len(state)
    parameters = [id(p) for _, p in predictor.named_parameters(remove_duplicate=False)]
    assert len(set(parameters)) == len(parameters)
    learned = {id(p) for g in predictor.update.optimizer.param_groups for p in g["params"]}
    assert learned == set(parameters)


def snapshot_pointers(predictor) -> dict[str, int]:
    return {
        key: x.untyped_storage().data_ptr()
        for key, x in predictor.state_dict().items()
        if isinstance(x, torch.Tensor) and x.numel()
    }


@pytest.mark.parametrize("value", [None, "state", "q"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_independent_and_identical(value, how):
    """The target network of a deep copy followed a value network that nobody trained."""
    toy = filled_buffer()
    original = small_predictor(value, encoder_warm_up=4)
    obs, act = torch.randn(4, 3), torch.randn(4, 5, 1)
    original.rollout(obs, act)
    learn(original, toy, n_steps=3)
    copied = how(original)
    assert_same(original, copied)
    assert not set(snapshot_pointers(original).values()) & set(snapshot_pointers(copied).values())
    before = snapshot(original)
    learn(copied, toy, n_steps=5, seed=1)
    assert not moved(before, original)
    learn(original, toy, n_steps=5, seed=1)
    assert_same(original, copied)
    if value:
        sources = copied.loss_module.value_network_params.values(True, True)
        assert {id(p) for p in sources} == {id(p) for p in copied.val_func.parameters()}
        assert copied.loss_module.target_value_network_params is copied.target_val_params
    assert copied.loss_module.encoder is copied.encoder
    results = [p.rollout(obs, act, True)[0]["next", "reward"] for p in (original, copied)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "move",
    [
        lambda p: p.to("cpu"),
        lambda p: p.to(torch.float64).to(torch.float32),
        lambda p: p.double().float().cpu(),
        lambda p: p.share_memory(),
    ],
)
def test_moving_does_not_disturb_learning(move):
    """Optimiser and target updater have to follow the parameters."""
    toy, predictors = filled_buffer(), []
    for moving in (False, True):
        torch.manual_seed(3)
        predictor = small_predictor(encoder_warm_up=2, tau=0.3)
        learn(predictor, toy, n_steps=4, seed=1)
        if moving:
            predictor.target_val_params.data.add_(0.0)
            assert move(predictor) is predictor
        learn(predictor, toy, n_steps=4, seed=2)
        predictors.append(predictor)
    assert_same(*predictors)


def test_optimiser_and_targets_move_along():
    predictor = small_predictor(encoder_warm_up=0)
    learn(predictor)
    predictor.double()
    optimizer = predictor.update.optimizer
    params = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in params} == {id(p) for p in predictor.parameters()}
    assert {optimizer.state[p]["exp_avg"].dtype for p in params} == {torch.float64}
    targets = list(predictor.update.target_updater._targets.values(True, True))
    own = predictor.target_val_params.values(True, True)
    assert {x.dtype for x in targets} == {torch.float64}
    assert {x.data_ptr() for x in targets} == {x.data_ptr() for x in own}


def test_in_evaluation_mode_the_loss_changes_nothing():
    """The loss took a validation batch into its running statistics."""
    predictor, toy = small_predictor(), filled_buffer()
    learn(predictor, toy)
    batch = predictor.compute_targets(toy.buffer, 8, 1, 1)
    model_batch = predictor.sample_model_batch(toy.buffer, 8)
    before = snapshot(predictor)
    predictor.eval().loss(batch, model_batch)
    assert not moved(before, predictor)
    predictor.train().loss(batch, model_batch)
    assert moved(before, predictor) == {"model", "standardizer", "rew_func", "val_func"}


def test_part_of_a_larger_module():
    """As a submodule it is moved, saved and switched with the rest."""
    whole = nn.ModuleDict({"predictor": small_predictor()})
    learn(whole["predictor"])
    state = whole.state_dict()
    assert "predictor._extra_state" in state
    other = nn.ModuleDict({"predictor": small_predictor()})
    other.load_state_dict(state)
    assert_same(whole["predictor"], other["predictor"])
    whole.eval().double().float()
    assert not whole["predictor"].loss_module.training


def test_other_names_in_the_buffer():
    data = episodes(40, [(7, True), (5, False)])
    renamed = TensorDict(
        {
            "agent": {"obs": data["observation"]},
            "action": data["action"],
            "next": {
                "agent": {"obs": data["next", "observation"]},
                "gain": data["next", "reward"],
                "terminated": data["next", "terminated"],
                "done": data["next", "done"],
            },
        },
        batch_size=[40],
    )
    results = []
    for d, names in ((data, {}), (renamed, {"observation": ("agent", "obs"), "reward": "gain"})):
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(40))
        buffer.extend(d)
        torch.manual_seed(3)
        predictor = small_predictor(k_steps=2)
        predictor.loss_module.set_keys(**names)
        learn(predictor, buffer, n_steps=3, seed=1)
        results.append(predictor)
    assert_same(*results)


# --- learning


def linear_gaussian_buffer(n=2000, noise=0.1) -> TensorDictReplayBuffer:
    """``s' = 0.9 s + 0.3 a + noise``; reward ``s_0 - a``; no end."""
    state, action = torch.randn(n, 2), torch.randn(n, 1)
    after = 0.9 * state + 0.3 * action + noise * torch.randn(n, 2)
    flags = {key: torch.zeros(n, 1).bool() for key in ("terminated", "truncated", "done")}
    data = {
        "observation": state,
        "action": action,
        "next": {"observation": after, "reward": state[:, :1] - action, **flags},
    }
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n))
    buffer.extend(TensorDict(data, batch_size=[n]))
    return buffer


def test_learn_approaches_the_entropy_of_a_linear_gaussian_system():
    noise, dims = 0.1, 2
    buffer = linear_gaussian_buffer(noise=noise)
    falling = lambda env_steps: 1e-2 if env_steps < 200 else 1e-3  # noqa: E731
    rates = {"model_lr": falling, "reward_lr": falling}
    rates |= {"value_lr": 1e-2, "delta_standardizer_lr": 1e-2}
    predictor = RewardPredictor(
        ProbabilisticEnsemble(2, 0, 1, n_models=2, hidden_sizes=(32,)),
        ValueNet(2, 0, hidden_sizes=(16,)),
        RewardNet(2, 0, 1, hidden_sizes=(32,)),
        IdentityEncoder(2),
        2,
        0,
        encoder_warm_up=0,
        **rates,
    )
    _, first = learn(predictor, buffer, batch_size=128)
    learn(predictor, buffer, n_steps=250, batch_size=128)
    learn(predictor, buffer, n_steps=100, batch_size=128, env_steps=200)
    _, last = learn(predictor, buffer, n_steps=50, batch_size=128, env_steps=200)
    entropy = dims * (0.5 * math.log(2 * math.pi * math.e) + math.log(noise))
    assert first["nll"] > entropy + 1.0
    assert entropy - 0.1 < last["nll"] < entropy + 0.15
    assert last["loss_reward"] < 0.01 < 1.0 < first["loss_reward"]
    assert last["term_bce"] < 0.05 < first["term_bce"]


def test_value_of_a_chain_with_a_known_return():
    """A reward of 1 in every step, termination after three: the value counts the steps left."""
    n = 300
    left = 3 - torch.arange(n) % 3
    observation = nn.functional.one_hot(left - 1, 3).float()
    end = (left == 1).unsqueeze(-1)
    data = {
        "observation": observation,
        "action": torch.zeros(n, 1),
        "next": {
            "observation": observation.roll(-1, 0),
            "reward": torch.ones(n, 1),
            "terminated": end,
            "truncated": torch.zeros_like(end),
            "done": end,
        },
    }
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n))
    buffer.extend(TensorDict(data, batch_size=[n]))
    predictor = identity_predictor(3, gamma=0.5, tau=0.2, value_lr=3e-2, encoder_warm_up=0)
    learn(predictor, buffer, n_steps=200, batch_size=32)
    value = predictor.value(torch.eye(3))
    torch.testing.assert_close(value, torch.tensor([1.0, 1.5, 1.75]), rtol=0, atol=0.05)
