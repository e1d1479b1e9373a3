"""RewardPredictorLoss: contract, oracle, property, gradients, errors, state."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives import SoftUpdate

from layeredrl_trl.data import TransitionSliceSampler
from layeredrl_trl.modules import (
    DeltaStandardizer,
    IdentityEncoder,
    LinearEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    ValueNet,
)
from layeredrl_trl.objectives import RewardPredictorLoss, Slices
from tests.oracles_predictors import SplitEncoder, ToyQ, ToyValue, episodes
from tests.small_predictors import LearnedEncoder, small_parts

MASK = ("collector", "mask")
TERMS = ["loss_consistency", "loss_reward", "loss_standardizer", "loss_value"]


def make_loss(value="state", encoder=None, standardizer=True, **options) -> RewardPredictorLoss:
    dynamics, value, reward, encoder = small_parts(value, encoder)
    standardizer = DeltaStandardizer(encoder.latent_state_dim) if standardizer else None
    loss = RewardPredictorLoss(
        encoder, dynamics, reward, value, standardizer=standardizer, **options
    )
    if loss.has_value:
        SoftUpdate(loss, tau=0.005)
    return loss


def make_slices(n=6, length=4, lengths=None, *, terminated=False, planned=False) -> TensorDict:
    """``n`` slices of random steps, of which the first ``lengths[i]`` are real."""
    lengths = torch.full((n,), length) if lengths is None else torch.tensor(lengths)
    mask = torch.arange(length) < lengths[:, None]
    last = torch.arange(length) == lengths[:, None] - 1
    slices = TensorDict(
        {
            "observation": torch.randn(n, length, 3),
            "action": torch.randn(n, length, 1),
            "next": {
                "observation": torch.randn(n, length, 3),
                "reward": torch.randn(n, length, 1),
                "terminated": (last & terminated).unsqueeze(-1),
            },
            "collector": {"mask": mask.unsqueeze(-1)},
        },
        batch_size=[n, length],
    )
    if planned:
        slices["planned"] = torch.rand(n, length, 1) < 0.5
    return slices


def total(terms) -> torch.Tensor:
    return sum(x for key, x in terms.items() if key.startswith("loss_"))


def grads(loss, batch) -> dict[str, torch.Tensor]:
    """Gradient of the sum of the terms for every parameter, by name; None if it got none."""
    loss.zero_grad()
    total(loss(batch)).backward()
    return {key: p.grad for key, p in loss.named_parameters()}


def same(a: TensorDict, b: TensorDict) -> None:
    torch.testing.assert_close(a.to_dict(), b.to_dict(), rtol=0, atol=0)


def frozen(loss) -> RewardPredictorLoss:
    """In evaluation mode running statistics stay, so that two calls are comparable."""
    return loss.eval()


# --- contract


@pytest.mark.parametrize("value", [None, "state", "q"])
@pytest.mark.parametrize("has_reward", [True, False])
@pytest.mark.parametrize("standardizer", [True, False])
def test_terms_are_those_that_apply(value, has_reward, standardizer):
    dynamics, value_net, reward, encoder = small_parts(value)
    loss = RewardPredictorLoss(
        encoder,
        dynamics,
        reward if has_reward else None,
        value_net,
        standardizer=DeltaStandardizer(2) if standardizer else None,
    )
    if value:
        SoftUpdate(loss, tau=0.1)
    out = loss(make_slices(length=loss.slice_len))
    expected = {"loss_consistency", "nll", "term_bce"}
    expected |= {"loss_reward"} if has_reward else set()
    expected |= {"loss_value", "value_target_mean"} if value else set()
    expected |= {"loss_standardizer"} if standardizer else set()
    assert set(out.keys()) == set(loss.out_keys) == expected
    assert out.batch_size == ()
    for key, x in out.items():
        assert x.shape == () and x.dtype == torch.float32
        assert x.requires_grad == key.startswith("loss_"), key


@pytest.mark.parametrize(("value", "expected"), [(None, 7), ("state", 7), ("q", 8)])
def test_slice_len(value, expected):
    assert make_loss(value, k_steps=3, n_steps=5).slice_len == expected


@pytest.mark.parametrize("value", ["state", "q"])
def test_a_flat_batch_is_the_rectangular_one(value):
    loss = frozen(make_loss(value, k_steps=2, n_steps=2))
    slices = make_slices(length=loss.slice_len, lengths=[1, 2, 3, 3, 2, 1])
    same(loss(slices), loss(slices.reshape(-1)))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_shapes_and_keys_of_targets(k, n):
    loss = make_loss(k_steps=k, n_steps=n)
    slices = make_slices(5, loss.slice_len)
    targets = loss.compute_targets(slices)
    assert targets.batch_size == (5, k)
    shapes = {key: tuple(x.shape[2:]) for key, x in targets.items(True, True)}
    assert shapes == {
        "latent": (2,),
        "context": (1,),
        "action": (1,),
        ("next", "reward"): (1,),
        ("next", "terminated"): (1,),
        "value_target": (1,),
        "bootstrap_value": (1,),
        MASK: (1,),
        "planned": (1,),
    }
    assert targets[MASK].dtype == targets["planned"].dtype == torch.bool
    assert targets["planned"].all()
    assert targets["latent"].requires_grad
    assert not any(targets[key].requires_grad for key in ("value_target", "bootstrap_value"))


@pytest.mark.parametrize("stored", [True, False])
def test_shapes_and_keys_of_transitions(stored):
    loss, transitions = make_loss(), make_slices(5, 1)[:, 0]
    shapes = {"latent": (2,), "context": (1,), "action": (1,), ("next", "latent"): (2,)}
    shapes |= {("next", "context"): (1,), ("next", "terminated"): (1,), MASK: (1,)}
    if stored:
        transitions["weight"], transitions["index"] = torch.rand(5, 1), torch.arange(5)
        shapes |= {"weight": (1,), "index": ()}
    encoded = loss.encode_transitions(transitions)
    assert encoded.batch_size == (5,)
    assert {key: tuple(x.shape[1:]) for key, x in encoded.items(True, True)} == shapes
    assert encoded[MASK].dtype == encoded["next", "terminated"].dtype == torch.bool
    assert not any(x.requires_grad for x in encoded.values(True, True))


def test_transitions_hold_both_states_and_their_masks():
    loss, transitions = make_loss(encoder=SplitEncoder()), make_slices(5, 1)[:, 0]
    following = transitions["next", "observation"]
    for mask in (torch.ones(5, 1).bool(), torch.tensor([[1], [0], [1], [1], [0]]).bool()):
        encoded = loss.encode_transitions(transitions)
        assert torch.equal(encoded["context"], transitions["observation"][:, 2:])
        assert torch.equal(encoded["next", "latent"], following[:, :2])
        assert torch.equal(encoded["next", "context"], following[:, 2:])
        assert encoded[MASK].all()
        first = loss.encode_transitions(to_slices(loss, transitions, mask))
        assert torch.equal(first[MASK], mask)


def to_slices(loss, transitions, mask) -> Slices:
    """Transitions as the loss reads them, with a mask of their own."""
    return Slices.read(transitions.clone().set(MASK, mask), loss.tensor_keys)


@pytest.mark.parametrize("value", [None, "state", "q"])
@pytest.mark.parametrize("given", [True, False])
def test_the_loss_is_that_of_what_it_encodes(value, given):
    """In one call, and with targets and transitions that were encoded before."""
    loss = frozen(make_loss(value, k_steps=2, n_steps=2))
    slices = make_slices(length=loss.slice_len, lengths=[1, 2, 3, 3, 2, 1], planned=True)
    transitions = make_slices(9, 1)[:, 0] if given else None
    encoded = loss.encode_transitions(slices[:, 0] if transitions is None else transitions)
    same(loss.terms(loss.compute_targets(slices), encoded), loss(slices, transitions))


def test_the_dynamics_learn_from_the_transitions_that_are_given():
    loss, slices = frozen(make_loss()), make_slices(length=1)
    transitions, others = make_slices(9, 1)[:, 0], make_slices(7, 1)[:, 0]
    first, second = loss(slices, transitions), loss(slices, others)
    for key in loss.out_keys:
        differs = key in ("loss_consistency", "loss_standardizer", "nll", "term_bce")
        assert (first[key] != second[key]).item() is differs, key
    total(loss(slices, transitions)).backward()
    expected = {key: p.grad for key, p in loss.dynamics.named_parameters()}
    loss.zero_grad()
    total(loss(make_slices(length=1), transitions)).backward()
    torch.testing.assert_close(
        {key: p.grad for key, p in loss.dynamics.named_parameters()}, expected
    )


def test_batches_that_were_read_before_are_taken_as_they_are():
    loss = frozen(make_loss(k_steps=2, n_steps=2))
    slices, transitions = make_slices(5, 3), make_slices(9, 1)[:, 0]
    read = Slices.read(slices, loss.tensor_keys)
    steps = Slices.read(transitions, loss.tensor_keys, with_reward=False, with_mask=False)
    expected = loss(slices, transitions)
    same(loss(read, steps), expected)
    same(loss(loss.with_returns(read), steps), expected)
    same(loss.compute_targets(read).detach(), loss.compute_targets(slices).detach())
    same(loss.encode_transitions(steps), loss.encode_transitions(transitions))


def test_numbers_of_steps_of_ones_own():
    loss, other = make_loss(k_steps=3, n_steps=2, gamma=0.5), make_loss()
    slices = make_slices(length=4, lengths=[1, 2, 3, 4, 4, 4])
    own = loss.compute_targets(slices, k_steps=1, n_steps=4, gamma=0.0)
    assert own.shape == (6, 1)
    torch.testing.assert_close(own["value_target"], slices["next", "reward"][:, :1])
    other.load_state_dict(loss.state_dict())
    targets = other.compute_targets(slices, k_steps=3, n_steps=2, gamma=0.5)
    same(targets.detach(), loss.compute_targets(slices).detach())


def test_a_latent_called_like_the_observation_is_the_latent():
    """An encoder with running statistics reads both observations beside it."""
    shapes = {}
    for name in ("observation", "latent"):
        encoder = LinearEncoder(3, 2, 1, out_keys=[name, "context"])
        ins = [name, "context", "action"]
        dynamics = ProbabilisticEnsemble(2, 1, 1, in_keys=ins, out_keys=[("next", name), "p"])
        loss = RewardPredictorLoss(encoder, dynamics, RewardNet(2, 1, 1, in_keys=ins), None)
        encoded = loss.encode_transitions(make_slices(5, 1)[:, 0])
        shapes[name] = encoded[name].shape, encoded["next", name].shape
        assert total(loss(make_slices(length=1))).isfinite()
    assert shapes["observation"] == shapes["latent"] == ((5, 2), (5, 2))


def test_one_call_on_a_sample_in_a_plain_torchrl_loop():
    loss = make_loss(k_steps=2, n_steps=3)
    updater = SoftUpdate(loss, tau=0.1)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(60),
        sampler=TransitionSliceSampler(slice_len=loss.slice_len),
        batch_size=8 * loss.slice_len,
    )
    buffer.extend(episodes(60, [(7, True), (5, False)]))
    optimizer = torch.optim.Adam(loss.parameters(), 1e-3)
    before = {key: p.clone() for key, p in loss.named_parameters()}
    target = loss.target_value_network_params.clone()
    for _ in range(3):
        terms = loss(buffer.sample())
        total(terms).backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
    for key, p in loss.named_parameters():
        assert not torch.equal(p, before[key]), key
    assert not any(
        torch.equal(a, b)
        for a, b in zip(
            loss.target_value_network_params.values(True, True),
            target.values(True, True),
            strict=True,
        )
    )


# --- oracle


def test_terms_by_hand():
    dynamics, _, reward, encoder = small_parts(encoder=SplitEncoder())
    loss = RewardPredictorLoss(
        encoder,
        dynamics,
        reward,
        ToyValue(0.7),
        standardizer=DeltaStandardizer(2),
        gamma=0.9,
        k_steps=2,
        n_steps=2,
        consistency_loss_weight=3.0,
        value_loss_weight=5.0,
        rew_loss_weight=7.0,
    )
    SoftUpdate(loss, tau=0.1)
    loss.target_value_network_params.data.mul_(2.0)
    frozen(loss)
    slices = make_slices(3, 3, [3, 1, 2], terminated=True)
    slices["next", "terminated"][0] = False
    slices["planned"] = torch.ones(3, 3, 1).bool()
    slices["planned"][2, 0] = False
    out = loss(slices)

    reward_errors, value_errors, value_targets = [], [], []
    for b, length in enumerate([3, 1, 2]):
        context = slices["observation"][b, 0, 2:].double()
        for j in range(min(length, 2)):
            step = slices[b, j]
            latent = step["observation"][:2].double()
            predicted = reward(latent.float(), context.float(), step["action"])
            reward_errors.append((predicted - step["next", "reward"]).double().item() ** 2)
            summed = min(2, length - j)
            target = sum(
                0.9**i * slices["next", "reward"][b, j + i].double() for i in range(summed)
            )
            if not slices["next", "terminated"][b, j + summed - 1]:
                end = slices["next", "observation"][b, j + summed - 1, :2].double()
                weights = torch.tensor([1.4, -0.8]).double()
                target = target + 0.9**summed * (torch.tanh(end @ weights) + 0.5 * context)
            weights = torch.tensor([0.7, -0.4]).double()
            value = torch.tanh(latent @ weights) + 0.5 * context
            if slices["planned"][b, j]:
                value_errors.append((value - target).item() ** 2)
                value_targets.append(target.item())
    mean = lambda x: sum(x) / len(x)  # noqa: E731
    assert out["loss_reward"].item() == pytest.approx(7 * mean(reward_errors), rel=1e-4)
    assert out["loss_value"].item() == pytest.approx(5 * mean(value_errors), rel=1e-4)
    assert out["value_target_mean"].item() == pytest.approx(mean(value_targets), rel=1e-4)

    first = slices[:, 0]
    latent, context = encoder.encode(first["observation"])
    next_latent = first["next", "observation"][:, :2]
    mean_, weight, std, _ = dynamics.predict(latent, context, first["action"])
    density = torch.distributions.Normal(mean_, std).log_prob(next_latent[:, None, None]).sum(-1)
    nll = -(density.double() + weight.double().log()).logsumexp(-1).mean()
    logit = dynamics.predict_particles(
        latent[:, None, None].expand(3, 2, 1, 2), context, first["action"]
    ).term_logit[:, :, 0, 0]
    ended = first["next", "terminated"].double().expand(3, 2)
    p = logit.double().sigmoid()
    bce = -(ended * p.log() + (1 - ended) * (1 - p).log()).mean()
    assert out["nll"].item() == pytest.approx(nll.item(), rel=1e-4)
    assert out["term_bce"].item() == pytest.approx(bce.item(), rel=1e-4)
    assert out["loss_consistency"].item() == pytest.approx(3 * (nll + bce).item(), rel=1e-4)

    white = (next_latent - latent).double() @ loss.standardizer.matrix.double().T
    residual = torch.cov(white.T, correction=0) - torch.eye(2).double()
    assert out["loss_standardizer"].item() == pytest.approx(residual.norm().item(), rel=1e-4)


def test_value_targets_come_from_the_target_network():
    loss = make_loss()
    slices = make_slices(length=1)
    before = loss.compute_targets(slices)["value_target"]
    for p in loss.value_network.parameters():
        p.data.zero_()
    torch.testing.assert_close(loss.compute_targets(slices)["value_target"], before)
    loss.target_value_network_params.data.zero_()
    torch.testing.assert_close(
        loss.compute_targets(slices)["value_target"], slices["next", "reward"]
    )


def test_context_of_a_slice_is_that_of_its_first_step():
    loss = make_loss(encoder=SplitEncoder(), k_steps=3)
    slices = make_slices(length=3)
    context = loss.compute_targets(slices)["context"]
    torch.testing.assert_close(context, slices["observation"][:, :1, 2:].expand(-1, 3, 1))


def test_bootstrap_value_sees_the_context_of_the_first_step():
    loss = frozen(make_loss(encoder=SplitEncoder(), k_steps=3))
    slices = make_slices(length=3)
    other = slices.clone()
    other["observation"][:, 1:, 2] = 9.0
    other["next", "observation"][..., 2] = 9.0
    same(
        loss.compute_targets(slices).select("value_target").detach(),
        loss.compute_targets(other).select("value_target").detach(),
    )


def test_state_after_a_truncated_end_is_bootstrapped():
    """LayeredRL took the value of the last state instead of the one after it."""
    _, _, reward, encoder = small_parts(encoder=SplitEncoder())
    dynamics = ProbabilisticEnsemble(2, 1, 1, hidden_sizes=(4,))
    loss = RewardPredictorLoss(encoder, dynamics, reward, ToyValue(), gamma=0.5, n_steps=3)
    SoftUpdate(loss, tau=0.1)
    slices = make_slices(1, 3, [1])
    target = loss.compute_targets(slices)["value_target"].item()
    after = slices["next", "observation"][0, 0, :2].tolist()
    context = slices["observation"][0, 0, 2:].tolist()
    tail = ToyValue.oracle(loss.value_network.module.w.tolist(), after, context, None)
    assert target == pytest.approx(slices["next", "reward"][0, 0].item() + 0.5 * tail, rel=1e-5)


def test_q_is_never_bootstrapped_at_a_state_without_action():
    _, _, reward, encoder = small_parts(encoder=SplitEncoder())
    dynamics = ProbabilisticEnsemble(2, 1, 1, hidden_sizes=(4,))
    options = {"gamma": 0.5, "k_steps": 2, "n_steps": 3}
    loss = RewardPredictorLoss(encoder, dynamics, reward, ToyQ(), **options)
    SoftUpdate(loss, tau=0.1)
    slices = make_slices(1, loss.slice_len, [2])  # two real steps, then an unfinished end
    targets = loss.compute_targets(slices)
    assert targets[MASK].all()
    assert targets["value_target"].isnan().flatten().tolist() == [False, True]
    obs, act = slices["observation"][0], slices["action"][0]
    weights = loss.value_network.module.w.tolist()
    tail = ToyQ.oracle(weights, obs[1, :2].tolist(), obs[0, 2:].tolist(), act[1].tolist())
    expected = slices["next", "reward"][0, 0].item() + 0.5 * tail
    assert targets["value_target"][0, 0].item() == pytest.approx(expected, rel=1e-5)
    # nor is what lies in the padding looked at
    slices["action"][:, 2:] = 1e6
    slices["next", "observation"][:] = torch.nan
    torch.testing.assert_close(
        loss.compute_targets(slices)["value_target"], targets["value_target"], equal_nan=True
    )


@pytest.mark.parametrize(
    "weight", ["consistency_loss_weight", "value_loss_weight", "rew_loss_weight"]
)
def test_a_weight_scales_its_term_only(weight):
    term = {"c": "loss_consistency", "v": "loss_value", "r": "loss_reward"}[weight[0]]
    loss = frozen(make_loss())
    slices = make_slices(length=1)
    before = loss(slices)
    setattr(loss, weight, 2.5)
    after = loss(slices)
    factor = after / before
    assert {key: round(x.item(), 4) for key, x in factor.items() if x != 1} == {term: 2.5}


# --- property

padded = st.lists(st.integers(1, 5), min_size=2, max_size=5)


@given(lengths=padded, value=st.sampled_from(["state", "q"]), terminated=st.booleans())
def test_nan_in_padding_changes_neither_loss_nor_gradient(lengths, value, terminated):
    """LayeredRL's reward loss counted padded steps."""
    loss = frozen(make_loss(value, k_steps=3, n_steps=2 if value == "q" else 3))
    slices = make_slices(len(lengths), 5, lengths, terminated=terminated, planned=True)
    clean, clean_grads = loss(slices), grads(loss, slices)
    padding = ~slices[MASK].squeeze(-1)
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        slices[key][padding] = torch.nan
    slices["next", "terminated"][padding] = True
    same(loss(slices), clean)
    torch.testing.assert_close(grads(loss, slices), clean_grads)


