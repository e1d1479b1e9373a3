"""The script for a GPU goes on after a failure, and ends in time."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

from benchmarks import gpu
from benchmarks.gpu import FIRST, WAYS, Jobs, ways_on
from benchmarks.workloads import WORKLOADS, Workload
from tests.replaying import replays  # noqa: F401

SMALL = Workload("small", 2, 2, 1, 1, model_hidden=(8,), hidden=(8,))


def fail():
    raise ValueError("this went wrong")


def test_every_workload_is_measured():
    assert sorted(FIRST) == sorted(WORKLOADS)


def test_goes_on_after_what_fails(capsys):
    jobs, done = Jobs(minutes=1), []
    jobs.do("one", fail)
    jobs.do("other", lambda: done.append(1))
    assert done == [1]
    assert jobs.finish() == 1
    out = capsys.readouterr().out
    assert "this went wrong" in out
    assert "1 failed\n- one\n" in out
    assert "0 left out" in out


def test_begins_nothing_when_the_time_is_over(capsys):
    jobs = Jobs(minutes=0)
    jobs.do("late", fail)
    assert jobs.finish() == 1
    assert "0 failed" in (out := capsys.readouterr().out)
    assert "1 left out\n- late" in out


def test_all_done_is_said_by_the_exit_status():
    jobs = Jobs(minutes=1)
    jobs.do("fine", lambda: None)
    assert jobs.finish() == 0


def test_on_a_cpu_no_graph_is_replayed():
    assert ways_on("cpu") == ["eager", "compiled"]
    assert ways_on("cuda") == list(WAYS)


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("way", ["replayed", "CudaGraphModule"])
def test_ways_to_replay_are_held_to_the_eager_one(way, monkeypatch):
    """By the stand-in for CUDA graphs; TensorDict's own just calls the function here."""
    monkeypatch.setattr(gpu, "CudaGraphModule", lambda function, **_: function)
    monkeypatch.setitem(WAYS, way, WAYS[way]._replace(compile=False))
    gpu.check_learning(SMALL, "cpu", way)
    gpu.check_imagining(SMALL, "cpu", way)


@pytest.mark.usefixtures("replays")
def test_a_way_that_computes_something_else_is_found(monkeypatch):
    def zeros(function):
        return lambda *given: tree_map_only(torch.Tensor, torch.zeros_like, function(*given))

    wrong = WAYS["replayed"]._replace(replay=zeros)
    monkeypatch.setitem(WAYS, "wrong", wrong)
    with pytest.raises(AssertionError):
        gpu.check_imagining(SMALL, "cpu", "wrong")
