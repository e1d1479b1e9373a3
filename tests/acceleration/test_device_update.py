"""DeviceUpdate does what the plain Update does, decided on the device and replayed.

On a CPU, without graphs or by the stand-in for them (``tests/replaying.py``). How a whole predictor
learns by it is in ``tests/predictors/test_replayed_learning.py``.
"""

import copy
import warnings
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.objectives import HardUpdate, LossModule, SoftUpdate

from layeredrl_trl.acceleration import DeviceUpdate, device_update
from layeredrl_trl.objectives import ForeachSoftUpdate, Update
from tests.replaying import replays  # noqa: F401

OPTIMIZERS = {
    "Adam": partial(torch.optim.Adam, lr=1e-2),
    "AdamW": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "SGD": partial(torch.optim.SGD, lr=1e-2),
}


class Value(nn.Module):
    """Has a running statistic, which is kept beside the targets."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2, 1)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.out(x - self.mean)


class Loss(LossModule):
    """Of a reward and a value; counts its calls where a replay does not look."""

    value_network: TensorDictModule
    value_network_params: TensorDict
    target_value_network_params: TensorDict
    calls = []

    def __init__(self):
        super().__init__()
        self.reward = nn.Linear(2, 1)
        value = TensorDictModule(Value(), ["x"], ["value"])
        self.convert_to_functional(value, "value_network", create_target_params=True)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, y):
        self.calls.append(1)
        self.seen += x.sum()
        with torch.no_grad():
            target = y + 0.5 * self._value(self.target_value_network_params, x)
        terms = {
            "loss_reward": 10 * (self.reward(x) - y).square().mean(),
            "loss_value": (self._value(self.value_network_params, x) - target).square().mean(),
            "target": target.mean(),
        }
        return TensorDict(terms, batch_size=[])

    def _value(self, params, x):
        with params.to_module(self.value_network, preserve_module_state=False):
            return self.value_network(TensorDict(x=x, batch_size=len(x)))["value"]


def make_update(optimizer="Adam", updater=ForeachSoftUpdate, **options):
    """A plain update; the same one each time."""
    torch.manual_seed(1)
    loss = Loss()
    groups = [{"params": list(loss.reward.parameters())}]
    groups += [{"params": list(loss.value_network_params.parameters())}]
    return Update(
        loss,
        OPTIMIZERS[optimizer](groups, fused=True),
        target_updater=updater and updater(loss, tau=0.1),
        warm_up_params=list(loss.reward.parameters()),
        **options,
    )


def make_both(**options):
    return DeviceUpdate(make_update(**options)), make_update(**options)


def batch(n=8):
    x = torch.randn(n, 2)
    return x, x.sum(1, keepdim=True)


def poisoned(n=8):
    x, y = batch(n)
    x[3, 0] = torch.nan
    return x, y


def snapshot(update) -> dict:
    """All that a step may change."""
    update = getattr(update, "plain", update)
    loss = update.loss_module
    state = {f"param {key}": p.detach().clone() for key, p in loss.named_parameters()}
    state |= {f"buffer {key}": x.clone() for key, x in loss.named_buffers()}
    for i, entry in update.optimizer.state_dict()["state"].items():
        state |= {f"optimiser {i} {key}": x.clone() for key, x in entry.items() if x is not None}
    return state


def assert_same_steps(own, plain, batches, rtol=1e-5):
    """Take steps by both; they say the same and end in the same place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given in batches:
            infos = [update(*(x.clone() for x in given)) for update in (own, plain)]
            assert set(infos[0].keys()) == set(infos[1].keys())
            torch.testing.assert_close(
                infos[0].to_dict(), infos[1].to_dict(), rtol=rtol, atol=1e-6, equal_nan=True
            )
            found, expected = snapshot(own), snapshot(plain)
            for key in found.keys() - expected.keys():  # a skipped step begins with zeros
                expected[key] = torch.zeros_like(found[key])
            torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-6)
        assert (own.steps, own.skipped) == (plain.steps, plain.skipped)


