"""Replaying what was recorded, on a CPU by a stand-in for CUDA graphs (``tests/replaying.py``)."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from layeredrl_trl.acceleration import GraphReplay
from layeredrl_trl.acceleration.host_reads import can_read
from tests.acceleration.changes import CHANGES, Scale
from tests.replaying import replays  # noqa: F401

N_WARM_UP = 2


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None = None


def uncounted(module):
    """A function of a module, and a list as long as Python was in it often."""
    count = []

    def function(x):
        count.append(x)
        module.total.add_(x.sum(0))
        return module.factor * module.net(x)

    return function, count


def replayed(module, **options):
    function, count = uncounted(module)
    return GraphReplay(function, [module], **{"n_warm_up": N_WARM_UP, **options}), count


@pytest.fixture
def module():
    return Scale()


@pytest.fixture(autouse=True)
def without_gradient():
    with torch.no_grad():
        yield


# --- contract


@pytest.mark.usefixtures("replays")
def test_a_replay_does_the_same_without_python(module):
    twin = copy.deepcopy(module)
    again, count = replayed(module)
    plain, _ = uncounted(twin)
    for i in range(6):
        x = torch.randn(3, 2)
        assert torch.equal(again(x), plain(x))
        assert torch.equal(module.total, twin.total)
        assert len(count) == min(i + 1, N_WARM_UP + 1)  # once more to record it


@pytest.mark.usefixtures("replays")
def test_recording_is_reported_once(module, caplog):
    again, _ = replayed(module)
    with caplog.at_level("INFO", logger="torchrl"):
        for n in (3, 5):
            for _ in range(5):
                again(torch.randn(n, 2))
    assert caplog.text.count("was recorded as a CUDA graph in") == 1


@pytest.mark.usefixtures("replays")
def test_what_is_returned_is_not_overwritten():
    for function in (lambda x: x + 1, lambda x: {"a": x + 1, "b": (x[0], None)}):
        again = GraphReplay(function, [])
        xs = torch.randn(6, 3)
        for given, got in [(x, again(x)) for x in xs]:
            torch.testing.assert_close(got, function(given), rtol=0, atol=0)


@pytest.mark.usefixtures("replays")
def test_tuples_dictionaries_and_plain_values_are_passed_on():
    def function(pair, entries, power):
        assert isinstance(pair, Pair) and pair.second is None
        return Pair(pair.first * entries["x", "y"] ** power)

    again = GraphReplay(function, [])
    for i in range(5):
        pair, entries = Pair(torch.randn(3)), {("x", "y"): torch.randn(3)}
        power = 2 + i // 4  # another number is another function
        out = again(pair, entries, power)
        assert isinstance(out, Pair)
        torch.testing.assert_close(out, function(pair, entries, power), rtol=0, atol=0)


@pytest.mark.usefixtures("replays")
def test_random_numbers_are_drawn_anew_and_a_seed_repeats_them():
    again, plain = GraphReplay(torch.randn_like, []), torch.randn_like
    x, drawn = torch.zeros(3), {}
    for name, function in (("replayed", again), ("plain", plain)):
        torch.manual_seed(1)
        drawn[name] = torch.stack([function(x) for _ in range(6)])
    assert torch.equal(drawn["replayed"], drawn["plain"])
    assert len(drawn["replayed"].unique()) == drawn["replayed"].numel()
    torch.manual_seed(1)
    assert torch.equal(torch.stack([again(x) for _ in range(6)]), drawn["plain"])


@pytest.mark.usefixtures("replays")
def test_other_shapes_and_dtypes_are_recorded_apart(module):
    again, count = replayed(module)
    for n in (3, 5, 3, 5, 3, 5, 3, 5):
        x = torch.randn(n, 2)
        torch.testing.assert_close(again(x), module.net(x))
    assert len(count) == 2 * (N_WARM_UP + 1)


def test_nothing_is_recorded_where_it_cannot_be(module):
    again, count = replayed(module)
    for i in range(5):
        again(torch.randn(3, 2))
        assert len(count) == i + 1


@pytest.mark.usefixtures("replays")
def test_nothing_is_read_and_nothing_recorded_inside_of_a_recording():
    reads, calls = [], []

    def add_one(x):
        calls.append(1)
        return x + 1

    inner = GraphReplay(add_one, [], n_warm_up=1)

    def function(x):
        reads.append(can_read(x))
        return inner(x)

    again = GraphReplay(function, [], n_warm_up=3)
    for i in range(6):
        assert torch.equal(again(torch.full((2,), float(i))), torch.full((2,), i + 1.0))
    assert reads == [False] * 4
    # plain, recorded, replayed, and as a part of what is recorded plain again
    assert len(calls) == 3
    assert can_read(torch.zeros(2))


# --- what a replay cannot see


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("change", CHANGES)
def test_it_is_recorded_anew_after_a_change(module, change):
    again, count = replayed(module)
    x = torch.randn(3, 2)
    for _ in range(5):
        again(x)
    n_calls = len(count)
    change(module)
    for _ in range(5):
        torch.testing.assert_close(again(x), module.factor * module.net(x))
    assert len(count) == n_calls + N_WARM_UP + 1


@pytest.mark.usefixtures("replays")
def test_numbers_in_memory_are_no_change(module):
    again, count = replayed(module)
    x = torch.randn(3, 2)
    for _ in range(5):
        module.net.weight.mul_(1.1)
        module.load_state_dict({**module.state_dict(), "total": torch.randn(2)})
        torch.testing.assert_close(again(x), module.net(x))
    assert len(count) == N_WARM_UP + 1


@pytest.mark.usefixtures("replays")
def test_what_else_it_depends_on(module):
    options = {"sign": 1}
    function = lambda x: options["sign"] * module.net(x)  # noqa: E731
    again = GraphReplay(function, [module], also=lambda: options["sign"])
    x = torch.randn(3, 2)
    for sign in (1, -1):
        options["sign"] = sign
        for _ in range(5):
            torch.testing.assert_close(again(x), sign * module.net(x))


@pytest.mark.usefixtures("replays")
def test_gradients_are_asked_for_or_not():
    net = nn.Linear(2, 1)
    again = GraphReplay(net, [net])
    x = torch.ones(3, 2)
    for _ in range(5):
        again(x)
    with torch.enable_grad():
        assert again(x).requires_grad


@pytest.mark.usefixtures("replays")
def test_what_the_function_itself_changes_is_looked_for(module):
    """Say that it has started something; a recording must not be taken for one from before."""
    count = []

    def function(x):
        count.append(x)
        if len(count) == 2:
            module.factor = 2.0
        return module.factor * module.net(x)

    again, x = GraphReplay(function, [module]), torch.randn(3, 2)
    for _ in range(8):
        again(x)
    assert len(count) < 8
    for factor in (1.0, 2.0, 1.0):
        module.factor = factor
        for _ in range(5):
            torch.testing.assert_close(again(x), factor * module.net(x))


@pytest.mark.usefixtures("replays")
def test_old_recordings_make_room(module):
    again, count = replayed(module)
    for n in range(1, 40):
        for _ in range(4):
            again(torch.randn(n, 2))
    assert len(count) == 39 * (N_WARM_UP + 1)
    again(torch.randn(39, 2))
    assert len(count) == 39 * (N_WARM_UP + 1)
    again(torch.randn(1, 2))
    assert len(count) == 39 * (N_WARM_UP + 1) + 1


@pytest.mark.usefixtures("replays")
def test_what_changes_in_every_call_is_never_recorded(module):
    again, count = replayed(module)
    for i in range(50):
        module.factor = float(i)
        x = torch.randn(3, 2)
        torch.testing.assert_close(again(x), i * module.net(x))
    assert len(count) == 50


@pytest.mark.usefixtures("replays")
def test_calls_to_warm_up_that_are_long_ago_are_forgotten(module):
    again, count = replayed(module)
    for n in (*[1] * N_WARM_UP, *range(2, 20)):
        again(torch.randn(n, 2))
    count.clear()
    for _ in range(5):
        again(torch.randn(1, 2))
    assert len(count) == N_WARM_UP + 1


@pytest.mark.usefixtures("replays")
def test_a_part_is_not_taken_for_one_that_lay_there_before():
    """Python puts a new object where another has just been freed."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    again, x = GraphReplay(net.forward, [net], n_warm_up=1), torch.randn(3, 2)
    for kind in (nn.Tanh, nn.Sigmoid, nn.Softsign) * 10:
        net[1] = None
        net[1] = kind()
        for _ in range(4):
            assert torch.equal(again(x), net(x))


