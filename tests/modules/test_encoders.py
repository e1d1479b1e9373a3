"""Encoders: shapes, casts, decoding, nested keys, errors."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from layeredrl_trl.modules import Encoder, IdentityEncoder, LinearEncoder, SelectEncoder

ANY_BATCH = [(), (3,), (2, 3), (2, 3, 4, 1), (0,)]


class FirstDims(Encoder):
    """Lossy: the first dims are the latent state, the next ones the context."""

    def embed(self, observation):
        d, c = self.latent_state_dim, self.context_dim
        return observation[..., :d], observation[..., d : d + c]


class Images(Encoder):
    """Seen by a convolution, which takes one batch dim."""

    def __init__(self):
        super().__init__((3, 4, 4), 2, 0, in_keys=["pixels"])
        self.net = nn.Sequential(nn.Conv2d(3, 5, 2, stride=2), nn.Flatten(), nn.Linear(20, 2))

    def embed(self, observation):
        latent = self.map_batch(self.net, observation / 255)
        return latent, latent[..., :0]


class Flattened(Encoder):
    """Written before there was `embed`."""

    def __init__(self, obs_shape=(2, 4)):
        super().__init__(obs_shape, 1, 8)

    def _encode(self, observation):
        assert observation.shape[-1] == 8 and observation.dtype == torch.float32
        return observation.sum(-1, keepdim=True), 2 * observation


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
        def embed(self, observation):
            return tuple(x.to(dtype) for x in super().embed(observation))

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


@pytest.mark.parametrize("batch", ANY_BATCH)
def test_an_encoder_of_your_own_got_flattened_observations(batch):
    seen = []

    class Noting(Encoder):
        def embed(self, observation):
            seen.append(observation)
            return observation.sum((-2, -1)).unsqueeze(-1), observation[..., 0, :]

    observation = torch.randint(9, (*batch, 2, 4), dtype=torch.uint8)
    latent, context = Noting((2, 4), 1, 4).encode(observation)
    assert seen[0].shape == (*batch, 2, 4) and seen[0].dtype == torch.float32
    assert torch.equal(latent.squeeze(-1), observation.float().sum((-2, -1)))
    assert torch.equal(context, observation[..., 0, :].float())


@pytest.mark.parametrize("batch", ANY_BATCH)
def test_a_convolution_sees_each_image_whatever_the_batch_dims(batch):
    encoder, images = Images(), torch.randint(256, (*batch, 3, 4, 4), dtype=torch.uint8)
    latent, context = encoder.encode(images)
    assert latent.shape == (*batch, 2) and context.shape == (*batch, 0)
    one_by_one = [encoder.encode(image)[0] for image in images.reshape(-1, 3, 4, 4)]
    expected = torch.stack(one_by_one) if one_by_one else torch.empty(0, 2)
    torch.testing.assert_close(latent.reshape(-1, 2), expected)
    latent.sum().backward()
    assert all((p.grad != 0).any() == bool(one_by_one) for p in encoder.parameters())


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_an_encoder_of_before_still_works(batch):
    observation = torch.randn(*batch, 2, 4, dtype=torch.float64)
    data = Flattened()(TensorDict(observation=observation, batch_size=batch))
    flat = observation.float().flatten(-2)
    assert torch.equal(data["latent"], flat.sum(-1, keepdim=True))
    assert torch.equal(data["context"], 2 * flat)


class HalvingMixin:
    def _encode(self, observation):
        return observation / 2, observation[..., :0]


@pytest.mark.parametrize("is_mixin", [False, True], ids=["itself", "mixin"])
@pytest.mark.parametrize(
    ("base", "args"),
    [(IdentityEncoder, ()), (SelectEncoder, (range(4), ())), (LinearEncoder, (4, 0))],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_subclass_of_before_was_overruled_by_the_embed_of_its_base(base, args, is_mixin):
    bases = (HalvingMixin, base) if is_mixin else (base,)
    body = {} if is_mixin else {"_encode": HalvingMixin._encode}
    encoder = type("Halving", bases, body)((2, 2), *args)
    further = type("Further", (type(encoder),), {})((2, 2), *args)
    observation = torch.randn(5, 2, 2)
    for each in (encoder, further):
        assert torch.equal(each.encode(observation)[0], observation.flatten(-2) / 2)


def test_the_last_of_embed_and_encode_counts():
    class Newer(Flattened):
        def embed(self, observation):
            latent, context = super().embed(observation)
            return -latent, context

    class Newest(Newer):
        pass

    old, _ = Flattened().encode(torch.ones(2, 4))
    assert torch.equal(Newest().encode(torch.ones(2, 4))[0], -old)


def test_an_embed_of_your_own_may_have_a_helper_of_the_old_name():
    class Template(Encoder):
        def embed(self, observation):
            assert observation.shape[-2:] == (2, 4)
            return self._encode(observation), observation.new_zeros(*observation.shape[:-2], 0)

    class Filled(Template):
        def _encode(self, observation):
            return observation[..., 0, :1]

    latent, _ = Filled((2, 4), 1, 0).encode(torch.ones(3, 2, 4))
    assert latent.shape == (3, 1)


def test_an_encoder_that_overrides_encode():
    class Whole(Encoder):
        def encode(self, observation):
            return observation[..., :1], observation[..., 1:]

    data = Whole(3, 1, 2)(TensorDict(observation=torch.ones(4, 3), batch_size=[4]))
    assert data["latent"].shape == (4, 1) and data["context"].shape == (4, 2)
    with pytest.raises(NotImplementedError, match=r"Whole does not define embed\(self, observatio"):
        Whole(3, 1, 2).embed(torch.ones(4, 3))


@pytest.mark.parametrize("make", [Images, Flattened])
def test_an_encoder_of_your_own_compiles_without_graph_break(make):
    encoder = make()
    observation = torch.randn(2, 5, *encoder.obs_shape)
    compiled = torch.compile(encoder.encode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(observation), encoder.encode(observation))


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


def test_an_encoder_that_brings_nothing_is_refused_at_once():
    class Nothing(Encoder):
        def update_statistics(self, observation, next_observation, mask=None): ...

    text = r"must define embed\(self, observation\), which returns \(latent, context\)"
    with pytest.raises(TypeError, match=f"Nothing {text}"):
        Nothing(3, 1, 0)
    with pytest.raises(TypeError, match=f"Encoder {text}"):
        Encoder(3, 1, 0)


@pytest.mark.parametrize("name", ["embed", "encode", "decode", "map_batch"])
def test_a_submodule_of_the_name_of_a_method_called_itself_for_ever(name):
    class Hidden(Flattened):
        def __init__(self):
            super().__init__()
            setattr(self, name, nn.Linear(8, 1))

    with pytest.raises(TypeError, match=f"Hidden: a submodule cannot be named '{name}'"):
        Hidden()


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
        def embed(self, observation):
            out = dict(zip(("latent", "context"), super().embed(observation), strict=True))
            x = out[part]
            out[part] = {"size": x[..., :1], "no-last-dim": x[..., 0], "no-batch": x.sum(0)}[change]
            return out["latent"], out["context"]

    expected = ", ".join(map(str, (*batch, 2)))
    with pytest.raises(ValueError, match=rf"Wrong: {part} must have shape \[{expected}\], got"):
        Wrong(5, 2, 2).encode(torch.randn(*batch, 5))


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (torch.zeros(4, 2), r"Wrong.embed must return \(latent, context\), got tensor"),
        ((torch.zeros(4, 2), None), r"Wrong: context must be a tensor of shape \[4, 1\], got None"),
    ],
)
def test_an_encoder_of_your_own_that_returns_no_pair_of_tensors(returned, text):
    class Wrong(FirstDims):
        def embed(self, observation):
            return returned

    with pytest.raises(TypeError, match=text):
        Wrong(5, 2, 1).encode(torch.zeros(4, 5))


def test_an_encoder_of_before_that_returns_no_pair_is_told_which_method():
    class Wrong(Encoder):
        def _encode(self, observation):
            return observation

    with pytest.raises(TypeError, match=r"Wrong._encode must return \(latent, context\), got"):
        Wrong(5, 5, 0).encode(torch.zeros(4, 5))
