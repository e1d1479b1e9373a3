"""What LinearEncoder and MLPEncoder share: which dims change, standardisation, the freeze."""

import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

from layeredrl_trl.modules import (
    Encoder,
    IdentityEncoder,
    LearnedEncoder,
    LinearEncoder,
    MLPEncoder,
)
from tests.oracles import moments_of

NAN, INF = float("nan"), float("inf")
SmallMLP = partial(MLPEncoder, hidden_sizes=(8,))
both = pytest.mark.parametrize("make", [LinearEncoder, SmallMLP], ids=["linear", "mlp"])


def transitions(n: int, changing: list[bool], dtype=torch.float32):
    """Observations and the next ones, of which only some dims differ."""
    now = torch.randn(n, len(changing), dtype=dtype)
    later = torch.where(torch.tensor(changing), torch.randn_like(now), now)
    return now, later


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in module.named_buffers()}


def assert_unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert buffers_of(module).keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in module.named_buffers())


# --- contract


@both
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("obs_shape", [4, (4,), (2, 2)])
@pytest.mark.parametrize(("d", "c"), [(1, 0), (2, 1), (6, 5)])
def test_shapes(make, obs_shape, d, c, batch):
    encoder = make(obs_shape, d, c)
    observation = torch.randn(torch.Size(batch) + encoder.obs_shape)
    encoder.update_statistics(observation, observation + 1)
    latent, context = encoder.encode(observation)
    assert latent.shape == (*batch, d) and context.shape == (*batch, c)
    assert not encoder.can_decode and encoder.has_statistics
    data = encoder(TensorDict(observation=observation, batch_size=batch))
    assert torch.equal(data["latent"], latent) and torch.equal(data["context"], context)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8])
def test_observations_are_cast(make, dtype):
    encoder = make(3, 2, 1)
    observation = torch.tensor([[0, 1, 2], [3, 1, 5]], dtype=dtype)
    encoder.update_statistics(observation, observation.flip(0))
    assert encoder.changes.tolist() == [True, False, True]
    assert encoder.moments.mean.tolist() == [1.5, 1, 3.5]
    assert {x.dtype for x in encoder.encode(observation)} == {torch.float32}
    assert encoder.moments.mean.dtype == torch.float32


def test_other_encoders_have_no_statistics():
    encoder = IdentityEncoder(3)
    assert not encoder.has_statistics
    assert encoder.update_statistics(torch.zeros(2, 3), torch.ones(2, 3)) is None


def test_networks_of_your_own():
    encoder = LearnedEncoder(3, 2, 1, lambda n, m: nn.Sequential(nn.Tanh(), nn.Linear(n, m)))
    latent, context = encoder.encode(torch.zeros(5, 3))
    assert latent.shape == (5, 2) and context.shape == (5, 1)


def test_nested_keys():
    encoder = LinearEncoder(3, 2, 1, in_keys=[("o", "x")], out_keys=[("m", "z"), ("m", "c")])
    data = encoder(TensorDict({("o", "x"): torch.ones(2, 3)}, batch_size=[2]))
    assert data["m", "z"].shape == (2, 2) and data["m", "c"].shape == (2, 1)


# --- oracle: which dims change, and the moments


def test_dims_seen_to_change_stay_changing():
    encoder = LinearEncoder(3, 2, 1)
    for changing, expected in [
        ([False, False, False], [False, False, False]),
        ([True, False, False], [True, False, False]),
        ([False, False, True], [True, False, True]),
        ([False, False, False], [True, False, True]),
    ]:
        encoder.update_statistics(*transitions(5, changing))
        assert encoder.changes.tolist() == expected


def test_a_dim_that_differs_between_episodes_only_does_not_change():
    encoder = LinearEncoder(2, 1, 1)
    now, later = transitions(50, [True, False])
    assert now[:, 1].std() > 0.5
    encoder.update_statistics(now, later)
    assert encoder.changes.tolist() == [True, False]


def test_one_transition_is_enough_to_see_a_change():
    encoder, now = LinearEncoder(2, 1, 1), torch.randn(50, 2)
    later = now.clone()
    later[17, 1] += 1e-3
    encoder.update_statistics(now, later)
    assert encoder.changes.tolist() == [False, True]


