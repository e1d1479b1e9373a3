"""Doing the same work again and again: recorded once as a CUDA graph, then replayed.

A GPU finishes the small kernels of a model faster than Python launches them. A graph launches all
of them at once. What it cannot see is Python: a replay does what was done when it was recorded, to
the memory that was there. :func:`fingerprint` says when that would be something else.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torchrl import logger as torchrl_logger

from layeredrl_trl.functional import without_reading
from layeredrl_trl.modules.cuda_graph import beside, can_record, record
from layeredrl_trl.modules.fingerprint import fingerprint, is_known

T = TypeVar("T")

_MOST_RECORDINGS = 16
"""Those that were not asked for the longest go first: each holds memory of its own."""

_MOST_FAILURES = 3
"""What cannot be recorded is tried again, as often: the cause may lie outside."""

_IS_RECORDING: ContextVar[bool] = ContextVar("_IS_RECORDING", default=False)


class Recording(NamedTuple):
    """What has been recorded.

    Attributes:
        inputs: memory that it reads its arguments from.
        replay: does it again.
        outputs: what it returned; a replay writes there.
    """

    inputs: list[Tensor]
    replay: Callable[[], None]
    outputs: Any


class Recorded(Generic[T]):
    """A function of tensors that is carried out by replaying it.

    Its first calls with arguments of some shape are carried out as they are, to warm up; the next
    is recorded. How long that took is said once, by TorchRL's logger. It is recorded anew where
    arguments of another shape come, or where :func:`fingerprint` of its modules, or ``also``, is
    another one. Random numbers are drawn anew in every replay, from the generator of the device.

    Where somebody else records or compiles, under autocast, and on a CPU it is carried out as it
    is. All calls must come from one thread.

    Args:
        function: of tensors, tuples and dictionaries of them, ``None`` and what else can be
            hashed; returns likewise. It may write to tensors that outlive it; it must not read
            numbers from tensors, nor change anything else.
        modules: that it asks.
        cudagraphs: ``None``: record it on CUDA if all parts of the modules are known
            (:func:`is_known`); where that fails for good it is warned of once, and the function
            carried out as it is from then on. True: whatever the parts, and raise where it fails.
            False: never.
        also: gives whatever else it depends on.
        n_warm_up: calls before it is recorded, at least 1.

    Example:
        See :class:`~layeredrl_trl.objectives.Update`.
    """

    def __init__(
        self,
        function: Callable[..., T],
        modules: Iterable[nn.Module],
        *,
        cudagraphs: bool | None = None,
        also: Callable[[], Hashable] = tuple,
        n_warm_up: int = 3,
    ) -> None:
        self.function = function
        self.modules = tuple(modules)
        self.cudagraphs = cudagraphs
        self.also = also
        self.n_warm_up = n_warm_up
        self._n_failures = 0
        self._n_circumstances = 0
        self._has_reported = False
        self.forget()

    def __call__(self, *arguments: Any, is_unchanged: bool = False) -> T:
        """Do what ``function`` does.

        Args:
            *arguments: of it, all tensors on one device.
            is_unchanged: since the last call nothing was changed but numbers in tensors, and by
                nobody else: spares the :func:`fingerprint`.

        Returns:
            what ``function`` returns.

        Raises:
            RuntimeError: if it cannot be recorded but must be.
        """
        if self.cudagraphs is False or is_recording() or self._n_failures >= _MOST_FAILURES:
            return self.function(*arguments)
        tensors: list[Tensor] = []
        layout = _layout(arguments, tensors)
        if not tensors or not can_record(tensors[0].device) or _is_in_other_hands(tensors[0]):
            return self.function(*arguments)
        if not is_unchanged or self._now is None:
            self._now = self._number_of_circumstances()
        key = (layout, self._now)
        if key in self._recordings:
            recording = self._recordings[key] = self._recordings.pop(key)  # the last one asked for
        else:
            self._now = None  # the function may change what it will be asked for next
            n_calls = self._n_calls.pop(key, 0)
            _keep(self._n_calls, key, n_calls + 1)
            if n_calls < self.n_warm_up:
                # of the strides of what is recorded, for which it may be compiled now
                own = _rebuilt(arguments, (x.detach().contiguous() for x in tensors))
                with without_reading():
                    return beside(lambda: self.function(*own), tensors[0].device)
            may = self.cudagraphs or all(map(is_known, self.modules))
            recording = self._record(arguments, tensors) if may else None
            if recording is not None or not may:
                _keep(self._recordings, key, recording)
        if recording is None:
            return self.function(*arguments)
        _copy(recording.inputs, tensors)
        recording.replay()
        return _copied(recording.outputs)

    def forget(self) -> None:
        """Throw all recordings away."""
        self._recordings: dict[Hashable, Recording | None] = {}  # None: of unknown parts
        self._n_calls: dict[Hashable, int] = {}
        # by what is so: a number, and the objects of which it holds only where they lie
        self._circumstances: dict[Hashable, tuple[int, list[object]]] = {}
        self._now: int | None = None

    def _number_of_circumstances(self) -> int:
        """Number all that a recording depends on, but its arguments."""
        modules, objects = fingerprint(self.modules)
        found = (modules, _torch_state(), self.also())
        known = self._circumstances.pop(found, None)
        if known is None:
            self._n_circumstances += 1
            known = self._n_circumstances, objects
        _keep(self._circumstances, found, known)  # the last one asked for
        return known[0]

    def _record(self, arguments: tuple[Any, ...], tensors: list[Tensor]) -> Recording | None:
        inputs = [x.detach().clone(memory_format=torch.contiguous_format) for x in tensors]
        own = _rebuilt(arguments, iter(inputs))
        start, token = time.perf_counter(), _IS_RECORDING.set(True)
        try:
            with without_reading():
                replay, outputs = record(lambda: self.function(*own), inputs[0].device)
        except RuntimeError as error:
            if self.cudagraphs:
                raise
            self._note_failure(error)
            return None
        finally:
            _IS_RECORDING.reset(token)
        if not self._has_reported:
            self._has_reported = True
            seconds = time.perf_counter() - start
            torchrl_logger.info(f"{self._name} was recorded as a CUDA graph in {seconds:.2f} s")
        return Recording(inputs, replay, outputs)

    @property
    def _name(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__name__)

    def _note_failure(self, error: BaseException) -> None:
        self.forget()
        self._n_failures += 1
        if self._n_failures < _MOST_FAILURES:
            return
        while error.__context__ is not None:  # torch says first that something went wrong before
            error = error.__context__
        what = (str(error) or "no text").splitlines()[0]
        warnings.warn(
            f"{self._name} cannot be replayed as a CUDA graph and is carried out without, more "
            f"slowly (cudagraphs=False asks for that): {type(error).__name__}: {what}.",
            stacklevel=5,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Recordings are bound to memory: copies and pickles start without."""
        unbound = {"_recordings": {}, "_n_calls": {}, "_circumstances": {}, "_now": None}
        return self.__dict__ | unbound | {"_n_failures": 0}