@pytest.fixture(params=["called", "replayed"])
def on_a_device(request, monkeypatch):
    """With graphs, and where none can be made, say inside of a graph of somebody else."""
    if request.param == "replayed":
        request.getfixturevalue("replays")
    else:
        monkeypatch.setattr(device_update, "can_record", lambda _: True)


by_replays = pytest.mark.usefixtures("replays")


# --- contract


@by_replays
def test_after_its_start_a_step_is_replayed():
    update = DeviceUpdate(make_update())
    Loss.calls.clear()
    for i in range(20):
        update(*batch())
        # two that start statistics, three to warm up, one to record
        assert len(Loss.calls) == min(i + 1, 6)
    assert update.steps == 20


@pytest.mark.usefixtures("on_a_device")
def test_its_counters_are_those_of_the_plain_one():
    update = DeviceUpdate(make_update())
    update.steps, update.skipped = 7, 3
    assert (update.plain.steps, update.plain.skipped) == (7, 3)
    update(*batch())
    assert (update.steps, update.skipped) == (8, 3)


# --- oracle: the plain update


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_grad_max_norm": 0.5},
        {"clip_grad_max_norm": 1e6},
        {"warm_up": 2, "clip_grad_max_norm": 0.5},
        {"warm_up": 8},
        {"updater": None},
        {"updater": SoftUpdate},
        {"optimizer": "AdamW", "clip_grad_max_norm": 0.5},
        {"optimizer": "SGD", "clip_grad_max_norm": 0.5},
    ],
    ids=str,
)
def test_steps_decided_on_the_device_are_those_of_the_host(options):
    batches = [batch(), batch(), poisoned(), *(batch() for _ in range(8)), poisoned(), batch()]
    own, plain = make_both(**options)
    assert_same_steps(own, plain, batches)
    assert own.skipped == 2


@by_replays
def test_a_bad_batch_changes_nothing_whenever_it_comes():
    update = DeviceUpdate(make_update(clip_grad_max_norm=0.5))
    for _ in range(12):
        before = snapshot(update)
        info = update(*poisoned())
        assert not info["grad_norm"].isfinite()
        # the kernel makes moments of zeros in its first step
        after = {key: x for key, x in snapshot(update).items() if key in before}
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        update(*batch())
    with pytest.warns(UserWarning, match="non-finite gradients"):
        assert update.skipped == 12


@pytest.mark.usefixtures("on_a_device")
def test_what_the_device_skipped_is_warned_of_when_it_is_read():
    update = DeviceUpdate(make_update())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update(*poisoned())
        update(*poisoned())
    with pytest.warns(UserWarning, match="non-finite gradients"):
        assert update.skipped == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert update.skipped == 2
        update(*poisoned())
        assert update.skipped == 3


# --- what changes between two replays


def change_rate(update):
    update.optimizer.param_groups[0]["lr"] = 0.05


def change_moments(update):
    update.optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def change_clip(update):
    update.clip_grad_max_norm = 0.01


def change_tau(update):
    update.target_updater.eps = 0.5


def change_updater(update):
    update.target_updater = None


def change_compute(update):
    loss = update.loss_module
    update.compute = lambda *batch: loss(*batch).apply(lambda x: 2 * x)


def change_what_learns(update):
    update.loss_module.reward.requires_grad_(False)


def change_state_of_the_optimizer(update):
    other = make_update()
    torch.manual_seed(5)
    for _ in range(3):
        other(*batch())
    update.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))


@by_replays
@pytest.mark.parametrize(
    "change",
    [
        change_rate,
        change_moments,
        change_clip,
        change_tau,
        change_updater,
        change_compute,
        change_what_learns,
        change_state_of_the_optimizer,
    ],
)
def test_a_change_between_two_replays_counts(change):
    own, plain = make_both(clip_grad_max_norm=1.0)
    assert_same_steps(own, plain, [batch() for _ in range(8)])
    for update in (own.plain, plain):
        change(update)
    before = snapshot(plain)
    assert_same_steps(own, plain, [batch() for _ in range(7)])
    assert any(not torch.equal(x, before[key]) for key, x in snapshot(plain).items())


