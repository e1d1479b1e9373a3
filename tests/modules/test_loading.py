"""A state is loaded as a whole or not at all, whatever goes wrong."""

import copy
import io

import pytest
import torch
from torch import nn

from layeredrl_trl.modules import (
    ProbabilisticEnsemble,
    RewardNet,
    SymmetryBreakingStart,
    ValueNet,
)
from layeredrl_trl.modules.loading import LoadsWhole, check_state

SMALL = {"hidden_sizes": (4,)}


class Counter(nn.Module):
    """Has extra state, and refuses some of it only when it is set."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]
        if self.count < 0:
            raise KeyboardInterrupt if self.count == -2 else ValueError("a count below 0")


class Checked(Counter):
    def check_extra_state(self, state):
        if state["count"] < 0:
            raise ValueError("refused before")


class Net(LoadsWhole):
    """A layer before and one after a part with extra state; a tied tensor, and buffers."""

    def __init__(self, size=2, counter=Counter):
        super().__init__()
        self.first = nn.Linear(3, size)
        self.counter = counter()
        self.last = nn.Linear(size, size)
        self.tied = self.last
        self.register_buffer("flag", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def content(module):
    """Every tensor by identity and number, and every extra state."""
    state = module.state_dict(keep_vars=True)
    return {
        name: (id(x), x.detach().clone(), x.dtype) if isinstance(x, torch.Tensor) else x
        for name, x in state.items()
    }


def is_the_same(module, before) -> bool:
    after = content(module)
    return after.keys() == before.keys() and all(
        after[name] == x
        if isinstance(x, dict)
        else (after[name][0] == x[0] and torch.equal(after[name][1], x[1]))
        for name, x in before.items()
    )


PARTS = {
    "net": Net,
    "ensemble": lambda: ProbabilisticEnsemble(3, 0, 1, n_models=2, n_modes=2, **SMALL),
    "start": lambda: SymmetryBreakingStart(ProbabilisticEnsemble(3, 0, 1, **SMALL), 10),
    "reward": lambda: RewardNet(3, 0, 1, **SMALL),
    "value": lambda: ValueNet(3, 0, **SMALL),
}
every_part = pytest.mark.parametrize("make", PARTS.values(), ids=PARTS.keys())


@every_part
@pytest.mark.parametrize("through_file", [False, True])
def test_a_state_that_fits_is_loaded_in_place(make, through_file):
    one, other = make(), make()
    before, state = content(other), one.state_dict()
    if through_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file)
    found = other.load_state_dict(state)
    assert found.missing_keys == [] and found.unexpected_keys == []
    for name, x in content(other).items():
        if not isinstance(x, dict):
            assert x[0] == before[name][0] and torch.equal(x[1], one.state_dict()[name])


def last(state) -> str:
    """The entry that is loaded last; the error came after all others had been copied."""
    return [name for name, x in state.items() if isinstance(x, torch.Tensor)][-1]


FAULTS = {
    "missing": (lambda s: {k: x for k, x in s.items() if k != last(s)}, "missing: {last}"),
    "unexpected": (lambda s: s | {"more": torch.zeros(1)}, "unexpected: more"),
    "shape": (
        lambda s: s | {last(s): torch.zeros(7, 7)},
        r"different: {last} \(expected shape .*, got \[7, 7\]\)",
    ),
    "no tensor": (lambda s: s | {last(s): [1.0]}, r"{last} \(expected a tensor, got list\)"),
    "bool": (lambda s: s | {last(s): ~s[last(s)].bool()}, r"{last} \(expected .*, got torch.bool"),
    "complex": (lambda s: s | {last(s): s[last(s)] + 0j}, r"{last} \(expected .*, got torch.comp"),
    "half precision": (lambda s: s | {last(s): s[last(s)].half()}, r"{last} \(expected .*float16"),
    "nan": (
        lambda s: s | {last(s): torch.full_like(s[last(s)], torch.nan)},
        r"{last} \(expected finite numbers, got \d+ that are not\)",
    ),
    "infinite": (
        lambda s: s | {last(s): torch.full_like(s[last(s)], -torch.inf)},
        r"{last} \(expected finite numbers, got \d+ that are not\)",
    ),
    "too large": (
        lambda s: s | {last(s): torch.full_like(s[last(s)], 1e300, dtype=torch.float64)},
        r"{last} \(expected finite numbers, got \d+ that are not\)",
    ),
    "integer": (
        lambda s: s | {last(s): s[last(s)].long()},
        r"{last} \(expected .*, got torch.int64",
    ),
}


@every_part
@pytest.mark.parametrize("fault", FAULTS)
def test_a_state_that_does_not_fit_changed_what_came_before(make, fault):
    change, text = FAULTS[fault]
    module, state = make(), make().state_dict()
    before, name = content(module), last(state).replace(".", r"\.")
    with pytest.raises(RuntimeError, match=f"load_state_dict: .*{text.format(last=name)}"):
        module.load_state_dict(change(dict(state)))
    assert is_the_same(module, before)


class Masked(LoadsWhole):
    """Buffers that are infinite or NaN on purpose."""

    may_be_non_finite = frozenset({"least"})

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("least", torch.tensor(torch.inf))


def test_buffers_that_are_not_finite_on_purpose():
    module, saved = Masked(), Masked()
    module.least.fill_(3.0)
    module.load_state_dict(saved.state_dict())
    assert module.least == torch.inf and torch.equal(module.mask, saved.mask)
    outer, state = nn.Sequential(module), nn.Sequential(saved).state_dict()
    check_state(outer, state)
    with pytest.raises(RuntimeError, match=r"0.mask \(expected finite numbers, got 1 that"):
        check_state(outer, state | {"0.mask": torch.full((2,), -torch.inf)})


def test_a_module_that_diverged_takes_no_nan_but_finite_numbers():
    module, good = Net(), Net().state_dict()
    nn.init.constant_(module.first.weight, torch.nan)
    with pytest.raises(RuntimeError, match=r"first.weight .expected finite numbers, got 6 that"):
        module.load_state_dict(module.state_dict())
    module.load_state_dict(good)
    assert torch.equal(module.first.weight, good["first.weight"])


def test_without_strict_names_may_differ_but_not_shapes():
    module, other = Net(), Net()
    state = other.state_dict()
    del state["last.weight"]
    found = module.load_state_dict(state | {"more": torch.zeros(1)}, strict=False)
    assert found.missing_keys == ["last.weight"] and found.unexpected_keys == ["more"]
    assert torch.equal(module.first.weight, other.first.weight)
    before = content(module)
    with pytest.raises(RuntimeError, match=r"tied.weight \(expected shape \[2, 2\], got \[5\]"):
        module.load_state_dict(state | {"tied.weight": torch.zeros(5)}, strict=False)
    assert is_the_same(module, before)


def test_numbers_of_another_precision_are_cast_but_not_assigned():
    module, other = Net(), Net()
    state = other.state_dict() | {"first.weight": other.first.weight.detach().double()}
    module.load_state_dict(state)
    assert module.first.weight.dtype is torch.float32
    assert torch.equal(module.first.weight, other.first.weight)
    before = content(module)
    with pytest.raises(RuntimeError, match=r"first.weight \(expected torch.float32, got .*64"):
        module.load_state_dict(state, assign=True)
    assert is_the_same(module, before)


def test_assigned_tensors_are_those_of_the_state():
    module, state = Net(), copy.deepcopy(Net().state_dict())
    module.load_state_dict(state, assign=True)
    assert module.first.weight.data_ptr() == state["first.weight"].data_ptr()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("count", "error"), [(-1, ValueError), (-2, KeyboardInterrupt)])
def test_a_load_that_fails_halfway_is_undone(assign, count, error):
    module, state = Net(), copy.deepcopy(Net().state_dict())
    module.counter.count = 3
    before = content(module)
    with pytest.raises(error):
        module.load_state_dict(state | {"counter._extra_state": {"count": count}}, assign=assign)
    assert is_the_same(module, before) and module.counter.count == 3
    assert module.tied is module.last


def test_extra_state_is_checked_before_anything_is_loaded():
    module, state = Net(counter=Checked), Net(counter=Checked).state_dict()
    state |= {"counter._extra_state": {"count": -1}, "more": torch.zeros(1)}
    with pytest.raises(ValueError, match="refused before"):
        module.load_state_dict(state)
    with pytest.raises(RuntimeError, match="unexpected: more"):
        module.load_state_dict(state | {"counter._extra_state": {"count": 1}})
    assert module.counter.count == 0


@pytest.mark.parametrize("state", [None, 5, [("first.weight", torch.zeros(2, 3))]])
def test_what_is_no_state(state):
    module = Net()
    before = content(module)
    with pytest.raises(TypeError, match="dict-like"):
        module.load_state_dict(state)
    assert is_the_same(module, before)


def test_only_some_of_many_entries_are_named():
    module = LoadsWhole()
    module.layers = nn.Sequential(*(nn.Linear(1, 1) for _ in range(9)))
    with pytest.raises(RuntimeError, match=r"missing: layers.0.weight, .* and 13 more"):
        module.load_state_dict({})


class Renamed(nn.Linear):
    """Was called by another name in an older version, and loads that, too."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module, state, prefix, *_):
        if f"{prefix}w" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}w")


