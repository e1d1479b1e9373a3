"""Replaying what was recorded, on a CPU by a stand-in for CUDA graphs (``tests/replaying.py``)."""

import copy
import pickle
import warnings
from typing import NamedTuple

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from layeredrl_trl.functional import can_read
from layeredrl_trl.modules import Recorded, RewardNet, fingerprint, is_known, is_recording
from tests.replaying import replays  # noqa: F401

N_WARM_UP = 2


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None = None


class Scale(nn.Module):
    """Has one of everything that a change can be of."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.register_buffer("total", torch.zeros(2))
        self.factor = 1.0
        self.options = ["a", object()]
        self.table = {"a": torch.zeros(2)}


def uncounted(module):
    """A function of a module, and a list as long as Python was in it often."""
    count = []

    def function(x):
        count.append(x)
        module.total.add_(x.sum(0))
        return module.factor * module.net(x)

    return function, count


def recorded(module, **options):
    function, count = uncounted(module)
    options = {"cudagraphs": True, "n_warm_up": N_WARM_UP, **options}
    return Recorded(function, [module], **options), count


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
    again, count = recorded(module)
    plain, _ = uncounted(twin)
    for i in range(6):
        x = torch.randn(3, 2)
        assert torch.equal(again(x), plain(x))
        assert torch.equal(module.total, twin.total)
        assert len(count) == min(i + 1, N_WARM_UP + 1)  # once more to record it


@pytest.mark.usefixtures("replays")
def test_recording_is_reported_once(module, caplog):
    again, _ = recorded(module)
    with caplog.at_level("INFO", logger="torchrl"):
        for n in (3, 5):
            for _ in range(5):
                again(torch.randn(n, 2))
    assert caplog.text.count("was recorded as a CUDA graph in") == 1


@pytest.mark.usefixtures("replays")
def test_what_is_returned_is_not_overwritten():
    for function in (lambda x: x + 1, lambda x: {"a": x + 1, "b": (x[0], None)}):
        again = Recorded(function, [], cudagraphs=True)
        xs = torch.randn(6, 3)
        for given, got in [(x, again(x)) for x in xs]:
            torch.testing.assert_close(got, function(given), rtol=0, atol=0)


@pytest.mark.usefixtures("replays")
def test_tuples_dictionaries_and_plain_values_are_passed_on():
    def function(pair, entries, power):
        assert isinstance(pair, Pair) and pair.second is None
        return Pair(pair.first * entries["x", "y"] ** power)

    again = Recorded(function, [], cudagraphs=True)
    for i in range(5):
        pair, entries = Pair(torch.randn(3)), {("x", "y"): torch.randn(3)}
        power = 2 + i // 4  # another number is another function
        out = again(pair, entries, power)
        assert isinstance(out, Pair)
        torch.testing.assert_close(out, function(pair, entries, power), rtol=0, atol=0)


@pytest.mark.usefixtures("replays")
def test_random_numbers_are_drawn_anew_and_a_seed_repeats_them():
    again, plain = Recorded(torch.randn_like, [], cudagraphs=True), torch.randn_like
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
    again, count = recorded(module)
    for n in (3, 5, 3, 5, 3, 5, 3, 5):
        x = torch.randn(n, 2)
        torch.testing.assert_close(again(x), module.net(x))
    assert len(count) == 2 * (N_WARM_UP + 1)


def test_nothing_is_recorded_where_it_cannot_be(module):
    again, count = recorded(module)
    for i in range(5):
        again(torch.randn(3, 2))
        assert len(count) == i + 1


@pytest.mark.usefixtures("replays")
def test_nothing_is_read_and_nothing_recorded_inside_of_a_recording():
    reads, insides = [], []
    inner = Recorded(lambda x: x + 1, [], cudagraphs=True, n_warm_up=1)

    def function(x):
        reads.append(can_read(x))
        insides.append(is_recording())
        return inner(x)

    again = Recorded(function, [], cudagraphs=True, n_warm_up=3)
    for _ in range(5):
        again(torch.zeros(2))
    assert reads == [False] * 4
    assert insides == [False] * 3 + [True]
    assert not is_recording() and can_read(torch.zeros(2))


# --- what a replay cannot see


def change_attribute(module):
    module.factor = 2.0


def change_training(module):
    module.eval()


def change_part(module):
    module.net = nn.Linear(2, 2)


def change_parameter(module):
    module.net.weight = nn.Parameter(torch.randn(2, 2))


def change_memory(module):
    module.net.weight.data = torch.randn(2, 2)


def change_buffer(module):
    module.total = torch.ones(2)


def change_hooks(module):
    module.register_forward_hook(lambda *_: None)


def change_what_learns(module):
    module.net.requires_grad_(False)


def change_strides(module):
    module.net.weight.data = module.net.weight.data.t()


def change_an_entry(module):
    module.options[1] = object()


def change_a_name(module):
    module.table["b"] = module.table.pop("a")


def change_a_tensor_in_a_table(module):
    module.table["a"].data = torch.ones(2)


CHANGES = [
    change_what_learns,
    change_strides,
    change_an_entry,
    change_a_name,
    change_a_tensor_in_a_table,
    change_attribute,
    change_training,
    change_part,
    change_parameter,
    change_memory,
    change_buffer,
    change_hooks,
]


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("change", CHANGES)
def test_it_is_recorded_anew_after_a_change(module, change):
    again, count = recorded(module)
    x = torch.randn(3, 2)
    for _ in range(5):
        again(x)
    (before, _), n_calls = fingerprint([module]), len(count)
    change(module)
    assert fingerprint([module])[0] != before
    for _ in range(5):
        torch.testing.assert_close(again(x), module.factor * module.net(x))
    assert len(count) == n_calls + N_WARM_UP + 1


@pytest.mark.usefixtures("replays")
def test_numbers_in_memory_are_no_change(module):
    again, count = recorded(module)
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
    again = Recorded(function, [module], cudagraphs=True, also=lambda: options["sign"])
    x = torch.randn(3, 2)
    for sign in (1, -1):
        options["sign"] = sign
        for _ in range(5):
            torch.testing.assert_close(again(x), sign * module.net(x))


@pytest.mark.usefixtures("replays")
def test_gradients_are_asked_for_or_not():
    net = nn.Linear(2, 1)
    again = Recorded(net, [net], cudagraphs=True)
    x = torch.ones(3, 2)
    for _ in range(5):
        again(x)
    with torch.enable_grad():
        assert again(x).requires_grad


@pytest.mark.usefixtures("replays")
def test_that_nothing_changed_can_be_said(module):
    """It is believed after a replay only: Python ran in every other call."""
    again, count = recorded(module)
    x = torch.randn(3, 2)
    for _ in range(5):
        again(x, is_unchanged=True)
    assert len(count) == N_WARM_UP + 1
    module.factor = 2.0
    torch.testing.assert_close(again(x, is_unchanged=True), module.net(x))
    torch.testing.assert_close(again(x), 2 * module.net(x))


@pytest.mark.usefixtures("replays")
def test_what_the_function_itself_changes_is_looked_for(module):
    """Say that it has started something; a recording must not be taken for one from before."""
    count = []

    def function(x):
        count.append(x)
        if len(count) == 2:
            module.factor = 2.0
        return module.factor * module.net(x)

    again, x = Recorded(function, [module], cudagraphs=True), torch.randn(3, 2)
    for _ in range(8):
        again(x, is_unchanged=True)
    assert again._recordings
    for factor in (1.0, 2.0, 1.0):
        module.factor = factor
        for _ in range(5):
            torch.testing.assert_close(again(x), factor * module.net(x))


@pytest.mark.usefixtures("replays")
def test_old_recordings_make_room(module):
    again, count = recorded(module)
    for n in range(1, 40):
        for _ in range(4):
            again(torch.randn(n, 2))
    assert len(count) == 39 * (N_WARM_UP + 1)
    assert len(again._recordings) <= 16
    again(torch.randn(39, 2))
    assert len(count) == 39 * (N_WARM_UP + 1)
    again(torch.randn(1, 2))
    assert len(count) == 39 * (N_WARM_UP + 1) + 1


@pytest.mark.usefixtures("replays")
def test_what_changes_in_every_call_is_never_recorded(module):
    again, count = recorded(module)
    for i in range(50):
        module.factor = float(i)
        x = torch.randn(3, 2)
        torch.testing.assert_close(again(x), i * module.net(x))
    assert len(count) == 50 and len(again._n_calls) <= 16


@pytest.mark.usefixtures("replays")
def test_a_part_is_not_taken_for_one_that_lay_there_before():
    """Python puts a new object where another has just been freed."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    again, x = Recorded(net.forward, [net], cudagraphs=True, n_warm_up=1), torch.randn(3, 2)
    for kind in (nn.Tanh, nn.Sigmoid, nn.Softsign) * 10:
        net[1] = None
        net[1] = kind()
        for _ in range(4):
            assert torch.equal(again(x), net(x))