@by_replays
def test_another_learning_rate_needs_no_other_recording():
    own, plain = make_both()
    assert_same_steps(own, plain, [batch() for _ in range(8)])
    for rate in (0.05, 0.0, 0.02):
        for update in (own, plain):
            for group in update.optimizer.param_groups:
                group["lr"] = rate
        Loss.calls.clear()
        assert_same_steps(own, plain, [batch(), batch()])
        assert len(Loss.calls) == 2  # of the plain one
    for group in own.optimizer.param_groups:
        assert group["lr"] == 0.02 and not group.get("capturable")


@by_replays
def test_batches_of_other_sizes_are_recorded_apart():
    own, plain = make_both()
    for n in (8, 5, 8, 5):
        assert_same_steps(own, plain, [batch(n) for _ in range(6)])


# --- errors


@pytest.mark.usefixtures("on_a_device")
def test_a_step_that_raises_changes_nothing():
    own, plain = make_both(clip_grad_max_norm=0.5)
    assert_same_steps(own, plain, [batch(), batch()])
    before, loss = snapshot(own), own.plain.loss_module

    def fail(*given):
        loss(*given)
        raise ValueError("in the middle")

    own.plain.compute = fail
    with pytest.raises(ValueError, match="in the middle"):
        own(*batch())
    torch.testing.assert_close(snapshot(own), before, rtol=0, atol=0)
    assert own.steps == 2 and own.optimizer.param_groups[0]["lr"] == 1e-2
    own.plain.compute = loss
    assert_same_steps(own, plain, [batch() for _ in range(6)])
    assert not hasattr(own.optimizer, "grad_scale") and not hasattr(own.optimizer, "found_inf")


@by_replays
def test_a_loss_that_reads_a_number_cannot_be_replayed():
    update = DeviceUpdate(make_update())
    loss = update.plain.loss_module
    update.plain.compute = lambda x, y: loss(x, y * y.sum().item())
    for _ in range(5):
        update(*batch())
    before = snapshot(update)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be recorded"):
            update(*batch())
    torch.testing.assert_close(snapshot(update), before, rtol=0, atol=0)
    assert update.steps == 5


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adam,
        torch.optim.SGD,
        partial(torch.optim.SGD, momentum=0.9, fused=True),
    ],
)
def test_an_optimizer_that_cannot_leave_it_to_the_device(optimizer):
    loss = Loss()
    update = Update(loss, optimizer(loss.parameters(), lr=1e-2))
    with pytest.raises(ValueError, match=r"cudagraphs: expected .*fused=True, without momentum"):
        DeviceUpdate(update)


@pytest.mark.usefixtures("on_a_device")
def test_targets_that_move_otherwise():
    update = make_update(updater=None)
    update.target_updater = HardUpdate(update.loss_module, value_network_update_interval=10)
    with pytest.raises(ValueError, match=r"cudagraphs: .*SoftUpdate, got Adam and HardUpdate"):
        DeviceUpdate(update)


def test_graphs_need_cuda():
    with pytest.raises(ValueError, match="cudagraphs: they need CUDA, got parameters on cpu"):
        DeviceUpdate(make_update())


@pytest.mark.gpu
def test_on_a_gpu():
    plain, own = make_update(clip_grad_max_norm=0.5), make_update(clip_grad_max_norm=0.5)
    own.loss_module.cuda()
    own = Update(
        own.loss_module,
        OPTIMIZERS["Adam"](own.loss_module.parameters(), fused=True),
        target_updater=ForeachSoftUpdate(own.loss_module, tau=0.1),
        clip_grad_max_norm=0.5,
    )
    own = DeviceUpdate(own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(20):
            given = poisoned() if i % 5 == 4 else batch()
            own(*(x.cuda() for x in given))
            plain(*given)
        assert own.skipped == plain.skipped == 4
    for key, expected in plain.loss_module.state_dict().items():
        found = own.plain.loss_module.state_dict()[key].cpu()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