def test_moments_are_those_of_the_observations():
    encoder, now = LinearEncoder(2, 1, 1), 5 + 3 * torch.randn(40, 2)
    encoder.update_statistics(now, now + 100)
    mean, var = moments_of(now)
    torch.testing.assert_close(encoder.moments.mean.double(), mean)
    torch.testing.assert_close(encoder.moments.var.double(), var)


@both
def test_inputs_are_standardised(make):
    encoder, plain = make(3, 2, 1), make(3, 2, 1, standardize=False)
    plain.load_state_dict(encoder.state_dict(), strict=False)
    now, later = transitions(40, [True, True, False])
    now, later = 50 + 7 * now, 50 + 7 * later
    for x in (encoder, plain):
        x.update_statistics(now, later)
    expected = plain.encode((now - now.mean(0)) / now.std(0, correction=0))
    torch.testing.assert_close(encoder.encode(now), expected, rtol=1e-4, atol=1e-5)
    assert plain.moments is None


# --- property


@both
def test_latent_reads_only_changing_dims_and_context_only_the_others(make):
    encoder = make(4, 2, 3)
    encoder.update_statistics(*transitions(20, [True, False, True, False]))
    observation = torch.randn(5, 4)
    latent, context = encoder.encode(observation)
    for dim, changes in enumerate(encoder.changes.tolist()):
        other = observation.clone()
        other[:, dim] += 1
        latent_2, context_2 = encoder.encode(other)
        assert torch.equal(latent, latent_2) is not changes
        assert torch.equal(context, context_2) is changes


@both
@given(changing=st.lists(st.booleans(), min_size=4, max_size=4), seed=st.integers(0, 1000))
def test_context_is_constant_in_an_episode(make, changing, seed):
    torch.manual_seed(seed)
    encoder = make(4, 2, 3)
    now, later = transitions(6, changing)
    for _ in range(2):  # before any statistics, and after
        torch.testing.assert_close(encoder.encode(now)[1], encoder.encode(later)[1])
        encoder.update_statistics(now, later)


@both
def test_before_anything_was_seen_every_dim_feeds_the_latent(make):
    encoder, observation = make(3, 2, 2), torch.randn(5, 3, requires_grad=True)
    latent, context = encoder.encode(observation)
    torch.testing.assert_close(context, context[:1].expand(5, 2))
    latent.square().sum().backward()
    assert (observation.grad != 0).all()


@both
@pytest.mark.parametrize("change", [True, False])
def test_all_or_no_dims_change(make, change):
    encoder = make(3, 2, 2)
    encoder.update_statistics(*transitions(20, [change] * 3))
    latent, context = encoder.encode(torch.randn(5, 3))
    constant, moving = (context, latent) if change else (latent, context)
    torch.testing.assert_close(constant, constant[:1].expand(5, 2))
    assert (moving.std(0) > 1e-3).all()


@both
def test_without_context_every_dim_feeds_the_latent(make):
    encoder = make(3, 1, 0)
    encoder.update_statistics(*transitions(20, [True, False, True]))
    observation = torch.randn(5, 3, requires_grad=True)
    latent, context = encoder.encode(observation)
    latent.square().sum().backward()
    assert (observation.grad != 0).all() and context.shape == (5, 0)


@both
@given(seed=st.integers(0, 1000), garbage=st.sampled_from([NAN, INF, 1e30]))
def test_garbage_at_masked_transitions_changes_nothing(make, seed, garbage):
    torch.manual_seed(seed)
    mask = torch.rand(4, 5) < 0.6
    mask[0, 0] = True
    now, later = (x.reshape(4, 5, 3) for x in transitions(20, [True, False, False]))
    masked, only = make(3, 1, 1), make(3, 1, 1)
    bad = torch.where(mask[..., None], now, garbage)
    worse = torch.where(mask[..., None], later, -garbage)
    masked.update_statistics(bad, worse, mask)
    only.update_statistics(now[mask], later[mask])
    torch.testing.assert_close(buffers_of(masked), buffers_of(only))


