"""Doing the same work again and again: recorded once as a CUDA graph, then replayed.

A GPU finishes the small kernels of a model faster than Python launches them. A graph launches all
of them at once. What it cannot see is Python: a replay does what was done when it was recorded, to
the memory that was there. :func:`fingerprint` says when that would be something else.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from layeredrl_trl.functional import without_reading

T = TypeVar("T")

_MOST_RECORDINGS = 16
"""The oldest goes where there are more: each holds memory of its own."""

_PLAIN = {bool, int, float, str, type(None)}

_CONTAINERS = {dict, OrderedDict, list, tuple, set}

_LIBRARIES = {"torch", "tensordict", "torchrl", "layeredrl_trl"}

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
    is recorded. It is recorded anew where arguments of another shape come, or where
    :func:`fingerprint` of its modules, or ``also``, is another one. Random numbers are drawn anew
    in every replay, from the generator of the device.

    Args:
        function: of tensors, tuples and dictionaries of them, ``None`` and what else can be
            hashed; returns likewise. It may write to tensors that outlive it; it must not read
            numbers from tensors, nor change anything else.
        modules: that it asks.
        cudagraphs: ``None``: record it on CUDA if all parts of the modules are known
            (:func:`is_known`); where that fails it is warned of once, and the function carried out
            as it is from then on. True: whatever the parts, and raise where it fails. False: never.
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
        self._recordings: dict[Hashable, Recording | None] = {}  # None: of unknown parts
        self._n_calls: dict[Hashable, int] = {}
        self._given_up = False
        self._print: Hashable = None

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
        if self.cudagraphs is False or self._given_up or _IS_RECORDING.get():
            return self.function(*arguments)
        tensors: list[Tensor] = []
        layout = _layout(arguments, tensors)
        if not tensors or not can_record(tensors[0].device):
            return self.function(*arguments)
        if not is_unchanged or self._print is None:
            self._print = (fingerprint(self.modules), _torch_state(), self.also())
        key = (layout, self._print)
        if key not in self._recordings:
            self._print = None  # the function may change what it will be asked for next
            n_calls = self._n_calls.get(key, 0)
            if n_calls < self.n_warm_up:
                _keep(self._n_calls, key, n_calls + 1)
                with without_reading():
                    return beside(lambda: self.function(*arguments), tensors[0].device)
            _keep(self._recordings, key, self._record(arguments, tensors))
        recording = self._recordings.get(key)
        if recording is None:
            return self.function(*arguments)
        torch._foreach_copy_(recording.inputs, tensors)
        recording.replay()
        return _copied(recording.outputs)

    def forget(self) -> None:
        """Throw all recordings away."""
        self._recordings.clear()
        self._n_calls.clear()
        self._print = None

    def _record(self, arguments: tuple[Any, ...], tensors: list[Tensor]) -> Recording | None:
        if self.cudagraphs is None and not all(map(is_known, self.modules)):
            return None
        inputs = [x.detach().clone(memory_format=torch.contiguous_format) for x in tensors]
        own = _rebuilt(arguments, iter(inputs))
        token = _IS_RECORDING.set(True)
        try:
            with without_reading():
                replay, outputs = record(lambda: self.function(*own), inputs[0].device)
        except RuntimeError as error:
            if self.cudagraphs:
                raise
            self._give_up(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            return None
        finally:
            _IS_RECORDING.reset(token)
        return Recording(inputs, replay, outputs)

    def _give_up(self, why: str) -> None:
        self.forget()
        self._given_up = True
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        warnings.warn(
            f"{name} cannot be replayed as a CUDA graph and is carried out without, more slowly "
            f"(cudagraphs=False asks for that): {why}.",
            stacklevel=5,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Recordings are bound to memory: copies and pickles start without."""
        unbound = {"_recordings": {}, "_n_calls": {}, "_given_up": False, "_print": None}
        return self.__dict__ | unbound


def fingerprint(modules: Iterable[nn.Module]) -> Hashable:
    """Describe all that a replay cannot see changing, of modules and their parts.

    These are their plain attributes (numbers, strings, flags), the lengths of dictionaries and
    lists, which object any other attribute is, their parts, and where in memory parameters and
    buffers lie. What changes inside of an object, say an entry of a list, is missed.

    Args:
        modules: asked with all their parts.
    """
    seen: list[Hashable] = []
    parts, done = list(modules), set[int]()
    while parts:
        part = parts.pop()
        if id(part) in done:
            continue
        done.add(id(part))
        for x in part.__dict__.values():
            kind = type(x)  # asked for often: isinstance takes longer
            if kind in _PLAIN:
                seen.append(x)
            elif kind in _CONTAINERS:
                seen.append(len(x))
            else:
                seen.append(x.data_ptr() if isinstance(x, Tensor) else id(x))
        for tensors in (part._parameters, part._buffers):
            seen += [id(part), *(0 if x is None else x.data_ptr() for x in tensors.values())]
        parts += [x for x in part._modules.values() if x is not None]
    return tuple(seen)


def is_known(module: nn.Module) -> bool:
    """Say whether a module and its parts are made of nothing but what its libraries define.

    Then :func:`fingerprint` misses nothing. Of anybody's own code it cannot be told whether it can
    be replayed: it may read a clock, a list or a tensor.

    Args:
        module: is asked with its parts and their hooks.
    """
    for part in module.modules():
        called: list[Any] = [type(part), *part._forward_hooks.values()]
        called += part._forward_pre_hooks.values()
        if isinstance(part, TensorDictModule) and not isinstance(part.module, nn.Module):
            called.append(part.module)
        for x in called:
            if str(getattr(x, "__module__", None)).partition(".")[0] not in _LIBRARIES:
                return False
    return True


def can_record(device: torch.device) -> bool:
    """Say whether work can be recorded on a device."""
    return device.type == "cuda"


def is_recording() -> bool:
    """Say whether what is done now is being recorded."""
    return _IS_RECORDING.get()


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
    # torch leaves its stream current where it fails; the outer context puts back what was
    with (
        torch.cuda.device(device),
        torch.cuda.stream(side),
        torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"),
    ):
        outputs = work()
    return graph.replay, outputs


_SIDE_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _SIDE_STREAMS:
        _SIDE_STREAMS[device] = torch.cuda.Stream(device)
    return _SIDE_STREAMS[device]


def _keep(things: dict[Hashable, T], key: Hashable, thing: T) -> None:
    """Put a thing into a dictionary, the oldest out of a full one."""
    if key not in things and len(things) >= _MOST_RECORDINGS:
        del things[next(iter(things))]
    things[key] = thing


def _torch_state() -> Hashable:
    """What torch itself lets operations depend on."""
    return (
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cuda"),
        torch.are_deterministic_algorithms_enabled(),
    )


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