@pytest.mark.usefixtures("replays")
def test_one_hook_for_another():
    net = nn.Linear(2, 2)
    again, x = GraphReplay(lambda x: net(x), [net]), torch.randn(3, 2)
    for sign in (1, -1) * 5:
        handle = net.register_forward_hook(lambda _module, _x, out, sign=sign: sign * out)
        for _ in range(5):
            assert torch.equal(again(x), net(x))
        handle.remove()


@pytest.mark.usefixtures("replays")
def test_modes_of_torch(module):
    again, count = replayed(module)
    x = torch.randn(3, 2)
    precision = torch.backends.cuda.matmul.fp32_precision
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            for _ in range(5):
                out = again(x)
                torch.testing.assert_close(out, module.net(x))
            assert out.is_inference() is torch.is_inference_mode_enabled()
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # the newer of two ways to say it
        n_calls = len(count)
        again(x)
        assert len(count) == n_calls + 1
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


@pytest.mark.usefixtures("replays")
def test_autocast_is_left_alone(module):
    again, count = replayed(module)
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(5):
            assert again(torch.randn(3, 2)).dtype is torch.bfloat16
            assert len(count) == i + 1


@pytest.mark.usefixtures("replays")
def test_it_can_be_part_of_what_somebody_else_compiles(module):
    count = []

    def function(x):
        if not torch.compiler.is_compiling():
            count.append(1)
        return module.net(x)

    again = GraphReplay(function, [module], n_warm_up=N_WARM_UP)
    compiled = torch.compile(again, backend="eager")
    for _ in range(6):
        x = torch.randn(3, 2)
        torch.testing.assert_close(compiled(x), module.net(x))
    count.clear()
    for _ in range(6):
        again(x)
    assert len(count) == N_WARM_UP + 1  # nothing was recorded, nor was it a warm-up


