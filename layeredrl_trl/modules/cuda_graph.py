"""Recording work as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

T = TypeVar("T")


def can_record(device: torch.device) -> bool:
    """Say whether work can be recorded on a device."""
    return device.type == "cuda"


def beside(work: Callable[[], T], device: torch.device) -> T:
    """Do ``work`` on a stream of its own, as what is recorded later must have been done once."""
    if device.type != "cuda":
        return work()
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        out = work()
    current.wait_stream(side)
    return out


def record(work: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
    """Record ``work`` as a CUDA graph; nothing of it is done yet.

    Args:
        work: what to record.
        device: where it happens.

    Returns:
        what does it, and what ``work`` returned: memory that is written by it.

    Raises:
        RuntimeError: if it cannot be recorded, say because the host waits for a number.
    """
    graph, side = torch.cuda.CUDAGraph(), _side_stream(device)
    collects = gc.isenabled()
    gc.disable()  # what it frees may have been recorded, too
    try:
        # torch leaves its stream current where it fails; the outer context puts back what was
        with (
            torch.cuda.device(device),
            torch.cuda.stream(side),
            torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"),
        ):
            outputs = work()
    except BaseException:
        _recover(device)
        raise
    finally:
        if collects:
            gc.enable()
    return graph.replay, outputs


def _recover(device: torch.device) -> None:
    """Record nothing: some versions of torch draw no random numbers after a failure until then."""
    side = _side_stream(device)
    with (
        suppress(RuntimeError),
        torch.cuda.device(device),
        torch.cuda.stream(side),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side),
    ):
        torch.zeros(1, device=device)


_SIDE_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _SIDE_STREAMS:
        _SIDE_STREAMS[device] = torch.cuda.Stream(device)
    return _SIDE_STREAMS[device]
