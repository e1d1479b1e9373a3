"""A stand-in for CUDA graphs on a CPU: operations are recorded, and done again on the same memory.

What a graph forbids is an error here too: reading a number on the host, and shapes that depend on
data. As with a graph, recording changes nothing: whatever was written to is put back, and what was
returned holds garbage until the first replay. All that Python decided is done again as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layeredrl_trl.acceleration import cuda_graphs, device_update

T = TypeVar("T")

# The host waits for a number, a shape depends on data, or memory of the host is read.
_FORBIDDEN = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
    "aten::lift_fresh",
    "aten::repeat_interleave.Tensor",
    "aten::allclose",
    "aten::multinomial",
    "aten::aminmax",
    "aten::histc",
    "aten::linalg_pinv",
    "aten::linalg_inv_ex",
    "aten::linalg_cholesky_ex",
    "aten::_linalg_check_errors",
}

# What the host asks a tensor for without an operation.
_ASKED_OF_TENSORS = ("tolist", "numpy", "__array__", "cpu")
_ASKED_OF_TORCH = ("manual_seed", "seed", "get_rng_state", "tensor", "as_tensor")


class Recorder(TorchDispatchMode):
    """Keep every operation with the very tensors that it read and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = []
        self._made: dict[int, Tensor] = {}  # storages made while recording, kept alive
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # of those from before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        overload = f"{name}.{func._overloadname}"
        indices = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        by_mask = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            x.dtype is torch.bool for x in tree_leaves(args[1]) if isinstance(x, Tensor)
        )
        if name in _FORBIDDEN or overload in _FORBIDDEN or by_mask:
            raise RuntimeError(f"{overload} cannot be recorded: the host would have to wait for it")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tree_leaves(value):
                    self._keep(x)
        for argument in func._schema.arguments:
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and argument.name in kwargs:
                for x in tree_leaves(kwargs[argument.name]):
                    self._keep(x)
        out = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in indices}
        outs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        new = [x for x in outs if x.untyped_storage().data_ptr() not in given or x.numel() == 0]
        for x in new:
            self._made[x.untyped_storage().data_ptr()] = x
        self.steps.append((func, args, kwargs, outs))
        return out

    def _keep(self, x) -> None:
        """Remember what is in memory from before the recording."""
        if not isinstance(x, Tensor):
            return
        pointer = x.untyped_storage().data_ptr()
        if pointer not in self._made and pointer not in self._copies:
            whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
            self._copies[pointer] = (whole, whole.clone())

    def undo(self) -> None:
        """Put back what was written, and fill what was made with garbage."""
        for whole, copy in self._copies.values():
            whole.copy_(copy)
        for x in self._made.values():
            x.untyped_storage().fill_(0x7F)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, outs in self.steps:
                again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
                for own, new in zip(outs, again, strict=True):
                    if own.data_ptr() != new.data_ptr():
                        own.detach().copy_(new)


def record(work: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
    """In place of ``layeredrl_trl.acceleration.cuda_capture.record``."""
    recorder, random_state = Recorder(), torch.get_rng_state()

    def refuse(*_, **__):
        raise RuntimeError("this cannot be recorded: the host would have to wait, or to copy")

    try:
        with pytest.MonkeyPatch.context() as patch, recorder:
            for name in _ASKED_OF_TENSORS:
                patch.setattr(Tensor, name, refuse)
            for name in _ASKED_OF_TORCH:
                patch.setattr(torch, name, refuse)
            outputs = work()
    finally:
        recorder.undo()
        torch.set_rng_state(random_state)
    return recorder.replay, outputs


@pytest.fixture
def replays(monkeypatch):
    """Let the CPU be a device that work can be recorded on."""
    for place in (cuda_graphs, device_update):
        monkeypatch.setattr(place, "can_record", lambda device: True)
    monkeypatch.setattr(cuda_graphs, "record", record)
    # on a GPU it asks for no number
    monkeypatch.setattr(
        torch.nn.functional, "one_hot", lambda x, n: (x.unsqueeze(-1) == torch.arange(n)).long()
    )
