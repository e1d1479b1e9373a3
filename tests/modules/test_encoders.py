"""Encoders: shapes, casts, decoding, nested keys, errors."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from layeredrl_trl.modules import Encoder, IdentityEncoder


class FirstDims(Encoder):
    """Lossy: the first dims are the latent state, the next ones the context."""

    def _encode(self, observation):
        d, c = self.latent_state_dim, self.context_dim
        return observation[..., :d], observation[..., d : d + c]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("obs_shape", [3, (3,), (2, 4), ()])
def test_identity(obs_shape, batch):
    encoder = IdentityEncoder(obs_shape)
    observation = torch.randn(torch.Size(batch) + encoder.obs_shape)
    latent, context = encoder.encode(observation)
    assert latent.shape == (*batch, encoder.latent_state_dim) and context.shape == (*batch, 0)
    assert encoder.latent_state_dim == encoder.obs_shape.numel() and encoder.context_dim == 0
    assert encoder.can_decode
    assert torch.equal(encoder.decode(latent, context), observation)


def test_call_writes_latent_and_context():
    data = TensorDict(observation=torch.randn(2, 3), batch_size=[2])
    IdentityEncoder(3)(data)
    assert torch.equal(data["latent"], data["observation"]) and data["context"].shape == (2, 0)


def test_call_with_tensors():
    latent, context = IdentityEncoder(3)(torch.ones(2, 3))
    assert torch.equal(latent, torch.ones(2, 3)) and context.shape == (2, 0)
    latent, _ = IdentityEncoder(3)(observation=torch.ones(2, 3))
    assert torch.equal(latent, torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.bool])
def test_observations_are_cast(dtype):
    observation = torch.ones(2, 3, dtype=dtype)
    latent, context = IdentityEncoder(3).encode(observation)
    assert latent.dtype == context.dtype == torch.float32
    assert observation.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.long])
def test_an_encoder_of_your_own_in_another_precision_gives_float32(dtype):
    class Other(FirstDims):
        def _encode(self, observation):
            return tuple(x.to(dtype) for x in super()._encode(observation))

    latent, context = Other(3, 2, 1).encode(torch.ones(2, 3))
    assert latent.dtype == context.dtype == torch.float32


def test_nested_keys():
    encoder = IdentityEncoder(3, in_keys=[("obs", "x")], out_keys=[("model", "z"), ("model", "c")])
    data = encoder(TensorDict({("obs", "x"): torch.ones(2, 3)}, batch_size=[2]))
    assert data["model", "z"].shape == (2, 3) and data["model", "c"].shape == (2, 0)


def test_an_encoder_of_your_own():
    encoder = FirstDims(5, latent_state_dim=2, context_dim=1)
    observation = torch.arange(5.0).expand(4, 5)
    latent, context = encoder.encode(observation)
    assert latent[0].tolist() == [0, 1] and context[0].tolist() == [2]
    assert not encoder.can_decode
    with pytest.raises(NotImplementedError, match="FirstDims cannot decode"):
        encoder.decode(latent, context)


def test_gradient_reaches_the_observation():
    observation = torch.randn(2, 3, requires_grad=True)
    IdentityEncoder(3).encode(observation)[0].sum().backward()
    assert (observation.grad == 1).all()


@pytest.mark.parametrize(
    ("obs_shape", "given", "message"),
    [
        (3, (5, 1), r"observation: expected shape \[..., 3\], got \[5, 1\]"),
        (3, (), r"observation: expected shape \[..., 3\], got \[\]"),
        ((2, 4), (4,), r"observation: expected shape \[..., 2, 4\], got \[4\]"),
        ((2, 4), (5, 4, 2), r"expected shape \[..., 2, 4\], got \[5, 4, 2\]"),
    ],
)
def test_shape_that_does_not_fit(obs_shape, given, message):
    with pytest.raises(ValueError, match=message):
        IdentityEncoder(obs_shape).encode(torch.zeros(given))


def test_missing_observation_names_what_there_is():
    with pytest.raises(KeyError, match=r"\"observation\" not found .*pixels"):
        IdentityEncoder(3)(TensorDict(pixels=torch.zeros(2, 3), batch_size=[2]))


@pytest.mark.parametrize(("latent", "context"), [(0, 0), (-1, 0), (1, -1)])
def test_dims_out_of_range(latent, context):
    number = min(latent, context)
    with pytest.raises(ValueError, match=f"FirstDims: .*_dim must be at least ., got {number}"):
        FirstDims(5, latent, context)


@pytest.mark.parametrize("number", [2.0, True, float("nan"), "2", None])
@pytest.mark.parametrize("name", ["latent_state_dim", "context_dim"])
def test_a_number_of_dims_that_is_no_integer(name, number):
    dims = {"latent_state_dim": 1, "context_dim": 1, name: number}
    with pytest.raises(TypeError, match=f"FirstDims: {name} must be an integer, got {number!r}"):
        FirstDims(5, **dims)


@pytest.mark.parametrize("shape", [2.0, True, "3", (3.0,), None])
def test_a_shape_that_is_none(shape):
    with pytest.raises(TypeError, match="obs_shape"):
        IdentityEncoder(shape)


def test_a_shape_of_numpy_integers():
    encoder = IdentityEncoder(np.int64(3))
    assert encoder.obs_shape == (3,) and type(encoder.latent_state_dim) is int


@pytest.mark.parametrize(
    ("keys", "error", "text"),
    [
        ({"in_keys": "x"}, TypeError, r"in_keys must be a sequence of keys, as in \['x'\]"),
        ({"out_keys": "zc"}, TypeError, r"out_keys must be a sequence of keys, as in \['zc'\]"),
        ({"in_keys": ["x", "y"]}, ValueError, r"in_keys must hold 1 key\(s\), got 2"),
        ({"out_keys": ["z"]}, ValueError, r"out_keys must hold 2 key\(s\), got 1"),
        ({"out_keys": ["z", 3]}, TypeError, r"out_keys\[1\] must be a string or a tuple"),
    ],
)
def test_keys_that_are_a_string_are_not_split_into_letters(keys, error, text):
    with pytest.raises(error, match=f"Encoder: {text}"):
        IdentityEncoder(3, **keys)


@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
@pytest.mark.parametrize("part", ["latent", "context"])
@pytest.mark.parametrize("change", ["size", "no-last-dim", "no-batch"])
def test_what_an_encoder_of_your_own_returns_is_not_broadcast(part, batch, change):
    class Wrong(FirstDims):
        def _encode(self, observation):
            out = dict(zip(("latent", "context"), super()._encode(observation), strict=True))
            x = out[part]
            out[part] = {"size": x[..., :1], "no-last-dim": x[..., 0], "no-batch": x.sum(0)}[change]
            return out["latent"], out["context"]

    expected = ", ".join(map(str, (*batch, 2)))
    with pytest.raises(ValueError, match=rf"Wrong: {part} must have shape \[{expected}\], got"):
        Wrong(5, 2, 2).encode(torch.randn(*batch, 5))


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (torch.zeros(4, 2), r"Wrong._encode must return \(latent, context\), got tensor"),
        ((torch.zeros(4, 2), None), r"Wrong: context must be a tensor of shape \[4, 1\], got None"),
    ],
)
def test_an_encoder_of_your_own_that_returns_no_pair_of_tensors(returned, text):
    class Wrong(FirstDims):
        def _encode(self, observation):
            return returned

    with pytest.raises(TypeError, match=text):
        Wrong(5, 2, 1).encode(torch.zeros(4, 5))
