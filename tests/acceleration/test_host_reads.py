"""Where numbers are read from tensors, and where not."""

from types import SimpleNamespace

import pytest
import torch

from layeredrl_trl.acceleration import check_values, is_surely_none, peek
from layeredrl_trl.acceleration.host_reads import can_read, without_reading

X = torch.zeros(2)


class Wrong(Exception):
    pass


def test_a_cpu_can_be_read_and_a_gpu_would_have_to_be_waited_for():
    assert can_read(X)
    assert not can_read(SimpleNamespace(is_cuda=True))


def test_nothing_is_read_inside_of_without_reading():
    with without_reading():
        with without_reading():
            assert not can_read(X)
        assert not can_read(X)
    assert can_read(X)


def test_reading_goes_on_after_an_error():
    with pytest.raises(Wrong), without_reading():
        raise Wrong
    assert can_read(X)


def test_nothing_is_read_while_a_graph_is_made():
    """Reading a number would break it."""
    compiled = torch.compile(
        lambda x: x + 1 if can_read(x) else x - 1, backend="eager", fullgraph=True
    )
    assert compiled(torch.ones(1)) == 0


@pytest.mark.parametrize(
    ("flags", "holds"),
    [(True, True), (False, False), ([True], True), ([[True], [False]], False), ([], True)],
    ids=str,
)
def test_values_are_checked_wherever_they_are(flags, holds):
    made = []

    def error():
        made.append(1)
        return Wrong("of this kind")

    is_right = torch.tensor(flags, dtype=torch.bool)
    if holds:
        check_values(is_right, error)
        assert not made  # a text is made of an error only
    else:
        with pytest.raises(Wrong, match="of this kind"):
            check_values(is_right, error)


def test_values_that_would_cost_something_are_not_checked():
    wrong = torch.tensor([False])
    with without_reading():
        check_values(wrong, Wrong)

    def checked(x):
        check_values(x > 0, Wrong)
        return x + 1

    assert torch.compile(checked, backend="eager", fullgraph=True)(torch.zeros(1)) == 1
    with pytest.raises(Wrong):
        checked(torch.zeros(1))


def test_what_may_not_be_read_may_be_there():
    none, some = torch.tensor([False, False]), torch.tensor([False, True])
    assert is_surely_none(none) and not is_surely_none(some)
    with without_reading():
        assert not is_surely_none(none) and not is_surely_none(some)


def test_a_number_that_may_not_be_read_is_another_one():
    assert peek(torch.tensor(3), otherwise=7) == 3
    with without_reading():
        assert peek(torch.tensor(3), otherwise=7) == 7
