"""LinearEncoder: the linear maps. The rest is in test_learned_encoder."""

import pytest
import torch

from layeredrl_trl.modules import LinearEncoder


def encoder_after(changing: list[bool], d: int = 2, c: int = 2, **options) -> LinearEncoder:
    encoder = LinearEncoder(len(changing), d, c, **options)
    now = torch.randn(50, len(changing))
    encoder.update_statistics(now, now + torch.tensor(changing))
    return encoder


@pytest.mark.parametrize("standardize", [True, False])
def test_values(standardize):
    """Against matrices with the columns of the other dims struck out."""
    encoder = encoder_after([True, False, True], standardize=standardize)
    observation = torch.randn(5, 3)
    latent, context = encoder.encode(observation)
    x = observation
    if standardize:
        x = (x - encoder.moments.mean) / encoder.moments.var.sqrt()
    a, b = encoder.latent_net.weight, encoder.context_net.weight
    torch.testing.assert_close(latent, x[:, [0, 2]] @ a[:, [0, 2]].T)
    torch.testing.assert_close(context, x[:, [1]] @ b[:, [1]].T)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_a_change_of_the_observation_maps_to_a_change_of_the_latent(batch):
    """Whatever the observation: that is what makes it linear."""
    encoder = encoder_after([True, True, False])
    x, y, delta = torch.randn(3, *batch, 3)
    change_x = encoder.encode(x + delta)[0] - encoder.encode(x)[0]
    change_y = encoder.encode(y + delta)[0] - encoder.encode(y)[0]
    torch.testing.assert_close(change_x, change_y, rtol=1e-4, atol=1e-5)


def test_float64_observations():
    encoder = encoder_after([True, True, False])
    observation = torch.randn(5, 3, dtype=torch.float64)
    latent, context = encoder.encode(observation)
    assert latent.dtype == context.dtype == torch.float32
    torch.testing.assert_close((latent, context), encoder.encode(observation.float()))


def test_weights_of_the_other_dims_get_no_gradient():
    encoder = encoder_after([True, False, True])
    latent, context = encoder.encode(torch.randn(5, 3))
    (latent.sum() + context.sum()).backward()
    assert ((encoder.latent_net.weight.grad != 0) == torch.tensor([True, False, True])).all()
    assert ((encoder.context_net.weight.grad != 0) == torch.tensor([False, True, False])).all()


def test_parameters_are_two_matrices():
    shapes = {name: tuple(x.shape) for name, x in LinearEncoder(5, 3, 2).named_parameters()}
    assert shapes == {"latent_net.weight": (3, 5), "context_net.weight": (2, 5)}
    assert len(list(LinearEncoder(5, 3, 0).parameters())) == 1
