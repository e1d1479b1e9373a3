"""Several processes, called ranks, that learn one model, each from batches of its own.

The ranks are those of ``torch.distributed``'s default process group, as ``torchrun`` starts them.
Together they do what one process would do with the joined batch: running statistics and means are
made of the rows of all ranks, and gradients are averaged. Every function here but :func:`n_ranks`
is a collective: all ranks have to call it, in the same order.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def n_ranks() -> int:
    """Return the number of ranks; 1 without a process group.

    Example:
        >>> n_ranks()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.compiler.disable  # how much arrives is read from what arrives
@torch.no_grad()
def gather_rows(*entries: Tensor) -> list[Tensor]:
    """Join rows of all ranks, in the order of the ranks; without gradient.

    There are two collectives, whatever the number of entries: one for the numbers of rows, which
    may differ between ranks, one for the rows.

    Args:
        entries: tensors ``[N, ...]`` on one device, with an ``N`` of their own.

    Returns:
        for each entry the rows of all ranks, ``[sum of N, ...]``.

    Raises:
        ValueError: on all ranks, if shapes of rows or dtypes differ between ranks.
    """
    device = entries[0].device
    kinds = [(tuple(x.shape[1:]), str(x.dtype)) for x in entries]
    own = [len(x) for x in entries]
    header = torch.tensor([zlib.crc32(repr(kinds).encode()), *own], device=device)
    kind, *lengths = zip(*_gather(header).tolist(), strict=True)
    if len(set(kind)) > 1:
        raise ValueError(
            "ranks: expected the same entries on all ranks, but their number, shapes or dtypes "
            f"differ; here there are {kinds}."
        )
    widths = [x.element_size() * x.shape[1:].numel() for x in entries]
    sizes = [
        [n * width for n, width in zip(of_rank, widths, strict=True)]
        for of_rank in zip(*lengths, strict=True)
    ]
    # bytes, because the entries are of several dtypes; padded, because a collective wants one size
    raw = torch.cat([x.reshape(-1).contiguous().view(torch.uint8) for x in entries])
    padded = raw.new_zeros(max(map(sum, sizes)))
    padded[: len(raw)] = raw
    pieces = [
        row[: sum(size)].split(size) for row, size in zip(_gather(padded), sizes, strict=True)
    ]
    return [
        torch.cat(of_entry).view(x.dtype).reshape(-1, *x.shape[1:])
        if x.shape[1:].numel()
        else x.new_empty(sum(n), *x.shape[1:])
        for x, n, of_entry in zip(entries, lengths, zip(*pieces, strict=True), strict=True)
    ]


@torch.no_grad()
def mean_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Average tensors of one device over all ranks, in one collective.

    A number that is not finite on one rank is not finite in the mean.
    """
    flat = torch.cat([x.reshape(-1) for x in tensors])
    dist.all_reduce(flat)
    pieces = flat.div_(n_ranks()).split([x.numel() for x in tensors])
    return [mean.view_as(x).to(x.dtype) for mean, x in zip(pieces, tensors, strict=True)]


def of_first_rank(state: Any) -> Any:
    """Return what rank 0 passes, anything that ``torch.save`` takes; its tensors are on the CPU."""
    file = io.BytesIO()
    if dist.get_rank() == 0:
        torch.save(state, file)
    content = [file.getvalue()]
    dist.broadcast_object_list(content, src=0)
    return torch.load(io.BytesIO(content[0]), map_location="cpu", weights_only=False)


def check_same_on_ranks(**numbers: float) -> None:
    """Check that numbers, given by name, are the same on all ranks; nothing with one rank.

    Raises:
        ValueError: on all ranks, if they are not.
    """
    if n_ranks() == 1:
        return
    everyone: list[Any] = [None] * n_ranks()
    dist.all_gather_object(everyone, numbers)
    for name in numbers:
        values = [own.get(name) for own in everyone]
        if len(set(values)) > 1:
            raise ValueError(f"{name}: expected the same on all ranks, got {values} by rank.")


def _gather(x: Tensor) -> Tensor:
    """Stack a tensor ``[N]`` of all ranks, ``[n_ranks, N]``."""
    out = x.new_empty(n_ranks(), len(x))
    dist.all_gather(list(out), x)
    return out