@pytest.mark.parametrize("value", ["state", "q"])
def test_nan_behind_a_terminated_end_changes_nothing(value):
    loss = frozen(make_loss(value, k_steps=2, n_steps=2, standardizer=False))
    slices = make_slices(4, loss.slice_len, [2] * 4, terminated=True)
    clean = loss.compute_targets(slices).detach()
    slices["next", "observation"][:, 1] = torch.nan
    same(loss.compute_targets(slices).detach(), clean)


def test_steps_without_plan_count_for_the_value_only_as_rewards():
    loss = frozen(make_loss(k_steps=2))
    slices = make_slices(length=2, planned=True)
    targets = loss.compute_targets(slices)
    transitions = loss.encode_transitions(slices[:, 0])
    clean = loss.terms(targets, transitions)
    targets["value_target"][~targets["planned"]] = torch.nan
    terms = loss.terms(targets, transitions)
    same(terms, clean)
    total(terms).backward()
    assert all(p.grad.isfinite().all() for p in loss.parameters())
    targets["planned"] = torch.zeros_like(targets["planned"])
    assert loss.terms(targets, transitions)["loss_value"] == 0
    assert loss.terms(targets, transitions)["loss_reward"] == clean["loss_reward"]


def test_targets_with_nan_at_masked_steps():
    loss = frozen(make_loss(k_steps=2))
    slices = make_slices(4, 2, [2, 1, 1, 2])
    targets, transitions = loss.compute_targets(slices), loss.encode_transitions(slices[:, 0])
    clean = loss.terms(targets, transitions)
    masked = ~targets[MASK].squeeze(-1)
    targets = targets.detach().clone()
    for key in ("latent", "context", "action", ("next", "reward"), "value_target"):
        targets[key][masked] = torch.nan
    same(loss.terms(targets, transitions), clean)