class Widened(nn.Linear):
    """Fills up weights of an older version that were narrower."""

    def __init__(self):
        super().__init__(3, 2)

    def _load_from_state_dict(self, state, prefix, *args):
        weight = state[f"{prefix}weight"]
        state[f"{prefix}weight"] = nn.functional.pad(weight, (0, 3 - weight.shape[1]))
        super()._load_from_state_dict(state, prefix, *args)


@pytest.mark.parametrize("place", ["root", "part"])
def test_a_part_may_adapt_an_older_state(place):
    class Old(LoadsWhole):
        def __init__(self):
            super().__init__()
            self.renamed, self.widened, self.lazy = Renamed(), Widened(), nn.LazyLinear(2)

    class OldRoot(LoadsWhole, Renamed):
        pass

    weight = torch.ones(2, 2)
    if place == "root":
        module = OldRoot()
        module.load_state_dict({"w": weight, "bias": torch.zeros(2)})
        assert torch.equal(module.weight, weight)
        return
    module = Old()
    state = {"renamed.w": weight, "renamed.bias": torch.zeros(2)}
    state |= {"widened.weight": weight, "widened.bias": torch.zeros(2)}
    state |= {"lazy.weight": torch.ones(2, 5), "lazy.bias": torch.ones(2)}
    module.load_state_dict(state)
    assert torch.equal(module.renamed.weight, weight)
    assert torch.equal(module.widened.weight, nn.functional.pad(weight, (0, 1)))
    assert module.lazy.weight.shape == (2, 5)
    with pytest.raises(RuntimeError):  # torch finds it, so what was loaded is put back
        Old().load_state_dict(state | {"renamed.w": torch.ones(3)})


def test_the_check_alone_changes_nothing():
    module = Net()
    before = content(module)
    check_state(module, Net().state_dict())
    assert is_the_same(module, before)