def is_recording() -> bool:
    """Say whether what is done now is being recorded."""
    return _IS_RECORDING.get()


def _keep(things: dict[Hashable, T], key: Hashable, thing: T) -> None:
    """Put a thing into a dictionary, the oldest out of a full one."""
    if key not in things and len(things) >= _MOST_RECORDINGS:
        del things[next(iter(things))]
    things[key] = thing


def _torch_state() -> Hashable:
    """What torch itself lets operations depend on."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )


def _is_in_other_hands(x: Tensor) -> bool:
    """Whether somebody else compiles or records, or autocast keeps copies of parameters."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _copy(inputs: list[Tensor], tensors: list[Tensor]) -> None:
    """Copy arguments to where a recording reads them, by one call for each dtype."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for own, x in zip(inputs, tensors, strict=True):
        there, given = by_dtype.setdefault(own.dtype, ([], []))
        there.append(own)
        given.append(x)
    for there, given in by_dtype.values():
        torch._foreach_copy_(there, given)


def _layout(arguments: Any, tensors: list[Tensor]) -> Hashable:
    """Describe what a function was given, up to the numbers; collects the tensors."""
    if isinstance(arguments, Tensor):
        tensors.append(arguments)
        return arguments.shape, arguments.dtype, arguments.device
    if isinstance(arguments, Mapping):
        return tuple((name, _layout(x, tensors)) for name, x in arguments.items())
    if isinstance(arguments, tuple):
        return tuple(_layout(x, tensors) for x in arguments)
    return arguments


def _copied(outputs: T) -> T:
    """What a replay gave, where the next one does not overwrite it."""
    tensors: list[Tensor] = []
    _layout(outputs, tensors)
    if len({(x.shape, x.dtype) for x in tensors}) == 1:
        return _rebuilt(outputs, iter(torch.stack(tensors).unbind()))  # by one kernel
    return _rebuilt(outputs, (x.clone() for x in tensors))


def _rebuilt(arguments: Any, tensors: Iterator[Tensor]) -> Any:
    """The same arguments with other tensors in place of theirs, in the order of :func:`_layout`."""
    if isinstance(arguments, Tensor):
        return next(tensors)
    if isinstance(arguments, Mapping):
        return {name: _rebuilt(x, tensors) for name, x in arguments.items()}
    if isinstance(arguments, tuple):
        own = [_rebuilt(x, tensors) for x in arguments]
        return type(arguments)(*own) if hasattr(arguments, "_fields") else tuple(own)
    return arguments