def test_a_slice_of_nothing_but_padding_counts_for_nothing():
    loss = make_loss(k_steps=2)
    slices = make_slices(5, 2, [2, 0, 1, 0, 2])
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        slices[key][~slices[MASK].squeeze(-1)] = torch.nan
    terms = loss(slices)
    assert all(x.isfinite() for x in terms.values())
    assert all(g.isfinite().all() for g in grads(loss, slices).values())
    as_seen = loss.encode_transitions(slices[torch.tensor([0, 2, 4]), 0])
    seen, alone = frozen(loss)(slices), loss.terms(loss.compute_targets(slices), as_seen)
    for key in ("nll", "loss_standardizer"):
        torch.testing.assert_close(seen[key], alone[key])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flags_stored_as_numbers_are_flags(dtype):
    """``~`` of a flag stored as uint8 bootstrapped every terminated step."""
    loss = frozen(make_loss(n_steps=2))
    slices = make_slices(length=2, lengths=[1, 2, 2, 1, 2, 1])
    slices["planned"] = torch.tensor([True, False]).expand(6, 2).unsqueeze(-1)
    numbers = slices.clone()
    for key in (("next", "terminated"), MASK, "planned"):
        numbers.set(key, slices[key].to(dtype))
    same(loss(numbers), loss(slices))


