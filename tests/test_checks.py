"""Checks of plain arguments: what they accept, and what they say of what they refuse."""

import numpy as np
import pytest
import torch

from layeredrl_trl.checks import (
    check_count,
    check_counts,
    check_device,
    check_finite,
    check_flag,
    check_fraction,
    check_key,
    check_keys,
    check_precision,
    check_sizes,
)


def test_what_is_legal_passes():
    check_count("n", 1)
    check_count("n", np.int64(3))
    check_count("n", 0, least=0)
    check_counts(a=1, b=2)
    check_sizes("sizes", (8, 8))
    check_sizes("sizes", [])
    check_finite("x", 0.5, above=0)
    check_finite("x", np.float32(-1))
    check_flag("f", True)
    check_flag("f", np.bool_(False))
    check_flag("f", None, optional=True)
    check_key("k", "x")
    check_key("k", ("next", "x"))
    check_keys("ks", ["x", ("next", "x")], 2)
    check_keys("ks", ("x", "y", "z"), 3)
    check_keys("ks", [])
    for device in (None, "cpu", "cuda:1", torch.device("cpu"), 0):
        check_device("device", device)


@pytest.mark.parametrize("value", ["cud", "", "cuda:x"])
def test_a_device_that_is_none(value):
    with pytest.raises(ValueError, match=r"device must be a torch.device or a string like .*'cpu'"):
        check_device("device", value)


@pytest.mark.parametrize("value", [True, 1.5, ["cpu"]])
def test_what_names_no_device(value):
    with pytest.raises(TypeError, match=r"device must be a torch.device or a string"):
        check_device("device", value)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x,
        lambda x: x.cpu(),
        lambda x: x.float() if x.is_floating_point() else x,
        lambda x: x.double() if x.is_floating_point() else x,
    ],
)
def test_moving_a_module_loses_no_precision(fn):
    check_precision("Net", fn)


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (lambda x: x.half() if x.is_floating_point() else x, "torch.float32 .* torch.float16"),
        (lambda x: x.float(), "torch.int64 cannot be converted to torch.float32"),
    ],
)
def test_less_precision_is_refused_with_the_way_out(fn, text):
    with pytest.raises(TypeError, match=rf"Net computes in float32: .*{text}.* torch.autocast"):
        check_precision("Net", fn)


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


@pytest.mark.parametrize("value", ["cuda", 1, 0.0, None, [True]])
def test_what_is_no_flag(value):
    with pytest.raises(TypeError, match="f must be True or False, got"):
        check_flag("f", value)


def test_the_error_of_a_flag_names_the_kind_of_what_came():
    with pytest.raises(TypeError, match=r"f must be True or False, got 'cuda' \(str\)\."):
        check_flag("f", "cuda")
    with pytest.raises(TypeError, match=r"f must be True, False or None, got 1 \(int\)\."):
        check_flag("f", 1, optional=True)


@pytest.mark.parametrize("value", [None, 3, ["x"], (), ("x", 1)])
def test_what_is_no_key(value):
    with pytest.raises(TypeError, match="k must be a string or a tuple of strings, got"):
        check_key("k", value)


def test_a_string_is_not_split_into_keys():
    with pytest.raises(TypeError, match=r"ks must be a sequence of keys, as in \['x'\], got 'x'"):
        check_keys("ks", "x", 1)


@pytest.mark.parametrize("value", [None, 3, {"x"}])
def test_what_is_no_sequence_of_keys(value):
    with pytest.raises(TypeError, match=r"ks must be a sequence of keys, as in \['x'\], got"):
        check_keys("ks", value)


def test_sequences_that_hold_no_keys_or_too_many():
    with pytest.raises(TypeError, match=r"ks\[1\] must be a string or a tuple of strings, got 2"):
        check_keys("ks", ["x", 2])
    with pytest.raises(ValueError, match=r"ks must hold 2 key\(s\), got 3: \['x', 'y', 'z'\]"):
        check_keys("ks", ["x", "y", "z"], 2)


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.3)])
def test_a_fraction(value):
    check_fraction("gamma", value)


@pytest.mark.parametrize("value", [True, "0.5", None, torch.tensor(0.5)])
def test_what_is_no_number_is_no_fraction(value):
    with pytest.raises(TypeError, match="gamma must be a number, got"):
        check_fraction("gamma", value)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_fraction_out_of_its_range(value):
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got"):
        check_fraction("gamma", value)