@pytest.mark.usefixtures("replays")
def test_warm_up_and_recording_see_the_same_strides():
    """Else what was compiled for the first would be compiled anew while it is recorded."""
    seen = []

    def function(x, y):
        seen.append((x.stride(), y.stride()))
        return x + y

    again, x = GraphReplay(function, []), torch.randn(3, 4)
    for _ in range(5):
        torch.testing.assert_close(again(x[:, 1:3], x[:, :1].expand(3, 2)), x[:, 1:3] + x[:, :1])
    assert set(seen) == {((2, 1), (2, 1))}


# --- errors


def waits(x):
    return x * x.sum().item()


def has_a_shape_of_data(x):
    return x[x > 0]


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("function", [waits, has_a_shape_of_data])
def test_what_cannot_be_recorded_raises(function):
    """In every call after the warm-up: it is never done without."""
    again, x = GraphReplay(function, []), torch.tensor([1.0, -2.0, 3.0])
    for _ in range(3):
        assert torch.equal(again(x), function(x))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be recorded"):
            again(x)
    assert can_read(x)


@pytest.mark.usefixtures("replays")
def test_a_failure_may_pass():
    """Say that of somebody else's work on the same parameters."""
    options, count = {"function": waits}, []

    def function(x):
        count.append(1)
        return options["function"](x)

    again, x = GraphReplay(function, []), torch.ones(3)
    for _ in range(3):
        again(x)
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        again(x)
    options["function"] = torch.neg
    count.clear()
    for _ in range(5):
        assert torch.equal(again(x), -x)
    assert len(count) == 1


@pytest.mark.usefixtures("replays")
def test_an_error_in_the_warm_up_is_raised_and_nothing_is_forbidden_after_it():
    again, x = GraphReplay(lambda x: 1 / 0, []), torch.ones(3)
    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            again(x)
        assert can_read(x)


# --- state


class Counted(nn.Linear):
    """Its calls are counted where a replay does not look."""

    calls = []

    def forward(self, x):
        self.calls.append(id(self))
        return super().forward(x)


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_start_without_recordings(copied):
    net = Counted(2, 2)
    again = GraphReplay(net.forward, [net])
    for _ in range(5):
        again(torch.randn(3, 2))
    other, x = copied(again), torch.randn(3, 2)
    (own,) = other.modules
    assert own is not net
    own.weight.zero_()
    Counted.calls.clear()
    for _ in range(5):
        assert torch.equal(other(x), own.bias.expand(3, 2))
        torch.testing.assert_close(again(x), nn.functional.linear(x, net.weight, net.bias))
    assert Counted.calls == [id(own)] * 4  # three to warm up, one to record


@pytest.mark.gpu
def test_cuda_graphs():
    """Replays of a real graph: numbers, statistics, random numbers, changes."""
    module = Scale().cuda()
    twin = copy.deepcopy(module)
    (again, count), (plain, _) = replayed(module), uncounted(twin)
    for i in range(8):
        x = torch.randn(3, 2, device="cuda")
        torch.testing.assert_close(again(x), plain(x))
        torch.testing.assert_close(module.total, twin.total)
        if i == 5:
            module.factor = twin.factor = 2.0
    assert len(count) == 2 * (N_WARM_UP + 1) - 1
    noise = GraphReplay(torch.randn_like, [])
    for _ in range(5):
        drawn = noise(x)
    assert not torch.equal(noise(x), drawn)
    repeated = []
    for _ in range(2):
        torch.manual_seed(1)
        repeated.append(noise(x))
    assert torch.equal(*repeated)


@pytest.mark.gpu
def test_after_what_cannot_be_recorded_the_gpu_goes_on():
    again, x = GraphReplay(waits, []), torch.ones(3, device="cuda")
    for _ in range(3):
        assert torch.equal(again(x), waits(x))
    with pytest.raises(RuntimeError):
        again(x)
    assert torch.equal(waits(x), 3 * x)
    assert torch.randn(3, device="cuda").isfinite().all()
    other = GraphReplay(torch.neg, [])
    for _ in range(6):
        assert torch.equal(other(x), -x)