@pytest.mark.parametrize("key", [("next", "reward"), "value_target", "planned", MASK])
def test_targets_of_a_wrong_shape_are_refused(key):
    """A relabelled reward ``[B, k]`` was broadcast to ``[B, B, k]``."""
    loss = make_loss()
    targets = loss.compute_targets(make_slices(length=1))
    targets.set(key, targets[key].squeeze(-1))
    transitions = loss.encode_transitions(make_slices(length=1)[:, 0])
    with pytest.raises(ValueError, match=r"expected shape \[6, 1, 1\]"):
        loss.terms(targets, transitions)


@pytest.mark.parametrize("key", ["action", ("next", "latent"), ("next", "terminated")])
def test_transitions_without_an_entry_name_it(key):
    loss = make_loss()
    targets = loss.compute_targets(make_slices(length=1))
    transitions = loss.encode_transitions(make_slices(length=1)[:, 0]).exclude(key)
    with pytest.raises(KeyError, match="it has"):
        loss.terms(targets, transitions)


def test_without_planned_every_step_is():
    loss = frozen(make_loss())
    slices = make_slices(length=1)
    expected = loss(slices)
    slices["planned"] = torch.ones(6, 1, 1).bool()
    same(loss(slices), expected)


def test_gamma_zero_is_the_reward_alone():
    loss = make_loss(gamma=0.0, k_steps=2, n_steps=3)
    slices = make_slices(length=4, lengths=[1, 2, 3, 4, 4, 4])
    targets = loss.compute_targets(slices)
    expected = torch.where(slices[MASK], slices["next", "reward"], 0.0)[:, :2]
    torch.testing.assert_close(targets["value_target"], expected)


