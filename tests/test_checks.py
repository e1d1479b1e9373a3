"""Checks of plain numbers: what they accept, and what they say of what they refuse."""

import numpy as np
import pytest

from layeredrl_trl.checks import check_count, check_counts, check_finite, check_sizes


def test_what_is_legal_passes():
    check_count("n", 1)
    check_count("n", np.int64(3))
    check_count("n", 0, least=0)
    check_counts(a=1, b=2)
    check_sizes("sizes", (8, 8))
    check_sizes("sizes", [])
    check_finite("x", 0.5, above=0)
    check_finite("x", np.float32(-1))


@pytest.mark.parametrize("value", [2.0, True, "2", None])
def test_what_is_no_integer_is_no_count(value):
    with pytest.raises(TypeError, match="n must be an integer, got"):
        check_count("n", value)


def test_a_count_below_its_least():
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        check_count("n", -1, least=0)
    with pytest.raises(ValueError, match="b must be at least 1, got 0"):
        check_counts(a=1, b=0)


@pytest.mark.parametrize("value", [32, "32", 3.0, None])
def test_what_is_no_sequence_of_sizes(value):
    with pytest.raises(TypeError, match="sizes must be a sequence of integers"):
        check_sizes("sizes", value)


def test_a_size_that_is_none():
    with pytest.raises(TypeError, match=r"sizes\[1\] must be an integer, got 2.0"):
        check_sizes("sizes", (3, 2.0))
    with pytest.raises(ValueError, match=r"sizes\[0\] must be at least 1, got 0"):
        check_sizes("sizes", (0,))


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (float("inf"), ValueError, "x must be finite, got inf"),
        (float("nan"), ValueError, "x must be finite, got nan"),
        (0.0, ValueError, "x must be positive, got 0.0"),
        ("1", TypeError, "x must be a number, got '1'"),
        (True, TypeError, "x must be a number"),
    ],
)
def test_numbers_that_are_not_finite_or_positive(value, error, text):
    with pytest.raises(error, match=text):
        check_finite("x", value, above=0)
