"""The script for a GPU goes on after a failure, and ends in time."""

import warnings

import pytest

from benchmarks.gpu import FIRST, Jobs
from benchmarks.workloads import WORKLOADS


def fail():
    raise ValueError("this went wrong")


def warn():
    warnings.warn("it cannot be replayed", stacklevel=1)


def test_every_workload_is_measured():
    assert sorted(FIRST) == sorted(WORKLOADS)


@pytest.mark.parametrize(("work", "said"), [(fail, "this went wrong"), (warn, "WARNED")])
def test_goes_on_after_what_fails(work, said, capsys):
    jobs, done = Jobs(minutes=1), []
    jobs.do("one", work)
    jobs.do("other", lambda: done.append(1))
    assert done == [1]
    assert jobs.finish() == 1
    out = capsys.readouterr().out
    assert said in out
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
