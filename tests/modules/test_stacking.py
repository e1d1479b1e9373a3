"""StackedNetworks: a loop over separate networks, forward and backward; state; errors."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from layeredrl_trl.modules import StackedNetworks


class Tied(nn.Module):
    """The same matrix twice, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.randn(3))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) + self.shift))


NETWORKS = {
    "linear": lambda: nn.Linear(3, 2),
    "mlp": lambda: nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2)),
    "layer-norm": lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)),
    "tied": Tied,
    "batch-norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(),
    "no-parameters": nn.Tanh,
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def made(request):
    """A stack, and copies of the networks it was made of."""
    separate = []

    def make():
        separate.append(request.param())
        return copy.deepcopy(separate[-1])

    return StackedNetworks(3, make), separate


def test_like_a_loop_over_separate_networks(made):
    stack, separate = made
    x = torch.randn(3, 7, 3)
    expected = torch.stack([net(row) for net, row in zip(separate, x, strict=True)])
    torch.testing.assert_close(stack(x), expected)


def test_gradients_like_those_of_separate_networks(made):
    stack, separate = made
    x = torch.randn(3, 7, 3, requires_grad=True)
    stack(x).square().sum().backward()
    own, x.grad = x.grad, None
    torch.stack([net(row) for net, row in zip(separate, x, strict=True)]).square().sum().backward()
    torch.testing.assert_close(own, x.grad)
    for name, parameter in stack.named_parameters():
        assert parameter.is_leaf
        expected = [net.get_parameter(name.removeprefix("network.")).grad for net in separate]
        torch.testing.assert_close(parameter.grad, torch.stack(expected))