def test_order_of_slices_changes_nothing():
    loss = frozen(make_loss(k_steps=2, n_steps=2))
    slices = make_slices(5, 3, [1, 2, 3, 3, 1])
    a, b = loss(slices), loss(slices[torch.randperm(5)])
    torch.testing.assert_close(a.to_dict(), b.to_dict())


@pytest.mark.parametrize("all_count", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reduction(reduction, all_count):
    dynamics, value, reward, encoder = small_parts()
    losses = [
        RewardPredictorLoss(encoder, dynamics, reward, value, k_steps=2, reduction=r).eval()
        for r in ("mean", reduction)
    ]
    for loss in losses:
        SoftUpdate(loss, tau=0.1)
    slices = make_slices(4, 2, [2] * 4 if all_count else [1, 2, 2, 1], planned=True)
    slices["planned"][:] |= all_count
    slices["planned"][0, 0] = True
    mean, out = (loss(slices) for loss in losses)
    counts = {
        "loss_reward": slices[MASK].sum(),
        "loss_value": (slices[MASK] & slices["planned"]).sum(),
        "loss_consistency": 4,
    }
    for key, count in counts.items():
        if reduction == "none":
            assert out[key].shape == ((4, 1) if key == "loss_consistency" else (4, 2, 1))
            assert out[key].requires_grad
        torch.testing.assert_close(out[key].sum() / count, mean[key])
    if reduction == "none":
        assert (out["loss_reward"][~slices[MASK]] == 0).all()
        assert (out["loss_value"][~(slices[MASK] & slices["planned"])] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reported_terms_are_means_over_what_is_valid_whatever_the_reduction(reduction):
    """`nll` and `term_bce` counted padded rows: with half of them padding, half of it came out."""
    dynamics, value, reward, encoder = small_parts()
    loss = RewardPredictorLoss(encoder, dynamics, reward, value, reduction=reduction).eval()
    SoftUpdate(loss, tau=0.1)
    slices = make_slices(4, 1, [1, 0, 1, 0], planned=True)
    slices["planned"][0] = True
    out, real = loss(slices), slices[[0, 2]]
    only = loss(real)
    for key in ("nll", "term_bce", "value_target_mean"):
        assert out[key].shape == () and not out[key].requires_grad
        torch.testing.assert_close(out[key], only[key])
    encoded = loss.encode_transitions(real[:, 0])
    expected = dynamics.loss(encoded)
    torch.testing.assert_close(out["nll"] + out["term_bce"], expected.detach())
    weighted = slices.set("weight", torch.tensor([2.0, 5.0, 1.0, 3.0]).reshape(4, 1, 1))
    encoded["weight"] = torch.tensor([[2.0], [1.0]])
    out = loss(weighted)
    torch.testing.assert_close(out["nll"] + out["term_bce"], dynamics.loss(encoded).detach())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("value", ["state", "q"])
def test_a_batch_in_which_nothing_was_planned_is_learned_from(value, reduction):
    """The mean over no target is no number, so that every such batch was skipped."""
    loss = make_loss(value, reduction=reduction)
    slices = make_slices(length=loss.slice_len)
    slices["planned"] = torch.zeros(*slices.shape, 1).bool()
    terms = loss(slices)
    assert all(x.isfinite().all() for x in terms.values())
    assert (terms["loss_value"] == 0).all() and terms["value_target_mean"] == 0
    terms["loss_reward"].sum().backward()
    assert any(p.grad.abs().sum() > 0 for p in of_part(loss, "reward"))


@pytest.mark.parametrize("value", ["state", "q"])
def test_reward_of_the_last_step_of_a_truncated_episode_is_learned(value):
    """With a Q-function the reward loss left out the step that has no value target."""
    loss = frozen(make_loss(value, k_steps=2, n_steps=2))
    slices = make_slices(3, loss.slice_len, [2, 2, 2])
    before, before_grads = loss(slices), grads(loss, slices)
    slices["next", "reward"][:, 1] += 10.0
    after, after_grads = loss(slices), grads(loss, slices)
    assert after["loss_reward"] > 10 * before["loss_reward"]
    for key, grad in before_grads.items():
        if key.startswith("reward"):
            assert not torch.equal(grad, after_grads[key])
    torch.testing.assert_close(after["loss_consistency"], before["loss_consistency"])
    assert (after["loss_value"] == before["loss_value"]).item() is (value == "q")
    # also where targets are computed beforehand
    encoded = loss.encode_transitions(slices[:, 0])
    torch.testing.assert_close(loss.terms(loss.compute_targets(slices), encoded), after)


@pytest.mark.parametrize("value", ["state", "q"])
def test_a_reward_that_is_no_number_is_no_missing_target(value):
    """A NaN among the targets of a Q-function stands for none, but not where one is due."""
    loss = frozen(make_loss(value, n_steps=2))
    slices = make_slices(3, loss.slice_len)
    slices["next", "reward"][1, 1] = torch.nan
    targets = loss.compute_targets(slices)
    terms = loss.terms(targets, loss.encode_transitions(slices[:, 0]))
    assert terms["loss_value"].isnan() and loss(slices)["loss_value"].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_targets_of_rewards_of_half_precision(dtype):
    """Their sum was infinite in float16, and rounded to 87,040 in bfloat16."""
    loss = make_loss(n_steps=64, gamma=0.99)
    slices = make_slices(2, loss.slice_len, terminated=True)
    reward = torch.full((2, 64, 1), 1850.0).to(dtype)
    slices["next", "reward"] = reward
    target = loss.compute_targets(slices)["value_target"]
    expected = sum(0.99**i * reward[0, 0].double().item() for i in range(64))
    assert target.dtype is torch.float32
    assert target.flatten().tolist() == pytest.approx([expected] * 2, rel=1e-6)
    assert all(x.isfinite() for x in loss(slices).values())


def test_errors_of_a_half_precision_network_do_not_overflow():
    dynamics, value, _, encoder = small_parts()
    reward = lambda latent, context, action: latent[..., :1].bfloat16()  # noqa: E731
    loss = RewardPredictorLoss(encoder, dynamics, reward, value)
    SoftUpdate(loss, tau=0.1)
    slices = make_slices(length=1)
    slices["next", "reward"][:] = 1e20 / 3
    assert loss(slices)["loss_reward"].dtype is torch.float32


# --- gradients


def of_part(loss, name) -> list[torch.Tensor]:
    part = {"value": "value_network_params"}.get(name, name)
    return list(getattr(loss, part).parameters())


@pytest.mark.parametrize("learn_encoder", [True, False])
@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("loss_reward", {"encoder", "reward"}),
        ("loss_value", {"value"}),
        ("loss_consistency", {"dynamics"}),
        ("loss_standardizer", {"standardizer"}),
    ],
)
def test_who_learns_from_which_term(term, parts, learn_encoder):
    loss = make_loss(k_steps=2, n_steps=2, learn_encoder=learn_encoder)
    loss(make_slices(length=3))[term].backward()
    if not learn_encoder:
        parts = parts - {"encoder"}
    for name in ("encoder", "reward", "value", "dynamics", "standardizer"):
        got = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in of_part(loss, name)]
        assert all(got) if name in parts else not any(got), name
    assert not any(p.requires_grad for p in loss.target_value_network_params.values(True, True))