@pytest.mark.usefixtures("replays")
def test_one_hook_for_another():
    net = nn.Linear(2, 2)
    again, x = Recorded(lambda x: net(x), [net], cudagraphs=True), torch.randn(3, 2)
    for sign in (1, -1) * 5:
        handle = net.register_forward_hook(lambda _module, _x, out, sign=sign: sign * out)
        for _ in range(5):
            assert torch.equal(again(x), net(x))
        handle.remove()


@pytest.mark.usefixtures("replays")
def test_modes_of_torch(module):
    again, _ = recorded(module)
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
        again(x)
        assert len(again._n_calls) == 4
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


@pytest.mark.usefixtures("replays")
def test_autocast_is_left_alone(module):
    again, count = recorded(module)
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(5):
            assert again(torch.randn(3, 2)).dtype is torch.bfloat16
            assert len(count) == i + 1


@pytest.mark.usefixtures("replays")
def test_it_can_be_part_of_what_somebody_else_compiles(module):
    again = Recorded(module.net.forward, [module])
    compiled = torch.compile(again, backend="eager")
    for _ in range(6):
        x = torch.randn(3, 2)
        torch.testing.assert_close(compiled(x), module.net(x))
    assert not again._recordings


@pytest.mark.usefixtures("replays")
def test_warm_up_and_recording_see_the_same_strides():
    """Else what was compiled for the first would be compiled anew while it is recorded."""
    seen = []

    def function(x, y):
        seen.append((x.stride(), y.stride()))
        return x + y

    again, x = Recorded(function, [], cudagraphs=True), torch.randn(3, 4)
    for _ in range(5):
        torch.testing.assert_close(again(x[:, 1:3], x[:, :1].expand(3, 2)), x[:, 1:3] + x[:, :1])
    assert set(seen) == {((2, 1), (2, 1))}