def test_learns_like_separate_networks():
    separate = []

    def make():
        separate.append(NETWORKS["mlp"]())
        return copy.deepcopy(separate[-1])

    stack, x, y = StackedNetworks(2, make), torch.randn(2, 9, 3), torch.randn(2, 9, 2)
    for nets, call in ((stack, stack), (nn.ModuleList(separate), None)):
        optimizer = torch.optim.Adam(nets.parameters(), 1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            out = call(x) if call else torch.stack([n(r) for n, r in zip(nets, x, strict=True)])
            (out - y).square().sum().backward()
            optimizer.step()
    expected = torch.stack([net(row) for net, row in zip(separate, x, strict=True)])
    torch.testing.assert_close(stack(x), expected, rtol=1e-4, atol=1e-5)


def test_each_member_starts_from_its_own_initialisation():
    weight = StackedNetworks(2, NETWORKS["linear"]).network.weight
    assert weight.shape == (2, 2, 3) and not torch.equal(weight[0], weight[1])


def test_a_frozen_parameter_stays_frozen():
    def make():
        net = nn.Linear(3, 2)
        net.bias.requires_grad_(False)
        return net

    stack = StackedNetworks(2, make)
    stack(torch.zeros(2, 4, 3)).sum().backward()
    assert stack.network.bias.grad is None and stack.network.weight.grad is not None


def test_dropout_is_drawn_for_each_member_and_follows_the_mode():
    stack, x = StackedNetworks(2, lambda: nn.Dropout(0.5)), torch.ones(2, 100, 3)
    drawn = stack(x)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(stack.eval()(x), x)


def test_running_statistics_are_each_members_own():
    stack = StackedNetworks(2, lambda: nn.BatchNorm1d(1, momentum=1.0))
    stack(torch.tensor([[[0.0], [2.0]], [[10.0], [14.0]]]))
    torch.testing.assert_close(stack.network.running_mean, torch.tensor([[1.0], [12.0]]))


class Chosen(nn.Module):
    """Keeps a method of its own as an attribute, and a layer under two names."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.again = nn.Sequential(self.layer)
        self.run = self.twice

    def twice(self, x):
        return self.layer(x) + self.again(x)

    def forward(self, x):
        return self.run(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_method_that_is_kept_as_an_attribute_reads_the_members_tensors(compiled):
    stack, x = StackedNetworks(2, Chosen), torch.randn(2, 5, 3)
    call = torch.compile(stack, fullgraph=True, backend="eager") if compiled else stack
    weight, bias = stack.network.layer.weight, stack.network.layer.bias
    expected = 2 * (x @ weight.mT + bias.unsqueeze(1))
    torch.testing.assert_close(call(x), expected)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-6), (torch.bfloat16, 0.02)])
def test_networks_of_another_dtype_take_and_give_that_of_the_input(dtype, error):
    stack = StackedNetworks(2, lambda: nn.Linear(3, 2, dtype=dtype))
    x = torch.randn(2, 5, 3)
    out = stack(x)
    out.sum().backward()
    assert out.dtype is torch.float32 and stack.network.weight.grad.dtype is dtype
    weight, bias = stack.network.weight.double(), stack.network.bias.double()
    expected = torch.baddbmm(bias.unsqueeze(1), x.double(), weight.mT)
    torch.testing.assert_close(out.double(), expected, rtol=error, atol=error)


# --- threads


class Meeting(nn.Module):
    """Waits in the middle of an evaluation until another thread is there, too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.barrier = None

    def forward(self, x):
        out = self.layer(x)
        if self.barrier is not None:
            self.barrier.wait(timeout=20)
        return self.layer(x) + out


def in_threads(works):
    """Do all works at once, and return what they return, or the errors that they raise."""
    found = [None] * len(works)

    def run(i):
        try:
            found[i] = works[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_two_threads_that_evaluated_it_at_once_saw_each_others_tensors_for_ever():
    stack = StackedNetworks(3, Meeting)
    xs = torch.randn(2, 3, 5, 3)
    members = [None, torch.tensor([2, 0, 1])]
    expected = [stack(x, member) for x, member in zip(xs, members, strict=True)]
    own = {name: id(p) for name, p in stack.named_parameters()}
    stack.network.barrier = threading.Barrier(2)
    found = in_threads([lambda i=i: stack(xs[i], members[i]) for i in range(2)])
    for x, y in zip(found, expected, strict=True):
        assert isinstance(x, torch.Tensor), x
        assert torch.equal(x, y)
    assert {name: id(p) for name, p in stack.named_parameters()} == own
    stack.network.barrier = None
    assert torch.equal(stack(xs[0]), expected[0])


def test_an_evaluation_that_fails_leaves_the_network_as_it_was():
    stack, x = StackedNetworks(2, Meeting), torch.randn(2, 5, 3)
    expected = stack(x)
    stack.network.barrier = threading.Barrier(1)
    stack.network.barrier.abort()
    with pytest.raises(threading.BrokenBarrierError):
        stack(x)
    stack.network.barrier = None
    assert torch.equal(stack(x), expected)


# --- errors


class Recorder(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("makes", "error", "message"),
    [
        ([], ValueError, "n_members must be at least 1, got 0"),
        ([nn.Linear(3, 2), nn.Linear(3, 3)], ValueError, "networks of one architecture"),
        ([nn.Linear(3, 2), Recorder(3, 2)], ValueError, "networks of one architecture"),
        ([nn.Linear(3, 2), nn.Linear(3, 2, bias=False)], ValueError, "of one architecture"),
        ([nn.Linear(3, 2), 5], TypeError, "return an nn.Module, got int"),
        ([torch.jit.script(nn.Linear(3, 2))], TypeError, "torch.jit cannot be stacked"),
        ([nn.Linear(3, 2)] * 2, ValueError, "return a new one at every call"),
        ([nn.Tanh()] * 2, ValueError, "return a new one at every call"),
    ],
)
def test_networks_that_do_not_go_together(makes, error, message):
    with pytest.raises(error, match=message):
        StackedNetworks(len(makes), iter(makes).__next__)


def test_members_that_share_a_tensor():
    shared = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="share a network or a tensor"):
        StackedNetworks(2, lambda: nn.Sequential(shared))


class Pick(nn.Linear):
    """Returns something else than ``[N, out]``."""

    def __init__(self, pick):
        super().__init__(3, 2)
        self.pick = pick

    def forward(self, x):
        return self.pick(super().forward(x))


@pytest.mark.parametrize(
    ("pick", "error", "text"),
    [
        (lambda y: y.mean(0), ValueError, r"must be \[N, out\] for \[7, 3\], got \[2\]"),
        (lambda y: y[:1], ValueError, r"must be \[N, out\] for \[7, 3\], got \[1, 2\]"),
        (lambda y: y[..., 0], ValueError, r"must be \[N, out\] for \[7, 3\], got \[7\]"),
        (lambda y: (y, y), TypeError, "must be a tensor, got tuple"),
    ],
)
def test_what_a_network_returns_is_not_broadcast(pick, error, text):
    stack = StackedNetworks(2, lambda: Pick(pick))
    with pytest.raises(error, match=f"the output of Pick {text}"):
        stack(torch.zeros(2, 7, 3))


# --- state


def saved_and_loaded(stack):
    other = copy.deepcopy(stack)
    with torch.no_grad():
        for x in other.parameters():
            x.add_(1)
    file = io.BytesIO()
    torch.save(stack.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    return other


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved_and_loaded],
    ids=["deepcopy", "pickle", "state_dict"],
)
@pytest.mark.parametrize("network", [Tied, nn.Tanh], ids=["tied", "no-parameters"])
def test_copies_are_alike_and_apart(network, copied):
    stack, x = StackedNetworks(2, network), torch.randn(2, 5, 3)
    other = copied(stack)
    expected = stack(x)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(stack(x), expected)


def test_tied_parameters_are_counted_once():
    stack = StackedNetworks(2, Tied)
    assert [name for name, _ in stack.named_parameters()] == [
        "network.first.weight",
        "network.first.bias",
        "network.second.bias",
    ]
    assert stack.network.second.weight is stack.network.first.weight


def test_follows_to_another_dtype():
    stack = StackedNetworks(2, Tied).double()
    assert stack(torch.zeros(2, 5, 3).double()).dtype == torch.float64


def test_captured_as_one_graph():
    stack, x = StackedNetworks(2, NETWORKS["mlp"]), torch.randn(2, 5, 3)
    compiled = torch.compile(stack, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), stack(x))


@pytest.mark.gpu
def test_follows_to_the_gpu():
    stack, x = StackedNetworks(2, Tied), torch.randn(2, 5, 3)
    expected = stack(x)
    found = stack.to("cuda")(x.cuda())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
