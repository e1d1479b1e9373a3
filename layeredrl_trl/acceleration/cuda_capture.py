"""Record work as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

T = TypeVar("T")


def can_record(device: torch.device) -> bool:
    """Return whether work on this device can be recorded as a graph."""
    return device.type == "cuda"


def on_side_stream(work: Callable[[], T], device: torch.device) -> T:
    """Do ``work`` on the stream of recordings, as CUDA requires for a warm-up."""
    if device.type != "cuda":
        return work()
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        out = work()
    current.wait_stream(side)
    return out


def record(work: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
    """Record ``work`` as a CUDA graph, without carrying it out.

    Returns:
        a function that launches the graph, and the outputs of ``work``, in memory that each launch
        overwrites.

    Raises:
        RuntimeError: if ``work`` cannot be recorded, for example because it synchronises.
    """
    graph, side = torch.cuda.CUDAGraph(), _side_stream(device)
    collects = gc.isenabled()
    gc.disable()  # freeing memory would become part of the recording
    try:
        # a failed capture leaves torch's own stream current; the outer context restores ours
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
    """Record an empty graph: after a failed one, some torch versions draw no random numbers."""
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