# --- what is known


class Own(nn.Module):
    def forward(self, *args):
        return args[0]


def test_modules_of_libraries_are_known():
    known = nn.Sequential(nn.Linear(2, 2), RewardNet(2, 0, 1))
    assert is_known(known)
    assert not is_known(nn.Sequential(known, Own()))
    assert not is_known(TensorDictModule(lambda x: x, ["a"], ["b"]))
    assert not is_known(RewardNet(2, 0, 1, activation=Own))
    handle = known[0].register_forward_hook(lambda *_: None)
    assert not is_known(known)
    handle.remove()
    assert is_known(known)
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        handle = getattr(known[0], register)(lambda *_: None)
        assert not is_known(known)
        handle.remove()
    known[0].forward = lambda x: x
    assert not is_known(known)
    del known[0].forward
    assert is_known(known)
    with torch.enable_grad():
        known[0].weight.register_hook(lambda grad: grad)
    assert not is_known(known)


@pytest.mark.usefixtures("replays")
def test_unknown_modules_are_recorded_if_asked_for(module):
    for cudagraphs, expected in ((None, 5), (True, N_WARM_UP + 1), (False, 5)):
        again, count = recorded(module, cudagraphs=cudagraphs)
        for _ in range(5):
            again(torch.randn(3, 2))
        assert len(count) == expected


# --- errors


def waits(x):
    return x * x.sum().item()


def has_a_shape_of_data(x):
    return x[x > 0]


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("function", [waits, has_a_shape_of_data])
def test_what_cannot_be_recorded_is_done_without(function):
    """After three tries, each after calls to warm up."""
    again, x = Recorded(function, []), torch.tensor([1.0, -2.0, 3.0])
    for _ in range(11):
        assert torch.equal(again(x), function(x))
    with pytest.warns(UserWarning, match=f"{function.__name__} cannot be replayed.*: RuntimeError"):
        assert torch.equal(again(x), function(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(again(x), function(x))


@pytest.mark.usefixtures("replays")
def test_a_failure_may_pass():
    """Say that of somebody else's work on the same parameters."""
    options = {"function": waits}
    again, x = Recorded(lambda x: options["function"](x), []), torch.ones(3)
    for _ in range(4):
        again(x)
    options["function"] = torch.neg
    for _ in range(5):
        assert torch.equal(again(x), -x)
    assert again._recordings


@pytest.mark.usefixtures("replays")
def test_what_must_be_recorded_raises():
    again, x = Recorded(waits, [], cudagraphs=True), torch.ones(3)
    for _ in range(3):
        again(x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be recorded"):
            again(x)
    assert not is_recording() and can_read(x)


# --- state


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_start_without_recordings(copied):
    net = nn.Linear(2, 2)
    again = Recorded(net.forward, [net])
    for _ in range(5):
        again(torch.randn(3, 2))
    other, x = copied(again), torch.randn(3, 2)
    assert not other._recordings and again._recordings
    (own,) = other.modules
    assert own is not net
    own.weight.zero_()
    for _ in range(5):
        assert torch.equal(other(x), own.bias.expand(3, 2))
        torch.testing.assert_close(again(x), net(x))


@pytest.mark.gpu
def test_cuda_graphs():
    """Replays of a real graph: numbers, statistics, random numbers, changes."""
    module = Scale().cuda()
    twin = copy.deepcopy(module)
    (again, count), (plain, _) = recorded(module), uncounted(twin)
    for i in range(8):
        x = torch.randn(3, 2, device="cuda")
        torch.testing.assert_close(again(x), plain(x))
        torch.testing.assert_close(module.total, twin.total)
        if i == 5:
            module.factor = twin.factor = 2.0
    assert len(count) == 2 * (N_WARM_UP + 1) - 1
    noise = Recorded(torch.randn_like, [], cudagraphs=True)
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
    again, x = Recorded(waits, []), torch.ones(3, device="cuda")
    with pytest.warns(UserWarning, match="cannot be replayed"):
        for _ in range(12):
            assert torch.equal(again(x), waits(x))
    assert torch.randn(3, device="cuda").isfinite().all()
