"""The files of a run: a folder of its own, and files that are always complete."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from layeredrl_trl.recipes.errors import RecipeError, quote

_LEAST_SPACE = 2**16  # bytes that must be free on the disk for a run to begin


def make_folder(logdir: Path, env_id: str, seed: int) -> Path:
    """Make a new folder for a run's files, which no other run has, in ``logdir``.

    Raises:
        RecipeError: if the folder cannot be made, or no file in it.
    """
    # Ids have slashes and colons, and modules may be nested deep: a name has at most 255 bytes.
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", env_id)[:150]
    name = f"{name}_seed{seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        logdir.mkdir(parents=True, exist_ok=True)
        folder, number = logdir / name, 1
        while not _make_new(folder):
            number += 1
            folder = logdir / f"{name}-{number}"
        try:
            _try_writing(folder)
        except OSError:
            folder.rmdir()
            raise
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise RecipeError(
            f"logdir: cannot write to {quote(logdir)}: {_reason(error)}; give another --logdir."
        ) from error
    return folder


def check_writable(folder: Path) -> None:
    """Check that a run that is resumed can write files.

    Raises:
        RecipeError: if it cannot.
    """
    try:
        _try_writing(folder)
    except OSError as error:
        raise RecipeError(
            f"resume: cannot write to the run's folder {quote(folder)}: {_reason(error)}; copy the "
            "checkpoint to another folder and resume from there."
        ) from error


def _make_new(folder: Path) -> bool:
    """Make a folder and tell whether it is new; that is one step, as another run may make it."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _try_writing(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_LEAST_SPACE))
        file.flush()
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that takes the place of ``path`` when it is complete.

    Raises:
        OSError: if the disk is full or the folder is not writable; an older file stays.
    """
    partial = path.with_suffix(".partial")
    newline = None if "b" in mode else ""
    encoding = None if "b" in mode else "utf-8"
    try:
        with partial.open(mode, newline=newline, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_csv(path: Path, rows: list[tuple[Any, ...]]) -> None:
    """Write a table."""
    with replacing(path) as file:
        csv.writer(file).writerows(rows)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary; NaN and infinite numbers, which JSON does not know, become null."""
    with replacing(path) as file:
        file.write(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
