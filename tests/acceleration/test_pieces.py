"""Many rows in pieces give what all rows at once give."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from layeredrl_trl.acceleration import in_pieces, run_layers
from layeredrl_trl.acceleration.pieces import should_split

PIECE = 2048
SIZES = [1, 5, PIECE // 2, PIECE // 2 + 1, PIECE, PIECE + 1, 3 * PIECE + 7]


class Network(nn.Module):
    """Notes how many rows it is given at once."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.n_rows = []

    def forward(self, x):
        self.n_rows.append(len(x))
        return self.layers(x)


def make_layers(n_members, sizes=(3, 8, 5, 2)):
    return [
        (torch.randn(n_members, size_in, size_out), torch.randn(n_members, 1, size_out))
        for size_in, size_out in pairwise(sizes)
    ]


def oracle(x, layers, activation):
    """Member after member, layer after layer, in float64."""
    rows = []
    for e, y in enumerate(x.double()):
        for i, (weight, bias) in enumerate(layers):
            y = y if i == 0 else activation(y)
            y = y @ weight[e].double() + bias[e].double()
        rows.append(y)
    return torch.stack(rows)


@pytest.fixture
def counted(monkeypatch):
    """Sizes of the products of matrices that are made."""
    seen = []
    for name in ("addmm", "baddbmm"):
        product = getattr(torch, name)

        def noted(bias, x, weight, *, product=product, name=name):
            seen.append((name, *x.shape[:-1]))
            return product(bias, x, weight)

        monkeypatch.setattr(torch, name, noted)
    return seen


# --- where it pays


def test_it_pays_for_many_rows_of_which_no_gradient_is_asked_for():
    with torch.no_grad():
        assert [should_split(torch.zeros(n, 1)) for n in SIZES] == [False] * 3 + [True] * 4
        assert should_split(torch.zeros(5, PIECE, 1)) and not should_split(torch.zeros(PIECE, 5, 1))
    assert not should_split(torch.zeros(PIECE, 1))


@torch.no_grad()
def test_it_pays_not_in_compiled_code():
    compiled = torch.compile(
        lambda x: x + 1 if should_split(x) else x - 1, backend="eager", fullgraph=True
    )
    assert (compiled(torch.ones(PIECE, 1)) == 0).all()


# --- a network of rows


@torch.no_grad()
@pytest.mark.parametrize("n_rows", SIZES)
def test_rows_in_pieces_are_all_rows(n_rows):
    network, x = Network(), torch.randn(n_rows, 3)
    found = in_pieces(network, x)
    torch.testing.assert_close(found, network.layers(x))
    assert sum(network.n_rows) == n_rows and max(network.n_rows) <= PIECE


def test_rows_that_learn_go_at_once():
    network, x = Network(), torch.randn(3 * PIECE, 3)
    in_pieces(network, x).sum().backward()
    assert network.n_rows == [3 * PIECE]
    assert all(p.grad is not None for p in network.parameters())


# --- layers of members


@torch.no_grad()
@pytest.mark.parametrize("n_members", [1, 3])
@pytest.mark.parametrize("n_rows", SIZES)
def test_each_member_has_layers_of_its_own(n_rows, n_members):
    x, layers = torch.randn(n_members, n_rows, 3), make_layers(n_members)
    found = run_layers(x, layers, torch.tanh)
    torch.testing.assert_close(found.double(), oracle(x, layers, torch.tanh), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("n_rows", [3, PIECE + 1])
def test_a_single_layer_has_no_activation(n_rows):
    x, layers = torch.randn(2, n_rows, 3), make_layers(2, (3, 2))
    found = run_layers(x, layers, lambda _: 1 / 0)
    torch.testing.assert_close(found.double(), oracle(x, layers, None), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_few_rows_go_through_all_members_at_once(counted):
    run_layers(torch.randn(3, 5, 3), make_layers(3), torch.tanh)
    assert counted == [("baddbmm", 3, 5)] * 3


@torch.no_grad()
@pytest.mark.parametrize("n_rows", [PIECE // 2 + 1, 2 * PIECE + 9])
def test_many_rows_go_member_by_member(n_rows, counted):
    run_layers(torch.randn(3, n_rows, 3), make_layers(3), torch.tanh)
    sizes = [PIECE] * (n_rows // PIECE) + [n_rows % PIECE]
    assert counted == [("addmm", size) for size in 3 * sizes for _ in range(3)]


@torch.no_grad()
def test_one_piece_of_one_member_needs_no_pieces(counted):
    run_layers(torch.randn(1, PIECE, 3), make_layers(1), torch.tanh)
    assert counted == [("baddbmm", 1, PIECE)] * 3


def test_gradients_of_many_rows(counted):
    layers = make_layers(2)
    layers = [tuple(x.requires_grad_() for x in layer) for layer in layers]
    x = torch.randn(2, PIECE, 3)
    inputs = [parameter for layer in layers for parameter in layer]
    found = torch.autograd.grad(run_layers(x, layers, torch.tanh).square().mean(), inputs)
    assert {name for name, *_ in counted} == {"baddbmm"}
    expected = torch.autograd.grad(oracle(x, layers, torch.tanh).square().mean(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
