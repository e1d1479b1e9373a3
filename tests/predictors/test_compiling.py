"""Compiled functions, and what happens where compiling fails."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from layeredrl_trl.predictors.compiling import compiled
from tests.predictors.test_reward_predictor import (
    filled_buffer,
    learn,
    small_predictor,
    snapshot,
)


class NoCompiler:
    """A ``torch.compile`` that fails when its function is called."""

    def __init__(self, error):
        self.error, self.calls, self.modes = error, 0, []

    def __call__(self, function, mode=None):
        self.modes.append(mode)

        def fail(*args):
            self.calls += 1
            raise self.error

        return fail


def double(x):
    return 2 * x


@pytest.fixture
def no_compiler(monkeypatch):
    fake = NoCompiler(TorchDynamoException("no compiler here\nat all"))
    monkeypatch.setattr(torch, "compile", fake)
    return fake


def test_what_cannot_be_compiled_goes_on_without(no_compiler):
    call = compiled(double, or_eager=True)
    with pytest.warns(UserWarning, match="double cannot be compiled.*: no compiler here$"):
        assert call(torch.tensor(2.0)) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(torch.tensor(3.0)) == 6
    assert no_compiler.calls == 1


def test_what_must_be_compiled_raises(no_compiler):
    for _ in range(2):
        with pytest.raises(TorchDynamoException, match="no compiler here"):
            compiled(double)(torch.tensor(2.0))


def test_other_errors_are_raised(no_compiler):
    no_compiler.error = ValueError("of another kind")
    with pytest.raises(ValueError, match="of another kind"):
        compiled(double, or_eager=True)(torch.tensor(2.0))


def test_graphs_are_a_mode_of_the_compiler(no_compiler):
    compiled(double)
    compiled(double, cudagraphs=True)
    assert no_compiler.modes == [None, "reduce-overhead"]


def test_predictors_on_the_cpu_compile_nothing_unless_asked(no_compiler):
    learn(small_predictor(), filled_buffer(), n_steps=4)
    assert no_compiler.modes == []
    with pytest.raises(TorchDynamoException):
        learn(small_predictor(compile=True), filled_buffer(), n_steps=4)


@pytest.mark.parametrize("compile", [None, True, False])
def test_graphs_need_cuda(compile):
    with pytest.raises(ValueError, match=f"cudagraphs.*compile={compile} and device cpu"):
        small_predictor(compile=compile, cudagraphs=True)


@pytest.mark.gpu
def test_graphs_need_compiled_code():
    with pytest.raises(ValueError, match="cudagraphs"):
        small_predictor(compile=False, cudagraphs=True, device="cuda")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("options", [{"compile": True}, {"cudagraphs": True}], ids=str)
@pytest.mark.parametrize("parts", [{"n_models": 1}, {"n_models": 2, "value": "q"}], ids=str)
def test_compiled_learning_is_eager_learning(options, parts):
    data, results = filled_buffer(), []
    for chosen in ({"compile": False}, options):
        torch.manual_seed(2)
        predictor = small_predictor(device="cuda", **parts, **chosen)
        for seed in range(3):
            _, info = learn(predictor, data, n_steps=8, seed=seed)
        results.append((snapshot(predictor), info))
    for key, expected in results[0][0].items():
        torch.testing.assert_close(results[1][0][key], expected, rtol=1e-3, atol=1e-4)
    assert results[1][1]["nll"] == pytest.approx(results[0][1]["nll"], rel=1e-3, abs=1e-3)
