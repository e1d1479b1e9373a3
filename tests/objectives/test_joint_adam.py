"""Groups of like options moved together are moved as ``torch.optim.Adam`` moves them."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from layeredrl_trl.objectives.joint_adam import step_jointly

SHAPES = {"a": [(3, 4), (4,)], "b": [(5,)], "c": [(2, 2), ()], "d": [(1,)]}


def make_params():
    torch.manual_seed(0)
    return {
        name: [nn.Parameter(torch.randn(shape)) for shape in shapes]
        for name, shapes in SHAPES.items()
    }


def make_optimizer(params, common, own=()):
    groups = [{"params": ps, "name": name} | dict(own).get(name, {}) for name, ps in params.items()]
    return torch.optim.Adam(groups, **{"fused": True, **common})


def set_grads(params, step, without=()):
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(p for ps in params.values() for p in ps):
        p.grad = None if i in without else torch.randn(p.shape, generator=generator)


def count_kernels(monkeypatch):
    calls, kernel = [], torch._fused_adam_

    def spy(*args, **options):
        calls.append(len(args[0]))
        return kernel(*args, **options)

    monkeypatch.setattr(torch, "_fused_adam_", spy)
    return calls


def assert_same_steps(common, own=(), *, withouts=((), (), ()), rates=None):
    """Bit for bit, the state too."""
    sides = []
    for take in (lambda o: o.step(), step_jointly):
        params = make_params()
        optimizer = make_optimizer(params, common, own)
        for step, without in enumerate(withouts):
            for group in optimizer.param_groups:
                group["lr"] = (rates or {}).get((step, group["name"]), group["lr"])
            set_grads(params, step, without)
            take(optimizer)
        sides.append((params, optimizer.state_dict()["state"]))
    torch.testing.assert_close(*sides, rtol=0, atol=0)


@pytest.mark.parametrize(
    "common",
    [
        {},
        {"lr": 0.1, "weight_decay": 0.1},
        {"betas": (0.5, 0.9), "eps": 1e-2},
        {"maximize": True},
        {"amsgrad": True},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
        {"fused": False},
        {"fused": None, "foreach": True},
        {"fused": False, "capturable": False, "differentiable": False, "lr": torch.tensor(0.1)},
        {"lr": 1},
        {"lr": torch.tensor(0.1)},
        {"betas": [0.5, 0.9]},
    ],
    ids=str,
)
def test_it_is_adam(common):
    assert_same_steps(common)


@pytest.mark.parametrize(
    "own", [{"b": {"lr": 0.1}}, {"a": {"eps": 0.1}, "d": {"maximize": True}}, {"c": {"lr": 0.0}}]
)
def test_groups_with_options_of_their_own(own):
    assert_same_steps({"lr": 0.01}, own)


def test_options_read_from_json():
    """They are lists then."""
    sides = []
    for take in (lambda o: o.step(), step_jointly):
        params = make_params()
        optimizer = make_optimizer(params, {})
        for step in range(3):
            state = optimizer.state_dict()
            state["param_groups"] = json.loads(json.dumps(state["param_groups"]))
            optimizer.load_state_dict(state)
            set_grads(params, step)
            take(optimizer)
        sides.append((params, optimizer.state_dict()["state"]))
    torch.testing.assert_close(*sides, rtol=0, atol=0)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_gradients_that_are_scaled(found_inf):
    sides = []
    for take in (lambda o: o.step(), step_jointly):
        params = make_params()
        optimizer = make_optimizer(params, {})
        for step in range(2):
            set_grads(params, step)
            if step:
                optimizer.grad_scale = torch.tensor(2.0)
                optimizer.found_inf = torch.tensor(found_inf)
            take(optimizer)
        sides.append((params, optimizer.state_dict()["state"]))
    torch.testing.assert_close(*sides, rtol=0, atol=0)


def test_a_state_that_was_only_asked_for():
    params = make_params()
    optimizer = make_optimizer(params, {})
    assert not optimizer.state[params["a"][0]]
    set_grads(params, 0)
    step_jointly(optimizer)
    assert all(optimizer.state[p]["step"] == 1 for ps in params.values() for p in ps)


def test_rates_that_change():
    assert_same_steps({"lr": 0.01}, rates={(1, "a"): 0.1, (2, "a"): 0.01, (2, "d"): 0.5})


def test_parameters_without_a_gradient():
    """Some learn later, as in the encoder's warm-up; their first step is their own."""
    assert_same_steps({}, withouts=((0, 1, 2), (0, 1), (5,), (), range(6), ()))


def test_groups_alike_take_one_kernel(monkeypatch):
    calls = count_kernels(monkeypatch)
    params = make_params()
    optimizer = make_optimizer(params, {"lr": 0.01}, {"d": {"lr": 0.1}})
    for step in range(2):
        set_grads(params, step)
        calls.clear()
        step_jointly(optimizer)
    assert calls == [5, 1]


def test_who_looks_at_steps_sees_them():
    params = make_params()
    seen = []
    for register in (
        lambda o: o.register_step_pre_hook(lambda *_: seen.append("pre")),
        lambda o: o.register_step_post_hook(lambda *_: seen.append("post")),
        lambda o: register_optimizer_step_pre_hook(lambda *_: seen.append("before all")),
        lambda o: register_optimizer_step_post_hook(lambda *_: seen.append("all")),
    ):
        optimizer = make_optimizer(params, {})
        handle = register(optimizer)
        try:
            for step in range(2):
                set_grads(params, step)
                step_jointly(optimizer)
        finally:
            handle.remove()
    assert seen == [x for x in ("pre", "post", "before all", "all") for _ in range(2)]


def test_a_step_in_the_place_of_the_optimisers_is_taken():
    """As a scheduler puts one there, to count."""
    params = make_params()
    optimizer = make_optimizer(params, {})
    StepLR(optimizer, 1)
    own, seen = optimizer.step, []
    optimizer.step = lambda: (seen.append(1), own())
    for step in range(3):
        set_grads(params, step)
        step_jointly(optimizer)
    assert len(seen) == 3


class Noted(torch.optim.Adam):
    n_steps = 0

    def step(self, closure=None):
        self.n_steps += 1
        return super().step(closure)


def test_other_optimisers_take_their_own_step():
    params = make_params()
    optimizer = Noted([p for ps in params.values() for p in ps], fused=True)
    for step in range(3):
        set_grads(params, step)
        step_jointly(optimizer)
    assert optimizer.n_steps == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype, monkeypatch):
    calls = count_kernels(monkeypatch)
    sides = []
    for take in (lambda o: o.step(), step_jointly):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, dtype=dtype))]
        optimizer = torch.optim.Adam(params, fused=True)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            take(optimizer)
        sides.append((params, optimizer.state_dict()["state"]))
    torch.testing.assert_close(*sides, rtol=0, atol=0)
    assert calls == [1] * 8  # a kernel for each dtype


def test_an_error_changes_nothing():
    params = [nn.Parameter(torch.ones(3, 2))]
    optimizer = torch.optim.Adam(params, fused=True)
    params[0].grad = torch.ones(3, 2)
    step_jointly(optimizer)
    before = copy.deepcopy((params, optimizer.state_dict()))
    params[0].grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        step_jointly(optimizer)
    torch.testing.assert_close((params, optimizer.state_dict()), before, rtol=0, atol=0)
