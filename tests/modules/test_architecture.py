"""What tells two networks of an ensemble apart, and what does not."""

import copy

import pytest
import torch
from torch import nn

from layeredrl_trl.modules import ProbabilisticEnsemble, StackedNetworks
from layeredrl_trl.modules.architecture import differences, tensors_of


def first(one, other):
    return next(differences(one, other), None)


def local(size: int = 4, scale: float = 1.0, base: type = nn.Module) -> nn.Module:
    """A network whose class every call defines anew."""

    class Net(base):
        wide = True

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, size), nn.Tanh(), nn.Linear(size, 2))

        def forward(self, x):
            return scale * self.layers(x)

    return Net()


def test_a_class_defined_in_the_factory_was_refused():
    assert first(local(), local()) is None
    stack, x = StackedNetworks(3, local), torch.randn(3, 5, 3)
    layer = stack.network.layers
    hidden = torch.tanh(x @ layer[0].weight.mT + layer[0].bias.unsqueeze(1))
    torch.testing.assert_close(stack(x), hidden @ layer[2].weight.mT + layer[2].bias.unsqueeze(1))
    model = ProbabilisticEnsemble(3, 0, 1, n_models=2, network=lambda i, o: nn.Linear(i, o))
    assert (
        model.predict(torch.zeros(4, 3), torch.zeros(4, 0), torch.zeros(4, 1))[0].isfinite().all()
    )


def lambdas() -> nn.Module:
    class Net(nn.Linear):
        act = lambda self, x: x.tanh()  # noqa: E731

        def forward(self, x, scale=2.0, *, shift=1):
            return self.act(scale * super().forward(x)) + shift

    return Net(3, 2)


def test_methods_are_compared_with_their_defaults():
    assert first(lambdas(), lambdas()) is None


class Derived(nn.Module):
    pass


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (local(scale=1.0), local(scale=2.0)),
        (local(), local(base=Derived)),
    ],
)
def test_classes_of_one_name_that_do_not_do_the_same(one, other):
    text = "every call of make_network makes a new class Net, .* define the class once, outside"
    with pytest.raises(ValueError, match=f"of one architecture, but {text}"):
        StackedNetworks(2, iter([one, other]).__next__)


def test_a_class_that_is_changed_afterwards_is_another_one():
    one, other = local(), local()
    type(other).forward = lambda self, x: x
    assert "define the class once" in first(one, other)
    one, other = local(), local()
    type(other).wide = [1]
    assert "define the class once" in first(one, other)


def net(*layers) -> nn.Module:
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        (net(nn.Tanh()), net(nn.ReLU()), "'0' is a Tanh in one and a ReLU in another"),
        (nn.Tanh(), nn.ReLU(), "the network is a Tanh in one and a ReLU in another"),
        (net(nn.Dropout(0.1)), net(nn.Dropout(0.2)), "p of '0' is 0.1 in one and 0.2 in another"),
        (net(nn.Tanh()), net(nn.Tanh()).eval(), "training of the network is True .* False"),
        (net(nn.Tanh()), net(nn.Tanh(), nn.Tanh()), "one has the parts .*, another"),
        (
            nn.Linear(3, 2),
            nn.Linear(3, 2, bias=False),
            r"the tensor 'bias' .* \(\[2\].* missing in another",
        ),
        (nn.Linear(3, 2), nn.Linear(3, 2).double(), "the tensor 'weight' .* torch.float64"),
        (nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False), "the tensor 'weight' .* False"),
    ],
)
def test_what_differs_was_evaluated_like_the_first_network(one, other, text):
    with pytest.raises(ValueError, match=f"expected networks of one architecture, but {text}"):
        StackedNetworks(2, iter([one, other]).__next__)


def test_numbers_in_tensors_and_names_do_not_count():
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    one.name, other.name = "first", "second"
    one.rate = other.rate = float("nan")
    assert first(one, other) is None
    assert first(one, copy.deepcopy(one)) is None


def test_tied_tensors_are_named_once_or_under_every_name():
    layer = nn.Linear(3, 3)
    both = nn.Sequential(layer, layer)
    assert [name for name, _ in tensors_of(both)] == ["0.weight", "0.bias"]
    assert len(list(tensors_of(both, remove_duplicate=False))) == 4