def test_encoder_learns_neither_from_value_nor_dynamics_in_the_total():
    loss = make_loss(rew_loss_weight=0.0)
    grads_ = grads(loss, make_slices(length=1))
    assert all((g == 0).all() for key, g in grads_.items() if key.startswith("encoder"))


@pytest.mark.parametrize("learn_encoder", [True, False])
def test_targets_carry_gradient_if_the_encoder_learns(learn_encoder):
    loss, slices = make_loss(learn_encoder=learn_encoder), make_slices(length=1)
    targets = loss.compute_targets(slices)
    assert targets["latent"].requires_grad is targets["context"].requires_grad is learn_encoder
    # and whatever they carry, an encoder that does not learn gets none of it
    targets = make_loss(encoder=loss.encoder).compute_targets(slices)
    total(loss.terms(targets, loss.encode_transitions(slices[:, 0]))).backward()
    assert all((p.grad is not None) is learn_encoder for p in loss.encoder.parameters())


def test_no_gradient_under_no_grad():
    with torch.no_grad():
        assert not any(x.requires_grad for x in make_loss()(make_slices(length=1)).values())


def test_loss_of_members_is_finite_far_from_every_mode():
    """LayeredRL's mixture densities underflowed: exp before log, in float32."""
    loss = frozen(make_loss(standardizer=False))
    slices = make_slices(length=1)
    slices["next", "observation"] += 1e3
    terms = loss(slices)
    assert terms["nll"] > 1e3
    assert all(g.isfinite().all() for g in grads(loss, slices).values())


