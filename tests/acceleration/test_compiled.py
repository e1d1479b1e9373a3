"""When generated code is called in place of a function, and when the function itself.

That a step of imagination or of learning gives the same numbers in generated code is shown where
these are tested: ``tests/envs/test_compiled_imagination.py`` and ``tests/predictors``.
"""

import copy
import itertools
import pickle

import pytest
import torch
from torch._dynamo import config as dynamo_config

from layeredrl_trl.acceleration import CompiledLoss, CompiledStep, compiled
from layeredrl_trl.acceleration.ensemble_rollout import _step


def double(x, times=2):
    return times * x


def triple(x):
    return 3 * x


class Compiler:
    """In place of ``torch.compile``: gives functions that note their calls."""

    def __init__(self):
        self.functions, self.options, self.calls = [], [], []

    def __call__(self, function, **options):
        self.functions.append(function)
        self.options.append(options)

        def call(*arguments):
            self.calls.append(arguments)
            self.limit = dynamo_config.recompile_limit
            return function(*arguments)

        return call


@pytest.fixture
def compiler(monkeypatch):
    fake = Compiler()
    compiled._compile.cache_clear()
    monkeypatch.setattr(torch, "compile", fake)
    yield fake
    compiled._compile.cache_clear()


@pytest.fixture
def slow(monkeypatch):
    """Every call takes two seconds."""
    seconds = itertools.count(step=2.0)
    monkeypatch.setattr(compiled.time, "perf_counter", lambda: next(seconds))


# --- steps


@torch.no_grad()
def test_a_step_is_compiled_once_in_a_process(compiler):
    for step in (CompiledStep(double), CompiledStep(double)):
        for n in (1, 2):
            assert torch.equal(step(torch.ones(n), 4), torch.full((n,), 4.0))
    CompiledStep(triple)(torch.ones(1))
    assert compiler.functions == [double, triple]
    assert len(compiler.calls) == 5


def test_a_step_that_a_gradient_is_asked_of_is_not_compiled(compiler):
    x = torch.ones(2, requires_grad=True)
    CompiledStep(double)(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0)) and not compiler.functions


@torch.no_grad()
def test_a_step_inside_of_other_compiled_code_is_a_part_of_it(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *_, **__: 1 / 0)
    outer = compile(CompiledStep(double), backend="eager", fullgraph=True)
    assert torch.equal(outer(torch.ones(3)), torch.full((3,), 2.0))


@torch.no_grad()
def test_what_arguments_are_views_of_is_not_looked_at(compiler):
    x = torch.randn(3, 4)
    CompiledStep(double)(x[:, 1:], 3)
    ((given, times),) = compiler.calls
    assert given._base is None and times == 3
    assert torch.equal(given, x[:, 1:])


@torch.no_grad()
def test_a_step_draws_by_the_generator_of_torch_in_many_variants(compiler):
    before = dynamo_config.recompile_limit
    CompiledStep(double)(torch.ones(1))
    assert compiler.options == [{"options": {"fallback_random": True}}]
    assert compiler.limit > before == dynamo_config.recompile_limit


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("function", [double, _step], ids=["own", "of an ensemble"])
def test_copies_of_a_step_share_its_code(copied, function, compiler):
    step = CompiledStep(function)
    assert copied(step).function is function
    compiled._compile(copied(step).function)
    compiled._compile(step.function)
    assert compiler.functions == [function]


# --- losses


def test_a_loss_is_compiled_from_the_third_call_on(compiler):
    plain = []

    def loss(x):
        plain.append(1)
        return {"loss_a": x.square().sum()}

    compute = CompiledLoss(loss)
    assert compiler.functions == [loss]
    for i in range(5):
        x = torch.full((2,), float(i), requires_grad=True)
        compute(x)["loss_a"].backward()
        assert torch.equal(x.grad, 2 * x.detach())
        assert len(compiler.calls) == max(0, i - 1)
    assert len(plain) == 5


def test_each_loss_has_code_of_its_own(compiler):
    for _ in range(2):
        CompiledLoss(double)
    assert compiler.functions == [double, double]


# --- what is said


@pytest.mark.usefixtures("compiler", "slow")
@pytest.mark.parametrize(
    ("kind", "what"), [(CompiledStep, "a step of imagination"), (CompiledLoss, "a learning step")]
)
@torch.no_grad()
def test_compiling_is_reported_once(kind, what, caplog):
    call = kind(double)
    with caplog.at_level("INFO", logger="torchrl"):
        for _ in range(5):
            call(torch.zeros(()))
    assert caplog.text.count(f"{what} was compiled in 2.0 s") == 1
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_calls_that_compile_nothing_are_not_reported(caplog):
    with caplog.at_level("INFO", logger="torchrl"):
        for call in (CompiledStep(double), CompiledLoss(double)):
            for _ in range(5):
                call(torch.zeros(()))
    assert not caplog.text


@pytest.mark.usefixtures("compiler", "slow")
def test_plain_calls_of_a_loss_are_not_reported_however_long_they_take(caplog):
    compute = CompiledLoss(double)
    with caplog.at_level("INFO", logger="torchrl"):
        for _ in range(CompiledLoss.n_plain_calls):
            compute(torch.zeros(()))
    assert not caplog.text