@both
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("first", [True, False])
def test_a_non_finite_batch_changes_nothing(make, bad, which, first):
    encoder = make(3, 1, 1)
    if not first:
        encoder.update_statistics(*transitions(20, [True, False, False]))
    before = buffers_of(encoder)
    batch = transitions(20, [True, True, True])
    batch[which][7, 1] = bad
    encoder.update_statistics(*batch)
    assert_unchanged(encoder, before)


@both
@pytest.mark.parametrize("n", [0, 4])
def test_a_batch_without_real_transitions_changes_nothing(make, n):
    encoder = make(3, 1, 1)
    before = buffers_of(encoder)
    encoder.update_statistics(*transitions(n, [True, True, True]), torch.zeros(n).bool())
    assert_unchanged(encoder, before)


@both
def test_freeze_after(make):
    encoder, free = make(2, 1, 1, freeze_after=2), make(2, 1, 1)
    for i in range(4):
        before = buffers_of(encoder.moments)
        now, later = transitions(20, [True, i == 3])
        bad = now.clone()
        bad[0, 0] = NAN  # is no update
        for x in (encoder, free):
            x.update_statistics(bad, later)
            x.update_statistics(now + i, later + i)
        if i < 2:
            torch.testing.assert_close(buffers_of(encoder), buffers_of(free), rtol=0, atol=0)
        else:
            assert_unchanged(encoder.moments, before)
    assert encoder.changes.all(), "dims are seen to change after the freeze too"
    assert (free.moments.mean - encoder.moments.mean).min() > 0.5


def test_statistics_move_only_when_asked_to():
    encoder, observation = LinearEncoder(3, 2, 1), torch.randn(5, 3)
    before = buffers_of(encoder)
    encoder.train().encode(observation)
    encoder(TensorDict(observation=observation, batch_size=[5]))
    assert_unchanged(encoder, before)


def test_observations_given_are_not_changed():
    now, later = transitions(5, [True, True, False])
    copies = now.clone(), later.clone()
    LinearEncoder(3, 2, 1).update_statistics(now, later, torch.ones(5).bool())
    assert torch.equal(now, copies[0]) and torch.equal(later, copies[1])


# --- gradients


@both
def test_gradients(make):
    encoder = make(3, 2, 2)
    now, later = transitions(20, [True, True, False])
    now.requires_grad_()
    encoder.update_statistics(now, later)
    assert not any(x.requires_grad for x in encoder.buffers())
    latent, context = encoder.encode(now)
    latent.square().sum().backward(retain_graph=True)
    grads = {name: x.grad for name, x in encoder.named_parameters()}
    assert all((x is not None) == name.startswith("latent_net") for name, x in grads.items())
    assert (now.grad[:, :2] != 0).all() and (now.grad[:, 2] == 0).all()
    encoder.zero_grad()
    context.square().sum().backward()
    grads = {name: x.grad for name, x in encoder.named_parameters()}
    assert all((x is not None) == name.startswith("context_net") for name, x in grads.items())


@both
def test_statistics_may_move_between_forward_and_backward(make):
    """The loss takes the batch in after it was encoded."""
    grads = []
    for move in (False, True):
        torch.manual_seed(0)
        encoder = make(3, 2, 2)
        now, later = transitions(20, [True, True, False])
        encoder.update_statistics(now, later)
        latent, context = encoder.encode(now)
        if move:
            encoder.update_statistics(now + 1, later.flip(0))
        (latent.square().sum() + context.square().sum()).backward()
        grads.append([x.grad for x in encoder.parameters()])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


# --- errors


@both
@pytest.mark.parametrize(("d", "c"), [(0, 0), (-1, 0), (1, -1)])
def test_dims_out_of_range(make, d, c):
    with pytest.raises(ValueError, match=f"Encoder: .*_dim must be at least ., got {min(d, c)}"):
        make(5, d, c)


@both
@pytest.mark.parametrize(
    "options", [{"standardize": "cuda"}, {"standardize": 1}, {"freeze_after": 2.5}], ids=str
)
def test_options_of_the_wrong_kind(make, options):
    with pytest.raises(TypeError, match=rf"Encoder: {next(iter(options))} must be .* got"):
        make(3, 1, 1, **options)