@pytest.mark.parametrize("n_models", [1, 2, 5])
def test_mask_is_applied_once_not_once_per_member(n_models):
    """LayeredRL multiplied masks member by member."""
    dynamics, value, reward, encoder = small_parts(n_models=n_models)
    loss = RewardPredictorLoss(encoder, dynamics, reward, value, k_steps=2).eval()
    SoftUpdate(loss, tau=0.1)
    slices = make_slices(4, 2, [1, 2, 1, 1])
    out = loss(slices)
    latent, context = encoder.encode(slices["observation"])
    error = reward(latent, context[:, :1].expand_as(context), slices["action"])
    error = (error - slices["next", "reward"]).square()
    assert out["loss_reward"].item() == pytest.approx(error[slices[MASK]].mean().item(), rel=1e-5)
    transitions = loss.encode_transitions(slices[:, 0])
    assert out["loss_consistency"].item() == pytest.approx(dynamics.loss(transitions).item())


# --- errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gamma": 1.1}, "gamma must be in .0, 1., got 1.1"),
        ({"gamma": -0.1}, "gamma"),
        ({"k_steps": 0}, "k_steps and n_steps must be at least 1, got 0 and 1"),
        ({"n_steps": 0}, "k_steps and n_steps"),
        ({"reduction": "median"}, "reduction must be .*'median'"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        make_loss(**options)
    if "reduction" not in options:
        with pytest.raises(ValueError, match=text):
            make_loss().compute_targets(make_slices(), **options)


@pytest.mark.parametrize("name", ["k_steps", "n_steps"])
def test_counts_that_are_no_integers_are_named(name):
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 2.0"):
        make_loss(**{name: 2.0})


@pytest.mark.parametrize(
    "key",
    [
        "observation",
        "action",
        ("next", "observation"),
        ("next", "reward"),
        ("next", "terminated"),
        MASK,
    ],
)
def test_a_missing_entry_is_named(key):
    loss = make_loss()
    assert key in loss.in_keys
    slices = make_slices(length=1).exclude(key)
    with pytest.raises(KeyError, match=r"the batch has no .*; it has ") as error:
        loss(slices)
    missing, there = error.value.args[0].split("; it has ")
    assert missing.endswith(f"{[key]}")
    assert there == f"{sorted(map(str, slices.keys(True, True)))}."


@pytest.mark.parametrize("key", [("next", "reward"), ("next", "terminated"), "planned", MASK])
@pytest.mark.parametrize("shape", [(6, 2), (6, 2, 2)])
def test_a_per_step_entry_without_a_trailing_one(key, shape):
    slices = make_slices(length=2, planned=True)
    wrong = torch.ones(shape, dtype=slices[key].dtype)
    slices[key] = wrong
    name = key if isinstance(key, str) else key[-1]
    with pytest.raises(ValueError, match=rf"{name}.*expected shape \[6, 2, 1\].*got \[6, 2"):
        make_loss(k_steps=2)(slices)


def test_a_flat_reward_is_no_silent_broadcast():
    slices = make_slices(length=1).reshape(-1)
    slices["next", "reward"] = slices["next", "reward"].squeeze(-1)
    with pytest.raises(ValueError, match=r"reward.*trailing dim of 1"):
        make_loss()(slices)


@pytest.mark.parametrize("shape", [(7,), (3, 2), (2, 3, 3)])
def test_batches_that_are_no_slices(shape):
    loss = make_loss(k_steps=2, n_steps=2)
    slices = make_slices(18, 1).reshape(-1)[: math.prod(shape)].reshape(shape)
    with pytest.raises(ValueError, match=rf"slice_len=3 .*got batch size \[{shape[0]}"):
        loss(slices)


@pytest.mark.parametrize(("key", "text"), [("observation", "observation.*3"), ("action", "action")])
def test_wrong_sizes(key, text):
    slices = make_slices(length=1)
    slices[key] = torch.zeros(6, 1, 5)
    with pytest.raises(ValueError, match=text):
        make_loss()(slices)


def test_unknown_key_name():
    with pytest.raises(ValueError, match="not an accepted"):
        make_loss().set_keys(state="x")


# --- state

RENAMED = {
    "observation": "obs",
    "action": ("agent", "act"),
    "reward": ("agent", "rew"),
    "terminated": "is_end",
    "mask": ("own", "valid"),
    "planned": "deliberate",
}


@pytest.mark.parametrize("value", ["state", "q"])
def test_other_names_also_nested(value):
    """A mask under another name was not seen, and a Q-function not known as one."""
    act = RENAMED["action"]
    ins = ["latent", "context", act]
    value_net = {
        "state": partial(ValueNet, 2, 1),
        "q": partial(ValueNet, 2, 1, action_dim=1, in_keys=ins),
    }
    torch.manual_seed(3)
    plain = make_loss(value, k_steps=2, n_steps=2).eval()
    slices = make_slices(5, 4, [1, 2, 3, 4, 4], planned=True)
    renamed = RewardPredictorLoss(
        LearnedEncoder(in_keys=["obs"]),
        ProbabilisticEnsemble(2, 1, 1, n_models=2, hidden_sizes=(8,)),
        RewardNet(2, 1, 1, hidden_sizes=(8,), in_keys=ins),
        value_net[value](hidden_sizes=(8,)),
        standardizer=DeltaStandardizer(2),
        k_steps=2,
        n_steps=2,
    ).eval()
    SoftUpdate(renamed, tau=0.1)
    renamed.set_keys(**RENAMED)
    renamed.load_state_dict(plain.state_dict())
    assert renamed.slice_len == plain.slice_len
    other = TensorDict(
        {
            "obs": slices["observation"],
            "agent": {"act": slices["action"]},
            "deliberate": slices["planned"],
            "own": {"valid": slices[MASK]},
            "next": {
                "obs": slices["next", "observation"],
                "agent": {"rew": slices["next", "reward"]},
                "is_end": slices["next", "terminated"],
            },
        },
        batch_size=slices.batch_size,
    )
    assert set(renamed.in_keys) == set(other.keys(True, True)) - {"deliberate"}
    same(renamed(other), plain(slices))


def test_latent_under_another_name():
    names = {"out_keys": ["z", ("task", "c")]}
    ins = ["z", ("task", "c"), "action"]
    loss = RewardPredictorLoss(
        LearnedEncoder(**names),
        ProbabilisticEnsemble(2, 1, 1),
        RewardNet(2, 1, 1, in_keys=ins),
        ValueNet(2, 1, in_keys=ins[:2]),
    )
    SoftUpdate(loss, tau=0.1)
    assert total(loss(make_slices(length=1))).isfinite()


def test_observations_of_more_dims():
    encoder = IdentityEncoder((2, 3))
    loss = RewardPredictorLoss(
        encoder, ProbabilisticEnsemble(6, 0, 1), RewardNet(6, 0, 1), ValueNet(6, 0), k_steps=2
    )
    SoftUpdate(loss, tau=0.1)
    slices = make_slices(length=2, lengths=[1, 2, 2, 1, 2, 2])
    slices["observation"] = torch.randn(6, 2, 2, 3)
    slices["next", "observation"] = torch.randn(6, 2, 2, 3)
    assert total(loss(slices)).isfinite()


@pytest.mark.parametrize("one_hot", [True, False])
def test_discrete_actions(one_hot):
    loss = RewardPredictorLoss(
        IdentityEncoder(3),
        ProbabilisticEnsemble(3, 0, 4),
        RewardNet(3, 0, 4),
        ValueNet(3, 0, action_dim=4),
        k_steps=2,
    ).eval()
    SoftUpdate(loss, tau=0.1)
    slices = make_slices(length=3, lengths=[1, 2, 3, 3, 3, 3])
    index = torch.randint(4, (6, 3))
    as_index, as_one_hot = slices.clone(), slices.clone()
    as_index["action"] = index
    as_one_hot["action"] = nn.functional.one_hot(index, 4).bool()
    same(loss(as_index), loss(as_one_hot if one_hot else as_index))
    as_index["action"][~slices[MASK].squeeze(-1)] = 3
    same(loss(as_index), loss(as_one_hot))


def test_running_statistics_move_in_training_mode_only():
    loss = make_loss()
    stats = {key: x for key, x in loss.named_buffers() if "moments" in key}
    before = {key: x.clone() for key, x in stats.items()}
    loss.eval()(make_slices(length=1))
    torch.testing.assert_close(stats, before)
    loss.train()(make_slices(length=1))
    assert not any(torch.equal(stats[key], x) for key, x in before.items())


def test_state_dict_round_trip():
    a, b = make_loss("q"), make_loss("q")
    a.target_value_network_params.data.mul_(0.5)
    b.load_state_dict(a.state_dict())
    slices = make_slices(length=2)
    same(frozen(a)(slices), frozen(b)(slices))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_value_of_a_copied_loss_learns(how):
    """A deep copy evaluated one value network and gave out the parameters of another."""
    original = make_loss()
    loss = how(original)
    slices = make_slices(length=1)
    same(frozen(loss)(slices), frozen(original)(slices))
    grads(loss, slices)
    assert all(p.grad.abs().sum() > 0 for p in of_part(loss, "value"))
    assert all(p.grad is None for p in original.parameters())
    loss.value_network_params.data.zero_()
    assert loss(slices)["loss_value"] != original(slices)["loss_value"]


@pytest.mark.slow
# tensordict 0.14 reads a deprecated option of torch 2.13 wherever it compiles `to_module`
@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules:FutureWarning")
@pytest.mark.parametrize("value", ["state", "q"])
def test_compiles_without_graph_break(value):
    loss = frozen(make_loss(value, k_steps=2, n_steps=2))
    slices = make_slices(5, 4, [1, 2, 3, 4, 4], planned=True)
    expected, expected_grads = loss(slices), grads(loss, slices)
    # inductor gives the same, in half a minute
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(slices).to_dict(), expected.to_dict())
    loss.zero_grad()
    total(compiled(slices)).backward()
    torch.testing.assert_close({key: p.grad for key, p in loss.named_parameters()}, expected_grads)
