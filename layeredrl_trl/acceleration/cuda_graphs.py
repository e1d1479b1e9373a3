"""Replay CUDA graphs of work that is repeated many times.

A GPU finishes the small kernels of a model faster than Python launches them; a graph launches all
of them at once. A replay repeats the recorded kernels on the recorded memory and sees no later
change in Python: :func:`fingerprint` detects such changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torchrl import logger as torchrl_logger

from layeredrl_trl.acceleration.cuda_capture import can_record, on_side_stream, record
from layeredrl_trl.acceleration.fingerprint import fingerprint
from layeredrl_trl.acceleration.host_reads import without_reading

T = TypeVar("T")

_MOST_KEPT = 16
"""Number of recordings kept, each with its own memory; evicts the least recently used one."""

_IS_RECORDING: ContextVar[bool] = ContextVar("_IS_RECORDING", default=False)


class Recording(NamedTuple):
    """One recorded CUDA graph.

    Attributes:
        inputs: memory that the graph reads its arguments from.
        replay: launches the graph.
        outputs: memory that the graph writes its results to, nested as the function returned it.
        objects: kept alive because the fingerprint contains their addresses.
    """

    inputs: list[Tensor]
    replay: Callable[[], None]
    outputs: Any
    objects: list[object]


class GraphReplay(Generic[T]):
    """Call a function of tensors by replaying a CUDA graph of it.

    The first calls are plain, to warm up; the next one is recorded, later ones are replayed. A new
    shape of an argument, or a change of the :func:`fingerprint` of the modules or of ``also``,
    starts over. Every replay draws new random numbers from the device's generator. The time of the
    first recording is logged.

    On a CPU, under autocast, and inside another recording or compiled code, the function itself is
    called. All calls must come from one thread.

    Args:
        function: takes and returns tensors, tuples and dictionaries of them, ``None`` and anything
            hashable. It may write to existing tensors; it must not read numbers from tensors or
            change anything else (in user code this is not checked).
        modules: modules that ``function`` uses.
        also: returns everything else that ``function`` depends on.
        n_warm_up: plain calls before the recording, at least 1.

    Raises:
        RuntimeError: when called, if the function cannot be recorded.
    """

    def __init__(
        self,
        function: Callable[..., T],
        modules: Iterable[nn.Module],
        *,
        also: Callable[[], Hashable] = tuple,
        n_warm_up: int = 3,
    ) -> None:
        self.function = function
        self.modules = tuple(modules)
        self.also = also
        self.n_warm_up = n_warm_up
        self._has_reported = False
        self._recordings: dict[Hashable, Recording] = {}
        self._n_calls: dict[Hashable, tuple[int, list[object]]] = {}

    def __call__(self, *arguments: Any) -> T:
        """Return ``function(*arguments)``; all tensors must be on one device."""
        tensors: list[Tensor] = []
        layout = _layout(arguments, tensors)
        if not tensors or _IS_RECORDING.get() or not _may_record(tensors[0]):
            return self.function(*arguments)
        modules, objects = fingerprint(self.modules)
        key = (layout, modules, _torch_state(), self.also())
        recording = self._recordings.pop(key, None)
        if recording is None:
            n_calls, _ = self._n_calls.pop(key, (0, objects))
            _keep(self._n_calls, key, (n_calls + 1, objects))
            if n_calls < self.n_warm_up:
                # with the strides of the recording, for which the function may be compiled here
                own = _rebuilt(arguments, (x.detach().contiguous() for x in tensors))
                with without_reading():
                    return on_side_stream(lambda: self.function(*own), tensors[0].device)
            recording = self._record(arguments, tensors, objects)
        _keep(self._recordings, key, recording)
        _copy(recording.inputs, tensors)
        recording.replay()
        return _copied(recording.outputs)

    def _record(
        self, arguments: tuple[Any, ...], tensors: list[Tensor], objects: list[object]
    ) -> Recording:
        inputs = [x.detach().clone(memory_format=torch.contiguous_format) for x in tensors]
        own = _rebuilt(arguments, iter(inputs))
        start, token = time.perf_counter(), _IS_RECORDING.set(True)
        try:
            with without_reading():
                replay, outputs = record(lambda: self.function(*own), inputs[0].device)
        finally:
            _IS_RECORDING.reset(token)
        if not self._has_reported:
            self._has_reported = True
            name = getattr(self.function, "__qualname__", type(self.function).__name__)
            seconds = time.perf_counter() - start
            torchrl_logger.info(f"{name} was recorded as a CUDA graph in {seconds:.2f} s")
        return Recording(inputs, replay, outputs, objects)

    def __getstate__(self) -> dict[str, Any]:
        """Leave recordings, which are bound to memory, out of copies and pickles."""
        return self.__dict__ | {"_recordings": {}, "_n_calls": {}}


def _keep(things: dict[Hashable, T], key: Hashable, thing: T) -> None:
    """Append an entry to a dictionary; if it is full, drop its first one."""
    if key not in things and len(things) >= _MOST_KEPT:
        del things[next(iter(things))]
    things[key] = thing


def _torch_state() -> Hashable:
    """Return the torch settings that operations depend on."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )


def _may_record(x: Tensor) -> bool:
    """Return False on a CPU, under autocast, and during another compilation or recording."""
    if not can_record(x.device) or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _copy(inputs: list[Tensor], tensors: list[Tensor]) -> None:
    """Copy arguments into the memory of a recording, by one call for each dtype."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for own, x in zip(inputs, tensors, strict=True):
        there, given = by_dtype.setdefault(own.dtype, ([], []))
        there.append(own)
        given.append(x)
    for there, given in by_dtype.values():
        torch._foreach_copy_(there, given)


def _layout(arguments: Any, tensors: list[Tensor]) -> Hashable:
    """Describe arguments except for the numbers in tensors; append the tensors to ``tensors``."""
    if isinstance(arguments, Tensor):
        tensors.append(arguments)
        return arguments.shape, arguments.dtype, arguments.device
    if isinstance(arguments, Mapping):
        return tuple((name, _layout(x, tensors)) for name, x in arguments.items())
    if isinstance(arguments, tuple):
        return tuple(_layout(x, tensors) for x in arguments)
    return arguments


def _copied(outputs: T) -> T:
    """Copy the outputs of a replay, which the next one would overwrite."""
    tensors: list[Tensor] = []
    _layout(outputs, tensors)
    if len({(x.shape, x.dtype) for x in tensors}) == 1:
        return _rebuilt(outputs, iter(torch.stack(tensors).unbind()))  # by one kernel
    return _rebuilt(outputs, (x.clone() for x in tensors))


def _rebuilt(arguments: Any, tensors: Iterator[Tensor]) -> Any:
    """Replace the tensors in ``arguments``, in the order of :func:`_layout`."""
    if isinstance(arguments, Tensor):
        return next(tensors)
    if isinstance(arguments, Mapping):
        return {name: _rebuilt(x, tensors) for name, x in arguments.items()}
    if isinstance(arguments, tuple):
        own = [_rebuilt(x, tensors) for x in arguments]
        return type(arguments)(*own) if hasattr(arguments, "_fields") else tuple(own)
    return arguments