@pytest.mark.parametrize("part", ["latent", "context"])
def test_a_network_of_the_wrong_size_is_not_broadcast(part):
    def make_net(size, dim):
        return nn.Linear(size, 1 if dim == {"latent": 2, "context": 3}[part] else dim)

    encoder = LearnedEncoder(4, 2, 3, make_net)
    size = {"latent": 2, "context": 3}[part]
    message = rf"LearnedEncoder: {part} must have shape \[5, {size}\], got \[5, 1\]"
    with pytest.raises(ValueError, match=message):
        encoder.encode(torch.zeros(5, 4))


def test_a_plain_function_as_a_network_is_not_left_unlearned():
    with pytest.raises(TypeError, match=r"make_net must return an nn\.Module, got function"):
        LearnedEncoder(4, 2, 0, lambda size, dim: lambda x: x[..., :dim])


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_after": 0}, "Encoder: freeze_after must be at least 1, got 0"),
        ({"freeze_after": -3}, "freeze_after must be at least 1, got -3"),
        (
            {"freeze_after": 3, "standardize": False},
            "freeze_after needs standardize=True, got 3 and False",
        ),
    ],
)
def test_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(3, 1, 1, **options)


@both
@pytest.mark.parametrize(
    ("now", "later", "mask", "message"),
    [
        ((5, 2), (5, 2), None, r"^observation: expected shape \[..., 3\], got \[5, 2\]"),
        ((5, 3), (5, 1), None, r"next_observation: expected shape \[..., 3\], got \[5, 1\]"),
        ((5, 3), (1, 3), None, r"next_observation: expected shape \[5, 3\], got \[1, 3\]"),
        ((5, 3), (5, 3), (5, 1), r"mask: expected shape \[5\], got \[5, 1\]"),
        ((5, 3), (5, 3), (1,), r"mask: expected shape \[5\], got \[1\]"),
    ],
)
def test_no_broadcasting(make, now, later, mask, message):
    encoder = make(3, 1, 1)
    before = buffers_of(encoder)
    with pytest.raises(ValueError, match=message):
        encoder.update_statistics(
            torch.zeros(now), torch.ones(later), None if mask is None else torch.ones(mask).bool()
        )
    assert_unchanged(encoder, before)


# --- state


@both
def test_state_dict_round_trip(make):
    encoder, other = make(3, 2, 1), make(3, 2, 1)
    encoder.update_statistics(*transitions(20, [True, True, False]))
    other.load_state_dict(encoder.state_dict())
    observation = torch.randn(5, 3)
    for twin in (other, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        torch.testing.assert_close(
            twin.encode(observation), encoder.encode(observation), rtol=0, atol=0
        )
        torch.testing.assert_close(buffers_of(twin), buffers_of(encoder), rtol=0, atol=0)
    pointers = [x.data_ptr() for x in encoder.state_dict().values()]
    assert len(pointers) == len(set(pointers)), "nothing is in the state twice"


@both
@pytest.mark.parametrize("freeze_after", [None, 1])
def test_compiles_without_graph_break(make, freeze_after):
    encoder = make(3, 2, 1, freeze_after=freeze_after)
    twin = copy.deepcopy(encoder)

    def step(observation, next_observation, mask):
        encoder.update_statistics(observation, next_observation, mask)
        return encoder.encode(observation)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    mask = torch.tensor([True] * 4 + [False])
    for _ in range(2):
        now, later = transitions(5, [True, False, False])
        got = compiled(now, later, mask)
        twin.update_statistics(now, later, mask)
        torch.testing.assert_close(got, twin.encode(now))
        torch.testing.assert_close(buffers_of(encoder), buffers_of(twin))


def test_an_encoder_of_your_own_with_statistics():
    class Counting(Encoder):
        def __init__(self):
            super().__init__(3, 3, 0)
            self.register_buffer("count", torch.zeros(()))

        def update_statistics(self, observation, next_observation, mask=None):
            self.count.add_(1)

        def embed(self, observation):
            return observation, observation[..., :0]

    assert Counting().has_statistics
