"""Asking a module as if it had the parameters of its target network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from tensordict.nn import TensorDictParams
from torch import Tensor, nn

T = TypeVar("T")


def with_parameters(module: nn.Module, params: TensorDictParams, ask: Callable[[], T]) -> T:
    """Call ``ask`` while ``module`` has other parameters and buffers.

    What ``params.to_module(module)`` does, at a third of its time.

    A buffer that the module replaces meanwhile is written to the one that it was lent.

    Args:
        module: gets its own back afterwards, also after an error.
        params: the others, of the same structure.
        ask: what to do meanwhile.
    """
    if torch.compiler.is_compiling():
        with params.to_module(module, preserve_module_state=False):
            return ask()
    owners = dict(module.named_modules(remove_duplicate=False))
    lent: list[tuple[dict[str, Tensor | None], str, Tensor | None, Tensor]] = []
    try:
        for path, x in tensors_of(params).items():
            name, _, leaf = path.rpartition(".")
            owner = owners[name]
            there = owner._parameters if leaf in owner._parameters else owner._buffers
            lent.append((there, leaf, there[leaf], x))
            there[leaf] = x
        return ask()
    finally:
        for there, leaf, own, x in reversed(lent):  # a layer may have been lent to twice
            now, there[leaf] = there[leaf], own
            if now is not x and now is not None:
                x.detach().copy_(now.detach())


def tensors_of(params: TensorDictParams) -> dict[str, Tensor]:
    """Parameters and buffers by the dotted path of each; tied ones under every path."""
    there = {**params._parameters, **params._buffers}
    return {path: x for path, x in there.items() if x is not None}
