"""A TensorDict that was saved to a folder, read without running or changing anything in it.

``TensorDict.load_memmap`` makes objects of any registered class and may unpickle; it maps files for
writing. Here only tensors are read, by what ``meta.json`` says of them. They are mapped privately:
what is written to such a tensor never reaches its file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

META = "meta.json"
_TENSORDICT = "<class 'tensordict._td.TensorDict'>"
_PICKLES = (".pickle", ".pkl")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a dictionary.

    Raises:
        ValueError: if it is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary, but a {type(content).__name__}.")
    return content


def read_memmap(folder: Path) -> TensorDict:
    """Read a folder that ``TensorDict.memmap`` or ``save`` wrote; large entries stay on disk.

    Entries that are no tensors are left out.

    Raises:
        ValueError: if a file is missing or too short, something would have to be unpickled, or
            what was saved is no TensorDict of ordinary tensors.
    """
    meta = read_json(folder / META)
    batch_size = meta.get("shape")
    if meta.get("_type") != _TENSORDICT or not _is_shape(batch_size):
        raise ValueError(
            f"{folder} holds no TensorDict, but {meta.get('_type')}; save one by "
            "tensordict.contiguous().memmap(path)."
        )
    entries: dict[str, Any] = {}
    for key, entry in meta.items():
        if not isinstance(entry, Mapping):
            continue  # batch size, device and class
        if not key or Path(key).name != key:
            raise ValueError(f"{folder}: the key {key!r} names no file in it.")
        if "type" in entry:
            if _holds_tensors(folder / key):
                entries[key] = read_memmap(folder / key)
        else:
            entries[key] = _read_tensor(folder / f"{key}.memmap", entry)
    try:
        return TensorDict(entries, batch_size=batch_size)
    except RuntimeError as error:
        raise ValueError(f"{folder}: entries do not have its batch size: {error}") from error


def _holds_tensors(folder: Path) -> bool:
    """Tell whether a part of a TensorDict holds tensors; refuse what would be unpickled."""
    found = [file.name for file in folder.glob("*") if file.suffix in _PICKLES]
    if found:
        raise ValueError(
            f"{folder} holds pickled data ({found[0]}), which can run code and is never read: save "
            "the dataset without entries that are no tensors."
        )
    return "NonTensor" not in str(read_json(folder / META).get("_type"))


def _read_tensor(file: Path, entry: Mapping[str, Any]) -> Tensor:
    shape = entry.get("shape")
    dtype = getattr(torch, str(entry.get("dtype")).removeprefix("torch."), None)
    if entry.get("is_nested") or not _is_shape(shape) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{file}: expected a tensor of one shape and dtype, got {dict(entry)}.")
    size = math.prod(shape)
    if not size:
        return torch.empty(shape, dtype=dtype)
    there = file.stat().st_size if file.is_file() else None
    if there is None or there < size * dtype.itemsize:
        found = "is missing" if there is None else f"has {there} bytes"
        expected = f"{size * dtype.itemsize} bytes for {list(shape)} of {dtype}"
        raise ValueError(f"{file} {found}, expected {expected}.")
    try:
        return torch.from_file(str(file), shared=False, size=size, dtype=dtype).view(shape)
    except RuntimeError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)
