"""ConcatMLP and EnsembleMLP: a loop over nn.Linear, initialisation, gradients, errors."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from layeredrl_trl.modules import (
    ConcatMLP,
    EnsembleMLP,
    MLPEncoder,
    ProbabilisticEnsemble,
    RewardNet,
)
from tests.default_dtype import default_dtype


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("hidden_sizes", [(), (8,), (8, 4)])
def test_concat_shapes(batch, hidden_sizes):
    net = ConcatMLP((3, 0, 2), 4, hidden_sizes)
    inputs = torch.randn(*batch, 3), torch.zeros(*batch, 0), torch.randn(*batch, 2)
    assert net(*inputs).shape == (*batch, 4)


def test_concat_casts_to_float32():
    out = ConcatMLP((2, 1), 1)(torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 1).long())
    assert out.dtype == torch.float32


MAKES = [
    lambda activation: ConcatMLP((3,), 2, (8,), activation),
    lambda activation: EnsembleMLP(2, 3, 2, (8,), activation),
    lambda activation: RewardNet(3, 0, 1, hidden_sizes=(8,), activation=activation),
    lambda activation: ProbabilisticEnsemble(3, 0, 1, hidden_sizes=(8,), activation=activation),
    lambda activation: MLPEncoder(3, 2, 0, hidden_sizes=(8,), activation=activation),
]


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(
    ("activation", "text"),
    [
        ("relu", r"got 'relu' \(str\)"),
        (nn.ReLU(), r"got the module ReLU\(\)"),
        (torch.relu, r"got <built-in .*relu"),
        (None, r"got None \(NoneType\)"),
        (dict, r"makes \{\}"),
    ],
)
def test_an_activation_that_is_no_class_of_modules(make, activation, text):
    with pytest.raises(TypeError, match=f"activation must be a class of modules, .*{text}"):
        make(activation)


def test_a_function_that_makes_an_activation_is_taken():
    assert ConcatMLP((3,), 2, (8,), lambda: nn.LeakyReLU(0.3)).layers[1].negative_slope == 0.3


@pytest.mark.parametrize("make", MAKES)
def test_float32_whatever_the_default_dtype_is(make):
    torch.manual_seed(0)
    expected = make(nn.PReLU).state_dict()
    torch.manual_seed(0)
    with default_dtype(torch.float64):
        found = make(nn.PReLU).state_dict()
    for name, x in expected.items():
        assert found[name].dtype is x.dtype
        assert torch.equal(found[name], x)


def test_layers_of_another_dtype_read_what_they_are_given():
    net = ConcatMLP((2, 1), 1).double()
    assert net(torch.zeros(3, 2), torch.zeros(3, 1).long()).dtype is torch.float64


@pytest.mark.parametrize("first", [nn.Linear(3, 3), nn.Identity(), nn.SiLU()], ids=repr)
@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.Tanh])
def test_concat_without_gradient_is_the_same_and_the_input_stays(activation, first):
    net = ConcatMLP((3,), 2, (8, 4), activation)
    net.layers.insert(0, activation())
    net.layers.insert(0, first)
    x = torch.randn(7, 3)
    given, expected = x.clone(), net(x)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
    assert torch.equal(x, given)


@pytest.mark.parametrize("at", [0, 1, None], ids=["linear", "activation", "all"])
def test_a_hook_of_a_concat_keeps_what_it_saw(at):
    net, seen = ConcatMLP((3,), 2, (8,)), []
    looked_at = net.layers if at is None else net.layers[at]
    looked_at.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    x = torch.randn(7, 3)
    net(x)
    with torch.no_grad():
        net(x)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)


REGISTER = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
)


@pytest.mark.parametrize("at", [0, 1, None], ids=["linear", "activation", "all"])
@pytest.mark.parametrize("register", REGISTER)
def test_hooks_of_a_concat_are_called_with_gradient(register, at):
    net, seen = ConcatMLP((3,), 2, (8,)), []
    looked_at = net.layers if at is None else net.layers[at]
    handle = getattr(looked_at, register)(lambda *_: seen.append(1))
    net(torch.randn(7, 3, requires_grad=True)).sum().backward()
    handle.remove()
    net(torch.randn(7, 3)).sum().backward()
    assert len(seen) == 1


def test_hooks_of_all_modules_are_called():
    net, seen = ConcatMLP((3,), 2, (8,)), []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        net(torch.randn(7, 3))
    finally:
        handle.remove()
    assert len(seen) == 5  # three layers, all of them, and the net


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 100


class AllShifted(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 100


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 100


@pytest.mark.parametrize("with_gradient", [True, False])
def test_what_is_derived_from_layers_of_a_concat_is_asked(with_gradient):
    x = torch.randn(7, 3)
    for change in (
        lambda net: net.layers.__setitem__(0, Shifted(3, 8)),
        lambda net: setattr(net, "layers", AllShifted(*net.layers)),
        lambda net: setattr(net, "layers", Wrapped(net.layers)),
    ):
        net = ConcatMLP((3,), 2, (8,), nn.Identity)
        before = net(x)
        change(net)
        with torch.set_grad_enabled(with_gradient):
            torch.testing.assert_close(net(x), net.layers(x), rtol=0, atol=0)
        assert (net(x) - before).abs().max() > 5


@pytest.mark.parametrize("with_gradient", [True, False])
def test_what_stands_in_for_a_layer_of_a_concat_is_asked(with_gradient):
    net, x = ConcatMLP((3,), 2, (8,)), torch.randn(7, 3)
    nn.utils.parametrizations.weight_norm(net.layers[0])
    with torch.set_grad_enabled(with_gradient):
        torch.testing.assert_close(net(x), net.layers(x), rtol=0, atol=0)
        net.layers[2].forward = lambda x: x.sum(-1, keepdim=True)
        torch.testing.assert_close(net(x), net.layers(x), rtol=0, atol=0)


def test_a_concat_takes_parameters_of_another():
    first, second = ConcatMLP((3,), 2, (8,)), ConcatMLP((3,), 2, (8,))
    x, params = torch.randn(7, 3), dict(second.named_parameters())
    torch.testing.assert_close(functional_call(first, params, (x,)), second(x), rtol=0, atol=0)
    with TensorDict.from_module(second).to_module(first):
        torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)
    stacked, _ = stack_module_state([first, second])
    outs = vmap(lambda params: functional_call(first, params, (x,)))(stacked)
    torch.testing.assert_close(outs, torch.stack([first(x), second(x)]))


@pytest.mark.parametrize("hidden_sizes", [(), (8,), (8, 4)])
@pytest.mark.parametrize("members", [1, 3])
def test_ensemble_like_a_loop_over_linear_layers(members, hidden_sizes):
    net = EnsembleMLP(members, 3, 2, hidden_sizes, nn.Tanh)
    x = torch.randn(members, 7, 3)
    for e in range(members):
        expected = x[e]
        for i, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
            expected = nn.functional.linear(expected, weight[e].T, bias[e, 0])
            if i < len(hidden_sizes):
                expected = torch.tanh(expected)
        torch.testing.assert_close(net(x)[e], expected)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.ELU, nn.Tanh, nn.GELU])
def test_without_gradient_the_numbers_are_the_same_and_the_input_stays(activation):
    net = EnsembleMLP(2, 3, 2, (8, 8), activation)
    x = torch.randn(2, 7, 3)
    before = x.clone()
    expected = net(x)
    with torch.no_grad():
        assert torch.equal(net(x), expected)
    assert torch.equal(x, before)
    expected.sum().backward()  # nothing that it needs was overwritten
    assert not getattr(net.activation, "inplace", False)


def test_a_nonlinearity_derived_from_torchs_is_not_taken_for_it():
    class Residual(nn.ReLU):
        def forward(self, x):
            return x + super().forward(x)

    net, x = EnsembleMLP(2, 3, 2, (8,), Residual), torch.randn(2, 7, 3)
    expected = net(x)
    with torch.no_grad():
        assert torch.equal(net(x), expected)


def test_a_hook_keeps_what_it_was_given():
    net, seen = EnsembleMLP(2, 3, 2, (8,)), []
    net.activation.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        net(torch.randn(2, 7, 3))
    ((before, after),) = seen
    torch.testing.assert_close(torch.nn.functional.silu(before), after)


@pytest.mark.parametrize("n_rows", [5, 5000])
def test_it_compiles_without_gradient(n_rows):
    net, x = EnsembleMLP(2, 3, 2, (8,)), torch.randn(2, n_rows, 3)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(net, fullgraph=True, backend="eager")(x), net(x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("n_rows", [1025, 4096, 5000])
def test_many_rows_in_pieces_are_all_rows(n_rows):
    net, head = EnsembleMLP(2, 3, 2, (8, 8)), ConcatMLP((3, 1), 2, (8, 8))
    x, y = torch.randn(2, n_rows, 3), torch.randn(2, n_rows, 1)
    expected = net(x), head(x, y)
    with torch.no_grad():
        torch.testing.assert_close((net(x), head(x, y)), expected)


def test_members_start_differently_and_like_linear_layers():
    net, linear = EnsembleMLP(2, 400, 300), nn.Linear(400, 128)
    for weight in net.weights:
        assert not torch.equal(weight[0], weight[1])
    for own, theirs in ((net.weights[0], linear.weight), (net.biases[0], linear.bias)):
        assert own.std().item() == pytest.approx(theirs.std().item(), rel=0.15)
        assert own.abs().max() <= 400**-0.5


def test_a_member_gets_gradient_from_its_own_row_only():
    net = EnsembleMLP(3, 2, 1, (4,))
    net(torch.randn(3, 5, 2))[1].sum().backward()
    for parameter in net.parameters():
        assert (parameter.grad[[0, 2]] == 0).all() and (parameter.grad[1] != 0).any()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5, 3), (5, 1)), r"expected inputs with last dims \(3, 2\), got \(3, 1\)"),
        (((5, 3),), r"expected inputs with last dims \(3, 2\), got \(3,\)"),
        (((5, 3), (1, 2)), r"of one leading shape, got \[\[5, 3\], \[1, 2\]\]"),
        (((5, 3), (2,)), r"of one leading shape, got \[\[5, 3\], \[2\]\]"),
    ],
)
def test_no_broadcasting(shapes, message):
    with pytest.raises(ValueError, match=message):
        ConcatMLP((3, 2), 1)(*map(torch.zeros, shapes))


def test_state_dict_round_trip():
    net, other = EnsembleMLP(2, 3, 1, (4,)), EnsembleMLP(2, 3, 1, (4,))
    other.load_state_dict(net.state_dict())
    x = torch.randn(2, 5, 3)
    assert torch.equal(net(x), other(x))


@pytest.mark.parametrize(
    "make", [lambda h: ConcatMLP((3,), 1, h), lambda h: EnsembleMLP(2, 3, 1, h)]
)
def test_a_number_as_hidden_sizes_is_named(make):
    with pytest.raises(
        TypeError, match=r"hidden_sizes must be a sequence .*, as in \(32,\), got 32"
    ):
        make(32)
    with pytest.raises(ValueError, match=r"hidden_sizes\[1\] must be at least 1, got -1"):
        make((8, -1))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ConcatMLP((3.0,), 2), r"in_dims\[0\] must be an integer, got 3.0"),
        (lambda: ConcatMLP((3,), True), "out_dim must be an integer, got True"),
        (lambda: EnsembleMLP(2.0, 3, 2), "n_members must be an integer, got 2.0"),
        (lambda: EnsembleMLP(2, "3", 2), "in_dim must be an integer, got '3'"),
    ],
)
def test_a_size_that_is_no_integer_is_named(make, text):
    with pytest.raises(TypeError, match=text):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ConcatMLP((3, -1), 2), r"in_dims\[1\] must be at least 0, got -1"),
        (lambda: ConcatMLP((3,), 0), "out_dim must be at least 1, got 0"),
        (lambda: EnsembleMLP(0, 3, 2), "n_members must be at least 1, got 0"),
    ],
)
def test_a_size_out_of_range_is_named(make, text):
    with pytest.raises(ValueError, match=text):
        make()
