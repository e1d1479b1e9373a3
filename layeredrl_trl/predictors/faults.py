"""What is wrong with a replay buffer from which nothing, or not everything, can be learned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer

from layeredrl_trl.functional import FAR, robust_moments
from layeredrl_trl.modules import RunningMoments
from layeredrl_trl.predictors.read_ahead import ReadAhead

_MOST_ROWS = 2**20
"""Maximum number of rows of a buffer that are searched."""

_SHOWN = 5
"""Number of positions that are named."""

_TOO_LARGE = torch.finfo(torch.float32).max ** 0.5
"""Magnitude above which a square is infinite."""


@contextmanager
def explained(update: Any, reader: ReadAhead, buffer: TensorDictReplayBuffer) -> Iterator[None]:
    """Let warnings of skipped batches say what is wrong in the buffer.

    Args:
        update: takes the steps, an ``Update`` or its twin on a GPU.
        reader: reads the buffer as learning does.
        buffer: the replay buffer.
    """
    before = getattr(update, "explain", None)
    update.explain = lambda: describe_non_finite(reader, buffer)
    try:
        yield
    finally:
        update.explain = before


@contextmanager
def watched(update: Any, reader: ReadAhead, buffer: TensorDictReplayBuffer) -> Iterator[None]:
    """Warn of what is wrong with the data while optimisation steps are taken on them.

    Args:
        update: takes the steps, an ``Update`` or its twin on a GPU.
        reader: reads the buffer as learning does.
        buffer: the replay buffer.
    """
    reader.warn_of_gaps(buffer)
    n_far = count_far(reader.loss)
    with explained(update, reader, buffer):
        yield
    warn_of_far(reader, buffer, n_far)


def warn_of_far(reader: ReadAhead, buffer: TensorDictReplayBuffer, n_before: int) -> None:
    """Warn of the first values that running moments have found far from all others.

    Args:
        reader: reads the buffer as learning does.
        buffer: the replay buffer.
        n_before: from :func:`count_far`, before this call of ``learn``.
    """
    if n_before or not count_far(reader.loss):
        return
    found = describe_far(reader, buffer) or "They are values of an otherwise constant entry."
    warnings.warn(
        "Some values are far from all others. Running moments leave out single ones, but not those "
        f"that recur, and the losses learn from all. {found}",
        stacklevel=3,
    )


def describe_non_finite(reader: ReadAhead, buffer: TensorDictReplayBuffer) -> str:
    """Name the entries of which rows are not finite, how many there are, and a few positions."""
    tests = {
        "not finite": lambda x: ~x.isfinite(),
        "too large": lambda x: x.isfinite() & (x.abs() > _TOO_LARGE),
    }
    found = [_describe(reader, buffer, lambda _, t=test: t, what) for what, test in tests.items()]
    if any(found):
        return " ".join(filter(None, found))
    parts = {"model": reader.loss.dynamics, "encoder": reader.loss.encoder}
    parts |= {"rew_func": reader.loss.reward} if reader.loss.reward is not None else {}
    parts |= {"val_func": reader.loss.value_network} if reader.loss.has_value else {}
    bad = [
        name
        for name, part in parts.items()
        if not all(bool(p.isfinite().all()) for p in part.parameters())
    ]
    if bad:
        return f"All entries of the buffer are finite, but parameters of {bad} are not."
    text = "All entries of the buffer and all parameters are finite: the loss overflowed."
    return f"{text} {describe_far(reader, buffer)}".rstrip()


def describe_far(reader: ReadAhead, buffer: TensorDictReplayBuffer) -> str:
    """Name the entries of which rows are far from all others; empty if there are none."""

    def make(x: Tensor) -> Callable[[Tensor], Tensor]:
        centre, spread = robust_moments(x)
        return lambda x: (x - centre).abs() > FAR * spread

    what = f"more than {FAR:,.0f} times the usual spread from the median"
    return _describe(reader, buffer, make, what)


def count_far(loss: torch.nn.Module) -> int:
    """Count the numbers that the running moments of a loss's parts found far from all others."""
    return sum(x.n_far for x in loss.modules() if isinstance(x, RunningMoments))


def _describe(
    reader: ReadAhead,
    buffer: TensorDictReplayBuffer,
    make: Callable[[Tensor], Callable[[Tensor], Tensor]],
    what: str,
) -> str:
    """Describe the rows of which a number is bad; empty if there are none.

    ``make(x)`` gets rows ``[N, D]`` of an entry and makes the function that tells bad numbers.
    """
    is_bad: dict[NestedKey, Callable[[Tensor], Tensor]] = {}
    bad: dict[NestedKey, list[int | tuple[int, ...]]] = {}
    n_rows = 0
    for index, entries in _rows(reader, buffer):
        n_rows += len(index[0])
        for key, x in entries.items():
            x = x.reshape(len(x), -1)
            if key not in is_bad:
                is_bad[key] = make(x)
            rows = is_bad[key](x).any(-1).nonzero()[:, 0].to(index[0].device)
            positions = torch.stack([i[rows] for i in index], -1).tolist()
            bad.setdefault(key, []).extend(tuple(p) if len(p) > 1 else p[0] for p in positions)
    texts = []
    for key, positions in bad.items():
        if positions:
            shown = ", ".join(map(str, positions[:_SHOWN]))
            more = ", ..." if len(positions) > _SHOWN else ""
            are = "is" if len(positions) == 1 else "are"
            texts.append(
                f"{key!r}: {len(positions)} of {n_rows} rows {are} {what}, at storage positions "
                f"{shown}{more}."
            )
    return " ".join(texts)


def _rows(
    reader: ReadAhead, buffer: TensorDictReplayBuffer
) -> Iterator[tuple[tuple[Tensor, ...], dict[NestedKey, Tensor]]]:
    """Read what is stored, as learning reads it: positions and entries of numbers."""
    shape = buffer.storage.shape
    n_rows = min(shape.numel(), _MOST_ROWS)
    for flat in torch.arange(n_rows).split(reader.most_rows):
        index = torch.unravel_index(flat, shape)
        entries = reader.entries(buffer, index)
        mask = entries.pop(reader.loss.tensor_keys.mask, None)
        if mask is not None:  # padding may hold anything
            rows = mask.reshape(len(mask), -1).all(-1).nonzero()[:, 0]
            entries = {key: x.index_select(0, rows) for key, x in entries.items()}
            index = tuple(i.index_select(0, rows.to(i.device)) for i in index)
        yield index, {key: x for key, x in entries.items() if x.is_floating_point()}
