"""How rows of a replay buffer lie in a file: the bytes of each entry, one entry after another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
        *("complex64", "complex128"),
    )
}
"""The dtypes that an entry may have, by the name under which a file knows them."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_NUMBERS = 2**40  # of one row: a larger one is a damaged number


@dataclass(frozen=True)
class Entry:
    """One entry of a row.

    Attributes:
        key: path of the entry in the TensorDict.
        dtype: a name of :data:`DTYPES`.
        shape: of one row, ``[*lanes, *features]``.
    """

    key: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{'.'.join(self.key)} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class RowLayout:
    """The entries of a row, in the order in which their bytes are stored.

    Attributes:
        entries: all tensors, in the order of the TensorDict.
        nodes: path and batch size within a row of every TensorDict, the root (path ``()``) first.
    """

    entries: tuple[Entry, ...]
    nodes: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]

    @classmethod
    def of(cls, rows: TensorDictBase) -> RowLayout:
        """Describe rows ``[N, ...]``.

        Raises:
            TypeError: if an entry is no tensor, or a tensor of a kind that cannot be stored.
        """
        if isinstance(rows, Tensor):
            raise TypeError("Expected rows of tensors in TensorDicts, got a plain tensor.")
        entries, nodes = [], []
        for key, value in _walk(rows, ()):
            if isinstance(value, Tensor):
                if value.dtype not in _NAMES or value.is_nested or value.layout != torch.strided:
                    raise TypeError(
                        f"Expected entries that are dense tensors of numbers, got "
                        f"{'.'.join(key)!r} of {value.dtype} and {value.layout}."
                    )
                entries.append(Entry(key, _NAMES[value.dtype], tuple(value.shape[1:])))
            else:
                nodes.append((key, tuple(value.batch_size[1:])))
        # in an order of their own: that of a TensorDict differs between processes
        entries.sort(key=lambda entry: entry.key)
        return cls(tuple(entries), tuple(sorted(nodes)))

    @classmethod
    def from_json(cls, content: Any) -> RowLayout:
        """Read what :meth:`to_json` gave.

        Raises:
            ValueError: if the content is of another form.
        """
        try:
            entries = tuple(
                Entry(_path(key), _dtype(dtype), _sizes(shape))
                for key, dtype, shape in content["entries"]
            )
            nodes = tuple((_path(key), _sizes(size)) for key, size in content["nodes"])
            paths = [entry.key for entry in entries]
            folders = {key for key, _ in nodes}
            parents = {key[:depth] for key in paths for depth in range(len(key))}
            if (
                len(set(paths)) != len(paths)
                or len(folders) != len(nodes)
                or nodes[0][0] != ()
                or () in paths
                or parents - folders
                or folders & set(paths)
            ):
                raise ValueError("the entries contradict each other")
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise ValueError(f"the layout of the rows cannot be read: {error!r}") from error
        return cls(entries, nodes)

    def to_json(self) -> dict[str, Any]:
        """Give lists, strings and integers that describe this layout."""
        return {
            "entries": [[list(e.key), e.dtype, list(e.shape)] for e in self.entries],
            "nodes": [[list(key), list(size)] for key, size in self.nodes],
        }

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(entry.num_bytes for entry in self.entries)

    def difference(self, other: RowLayout) -> str:
        """Say how another layout differs, or give an empty string."""
        here, there = ({e.key: e for e in x.entries} for x in (self, other))
        differing = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
        if not differing:
            return "" if set(self.nodes) == set(other.nodes) else "nested batch sizes differ"
        first = differing[0]
        return (
            f"{len(differing)} entries differ, the first is {'.'.join(first)!r}: "
            f"{here.get(first, 'absent')} and {there.get(first, 'absent')}"
        )

    def empty_row(self) -> TensorDict:
        """Give one row of zeros, without a leading batch dim."""
        sizes = dict(self.nodes)
        row = TensorDict({}, batch_size=sizes[()])
        made: set[tuple[str, ...]] = {()}

        def make(key: tuple[str, ...]) -> None:
            if key not in made:
                make(key[:-1])
                made.add(key)
                row.set(key, TensorDict({}, batch_size=sizes[key]))

        for entry in self.entries:  # so that keys have the order that they had
            make(entry.key[:-1])
            row.set(entry.key, torch.zeros(entry.shape, dtype=DTYPES[entry.dtype]))
        for key, _ in self.nodes:
            make(key)
        return row

    def pack(self, rows: TensorDictBase, start: int, stop: int) -> Tensor:
        """Copy the rows from ``start`` to ``stop`` into bytes, uint8 ``[n]`` on the CPU."""
        count = stop - start
        out = torch.empty(count * self.row_bytes, dtype=torch.uint8)
        for entry, (low, high) in zip(self.entries, self._spans(count), strict=True):
            value = rows.get(entry.key)[start:stop].detach().reshape(-1)
            if high > low:
                out[low:high].copy_(value.contiguous().view(torch.uint8))
        return out

    def unpack(self, data: Tensor, count: int) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Give key and value ``[count, *shape]`` of every entry of packed rows."""
        for entry, (low, high) in zip(self.entries, self._spans(count), strict=True):
            # the copy starts where a number of its dtype may start
            value = data[low:high].clone().view(DTYPES[entry.dtype])
            yield entry.key, value.reshape(count, *entry.shape)

    def _spans(self, count: int) -> Iterator[tuple[int, int]]:
        low = 0
        for entry in self.entries:
            high = low + count * entry.num_bytes
            yield low, high
            low = high


def _walk(
    node: Any, key: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], TensorDictBase | Tensor]]:
    """Give every TensorDict and tensor of a tree with its path."""
    if isinstance(node, Tensor):
        yield key, node
    elif isinstance(node, TensorDict):
        yield key, node
        for name, value in node.items():
            yield from _walk(value, (*key, name))
    else:
        kind = "TensorDicts of another class" if is_tensor_collection(node) else "values"
        raise TypeError(
            f"Expected rows of tensors in TensorDicts, got {kind} ({type(node).__name__}) at "
            f"{'.'.join(key) or 'the root'!r}."
        )


def _path(value: Any) -> tuple[str, ...]:
    if not (isinstance(value, list) and all(isinstance(name, str) and name for name in value)):
        raise ValueError(f"no path: {value!r}")
    return tuple(value)


def _dtype(value: Any) -> str:
    if not isinstance(value, str) or value not in DTYPES:
        raise ValueError(f"no dtype: {value!r}")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if not (isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)):
        raise ValueError(f"no shape: {value!r}")
    if math.prod(value) > _MOST_NUMBERS:
        raise ValueError(f"too large a shape: {value!r}")
    return tuple(value)
