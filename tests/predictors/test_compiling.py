"""Learning in compiled code, and what happens where none can be made."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from tests.oracles_predictors import filled_buffer
from tests.small_predictors import learn, small_predictor, snapshot


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


def test_what_must_be_compiled_raises_and_changes_nothing(no_compiler):
    toy, predictor = filled_buffer(), small_predictor(compile=True)
    learn(predictor, toy, n_steps=2)
    before = snapshot(predictor)
    for _ in range(2):
        with pytest.raises(TorchDynamoException, match="no compiler here"):
            learn(predictor, toy, n_steps=1)
    torch.testing.assert_close(snapshot(predictor), before, rtol=0, atol=0)
    assert predictor.update.steps == 2


def test_nothing_is_compiled_unless_it_is_asked_for(no_compiler):
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
