"""SelectEncoder: which dims go where, decoding, nested keys, errors."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import Bounded

from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import Encoder, ProbabilisticEnsemble, SelectEncoder

_ACTION = Bounded(-1.0, 1.0, (2,))


@st.composite
def splits(draw):
    """A size and two lists that together hold every dim once or, in both, twice."""
    size = draw(st.integers(1, 8))
    every = draw(st.permutations(range(size)))
    n_latent = draw(st.integers(1, size))
    again = draw(st.sets(st.sampled_from(every[:n_latent])))
    return size, every[:n_latent], [*every[n_latent:], *again]


# --- contract


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("obs_shape", [6, (6,), (2, 3)])
def test_picks_dims_in_order(obs_shape, batch):
    encoder = SelectEncoder(obs_shape, [5, 0, 2], [3])
    observation = torch.randn(*batch, *encoder.obs_shape)
    latent, context = encoder.encode(observation)
    flat = observation.reshape(*batch, 6)
    assert latent.shape == (*batch, 3) and context.shape == (*batch, 1)
    assert torch.equal(latent, torch.stack([flat[..., 5], flat[..., 0], flat[..., 2]], -1))
    assert torch.equal(context, flat[..., 3:4])


def test_sizes_and_dims():
    encoder = SelectEncoder((2, 3), range(4), np.array([4, 5]))
    assert isinstance(encoder, Encoder)
    assert (encoder.latent_state_dim, encoder.context_dim) == (4, 2)
    assert encoder.latent_state_dims == (0, 1, 2, 3) and encoder.context_dims == (4, 5)


def test_no_context():
    latent, context = SelectEncoder(3, [1], []).encode(torch.tensor([[1.0, 2.0, 3.0]]))
    assert latent.tolist() == [[2.0]] and context.shape == (1, 0)


def test_float64_is_cast():
    latent, context = SelectEncoder(3, [0], [2]).encode(torch.ones(2, 3, dtype=torch.float64))
    assert latent.dtype == context.dtype == torch.float32


# --- decoding


@given(splits())
def test_decoding_puts_back_what_was_picked(split):
    encoder = SelectEncoder(*split)
    observation = torch.randn(2, 3, split[0])
    assert encoder.can_decode
    assert torch.equal(encoder.decode(*encoder.encode(observation)), observation)


def test_decoding_keeps_the_shape():
    encoder = SelectEncoder((2, 3), [5, 1, 3], [0, 4, 2])
    observation = torch.randn(7, 2, 3)
    assert torch.equal(encoder.decode(*encoder.encode(observation)), observation)
    assert encoder.decode(torch.zeros(3), torch.zeros(3)).shape == (2, 3)


def test_a_dim_picked_twice_is_decoded_from_the_latent_state():
    decoded = SelectEncoder(2, [1], [1, 0]).decode(torch.tensor([5.0]), torch.tensor([6.0, 7.0]))
    assert decoded.tolist() == [7.0, 5.0]


def test_nothing_is_invented_for_dims_not_picked():
    encoder = SelectEncoder(5, [0, 3], [1])
    assert not encoder.can_decode
    with pytest.raises(NotImplementedError, match=r"cannot decode: the dims \[2, 4\]"):
        encoder.decode(torch.zeros(2), torch.zeros(1))


@pytest.mark.parametrize("context_dims", [[0], []])
def test_imagined_env_has_observations_where_all_dims_are_picked(context_dims):
    encoder = SelectEncoder(3, [2, 1], context_dims)
    env = PredictorEnv(encoder, ProbabilisticEnsemble(2, len(context_dims), 2), None, _ACTION)
    assert ("observation" in env.observation_spec.keys()) == encoder.can_decode
    if encoder.can_decode:
        start = env.initial_state(TensorDict(observation=torch.randn(4, 3), batch_size=[4]))
        out = env.imagine(start, torch.zeros(4, 2, 2))
        first, later = out["observation"][:, 0], out["next", "observation"]
        assert torch.equal(later[..., 0], first[:, None, 0].expand(4, 2))  # the context stays
        assert torch.equal(later[..., [2, 1]], out["next", "latent"][..., 0, 0, :])


# --- gradients


def test_gradient_reaches_the_picked_dims():
    observation = torch.randn(2, 3, requires_grad=True)
    SelectEncoder(3, [2], [0]).encode(observation)[0].sum().backward()
    assert observation.grad.tolist() == [[0, 0, 1]] * 2
    assert not list(SelectEncoder(3, [2], [0]).parameters())


# --- errors


@pytest.mark.parametrize(
    ("latent", "context", "error", "message"),
    [
        ([0, 4], [], ValueError, r"latent_state_dims must be in \[0, 4\).*\[2, 2\], got \[4\]"),
        ([0], [1, 9, 7], ValueError, r"context_dims must be in \[0, 4\).*got \[9, 7\]"),
        ([-1], [0], ValueError, r"latent_state_dims must be in.*got \[-1\]"),
        ([0, 1, 0], [], ValueError, r"latent_state_dims must not have duplicates, got \[0\]"),
        ([0], [2, 1, 2], ValueError, r"context_dims must not have duplicates, got \[2\]"),
        ([], [0], ValueError, "SelectEncoder: latent_state_dim must be at least 1"),
        ([0.5], [], TypeError, r"latent_state_dims must be integers, got \[0.5\]"),
        ([0], 3, TypeError, "context_dims must be integers, got 3"),
        ([True, False], [], TypeError, r"latent_state_dims .* got the mask \[1, 0\]"),
        ([0], torch.tensor([True]), TypeError, r"context_dims .* got the mask \[1\]"),
    ],
)
def test_dims_that_there_are_not(latent, context, error, message):
    with pytest.raises(error, match=message):
        SelectEncoder((2, 2), latent, context)


@pytest.mark.parametrize(
    ("latent", "context", "message"),
    [
        ((4, 1), (4, 2), r"latent: expected shape \[4, 2\], got \[4, 1\]"),
        ((4, 2), (4, 1), r"context: expected shape \[4, 2\], got \[4, 1\]"),
        ((4, 2), (1, 2), r"context: expected shape \[4, 2\], got \[1, 2\]"),
    ],
)
def test_decoding_shapes_that_do_not_fit(latent, context, message):
    with pytest.raises(ValueError, match=message):
        SelectEncoder(4, [0, 1], [2, 3]).decode(torch.zeros(latent), torch.zeros(context))


# --- state


def test_nested_keys():
    encoder = SelectEncoder(3, [1], [2], in_keys=[("o", "x")], out_keys=[("m", "z"), ("m", "c")])
    data = encoder(TensorDict({("o", "x"): torch.tensor([[1.0, 2.0, 3.0]])}, batch_size=[1]))
    assert data["m", "z"].tolist() == [[2.0]] and data["m", "c"].tolist() == [[3.0]]


def test_state_is_in_the_constructor_only():
    encoder = SelectEncoder(3, [1], [2])
    assert not encoder.state_dict()
    observation = torch.randn(2, 3)
    torch.testing.assert_close(
        copy.deepcopy(encoder).encode(observation), encoder.encode(observation)
    )


def test_compiles_without_graph_breaks():
    encoder = SelectEncoder(4, [3, 1], [0, 2])
    observation = torch.randn(5, 4)
    latent, context = torch.compile(encoder.encode, fullgraph=True, backend="eager")(observation)
    decode = torch.compile(encoder.decode, fullgraph=True, backend="eager")
    assert torch.equal(decode(latent, context), observation)


@pytest.mark.gpu
def test_follows_to():
    encoder = SelectEncoder(4, [3, 1], [0, 2]).to("cuda")
    observation = torch.randn(5, 4, device="cuda")
    assert torch.equal(encoder.decode(*encoder.encode(observation)), observation)
