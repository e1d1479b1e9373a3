"""MLPEncoder: the perceptrons. The rest is in test_learned_encoder."""

import pytest
import torch
from torch import nn

from layeredrl_trl.modules import MLPEncoder


def encoder_after(changing: list[bool], d: int = 2, c: int = 2, **options) -> MLPEncoder:
    encoder = MLPEncoder(len(changing), d, c, **options)
    now = torch.randn(50, len(changing))
    encoder.update_statistics(now, now + torch.tensor(changing))
    return encoder


@pytest.mark.parametrize("standardize", [True, False])
def test_values(standardize):
    encoder = encoder_after([True, False, True], hidden_sizes=(8, 7), standardize=standardize)
    observation = torch.randn(5, 3)
    x = observation
    if standardize:
        x = (x - encoder.moments.mean) / encoder.moments.var.sqrt()
    for got, net, there in zip(
        encoder.encode(observation),
        (encoder.latent_net, encoder.context_net),
        ([1.0, 0.0, 1.0], [0.0, 1.0, 0.0]),
        strict=True,
    ):
        h = x * torch.tensor(there)
        (w0, b0), (w1, b1), (w2, b2) = ((m.weight, m.bias) for m in net.layers[::2])
        for w, b in ((w0, b0), (w1, b1)):
            h = nn.functional.silu(h @ w.T + b)
        torch.testing.assert_close(got, h @ w2.T + b2)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_float64_observations(batch):
    encoder = encoder_after([True, True, False])
    observation = torch.randn(*batch, 3, dtype=torch.float64)
    latent, context = encoder.encode(observation)
    assert latent.dtype == context.dtype == torch.float32
    torch.testing.assert_close((latent, context), encoder.encode(observation.float()))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_hidden_sizes_and_activation(activation):
    encoder = MLPEncoder(5, 3, 2, hidden_sizes=(8, 7), activation=activation)
    for net, out in ((encoder.latent_net, 3), (encoder.context_net, 2)):
        sizes = [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)]
        assert sizes == [(5, 8), (8, 7), (7, out)]
        assert sum(isinstance(m, activation) for m in net.modules()) == 2


def test_no_hidden_layer_is_an_affine_map():
    encoder = encoder_after([True, True, True], hidden_sizes=(), standardize=False)
    x, y = torch.randn(2, 4, 3)
    middle = encoder.encode((x + y) / 2)[0]
    torch.testing.assert_close(middle, (encoder.encode(x)[0] + encoder.encode(y)[0]) / 2)


def test_where_all_dims_change_the_context_is_that_of_0():
    encoder = encoder_after([True, True, True], hidden_sizes=(8,))
    context = encoder.encode(torch.randn(5, 3))[1]
    torch.testing.assert_close(context, encoder.context_net(torch.zeros(5, 3)))


def test_gradient_reaches_every_parameter():
    encoder = encoder_after([True, False, True], hidden_sizes=(8,))
    latent, context = encoder.encode(torch.randn(5, 3))
    (latent.square().sum() + context.square().sum()).backward()
    assert all((x.grad != 0).any() for x in encoder.parameters())
