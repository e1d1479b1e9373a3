"""Learning in compiled code, and what happens where compiling fails."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from tests.predictors.test_reward_predictor import (
    filled_buffer,
    learn,
    small_predictor,
    snapshot,
)


class NoCompiler:
    """A ``torch.compile`` whose functions fail when they are called, or when they are backward."""

    def __init__(self, when):
        self.when, self.functions = when, []

    def __call__(self, function):
        self.functions.append(function)

        def fail(*_):
            raise TorchDynamoException("no compiler here\nat all")

        def call(*batch):
            if self.when == "forward":
                fail()
            losses = function(*batch)
            losses.get("loss_consistency").register_hook(fail)
            return losses

        return call


@pytest.fixture(params=["forward", "backward"])
def no_compiler(request, monkeypatch):
    fake = NoCompiler(request.param)
    monkeypatch.setattr(torch, "compile", fake)
    return fake


def test_what_cannot_be_compiled_is_learned_without(no_compiler):
    """A batch for which compiling failed counts once, also where forward had gone through."""
    toy = filled_buffer()
    eager, other = (small_predictor(encoder_warm_up=0) for _ in range(2))
    other.load_state_dict(eager.state_dict())
    other.update.compute = other._compiled_losses()  # as on CUDA
    learn(eager, toy, n_steps=5, seed=1)
    with pytest.warns(UserWarning, match="cannot be compiled.*: no compiler here$"):
        learn(other, toy, n_steps=5, seed=1)
    torch.testing.assert_close(snapshot(other), snapshot(eager), rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(other, toy, n_steps=5, seed=1)


def test_what_must_be_compiled_raises_and_changes_nothing(no_compiler):
    toy, predictor = filled_buffer(), small_predictor(compile=True)
    learn(predictor, toy, n_steps=2)
    before = snapshot(predictor)
    for _ in range(2):
        with pytest.raises(TorchDynamoException, match="no compiler here"):
            learn(predictor, toy, n_steps=1)
    torch.testing.assert_close(snapshot(predictor), before, rtol=0, atol=0)
    assert predictor.update.steps == 2


def test_compiling_is_reported_once(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    predictor, eager, data = small_predictor(compile=True), small_predictor(), filled_buffer()
    with caplog.at_level("INFO", logger="torchrl"):
        learn(predictor, data, n_steps=2)
        assert "compiled" not in caplog.text
        for p in (predictor, eager):
            learn(p, data, n_steps=5)
    assert caplog.text.count("a learning step was compiled in") == 1


def test_predictors_on_the_cpu_compile_nothing_unless_asked(no_compiler):
    learn(small_predictor(), filled_buffer(), n_steps=4)
    assert no_compiler.functions == []


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize(
    "options",
    [
        {"compile": True, "cudagraphs": False},
        {"compile": False, "cudagraphs": True},
        {"compile": True, "cudagraphs": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("parts", [{"n_models": 1}, {"n_models": 2, "value": "q"}], ids=str)
def test_compiled_and_replayed_learning_is_eager_learning(options, parts):
    data, results = filled_buffer(), []
    for chosen in ({"compile": False, "cudagraphs": False}, options):
        torch.manual_seed(2)
        predictor = small_predictor(device="cuda", **parts, **chosen)
        for seed in range(3):
            _, info = learn(predictor, data, n_steps=8, seed=seed)
        results.append((snapshot(predictor), info))
    for key, expected in results[0][0].items():
        torch.testing.assert_close(results[1][0][key], expected, rtol=1e-3, atol=1e-4)
    assert results[1][1]["nll"] == pytest.approx(results[0][1]["nll"], rel=1e-3, abs=1e-3)
