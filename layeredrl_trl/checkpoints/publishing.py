"""Putting a finished folder in its place, and clearing away what killed processes left."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from layeredrl_trl.checkpoints.row_files import flush

_LEFTOVER = re.compile(r"\.(.+)\.(stage|archive|backup|delete)-[0-9a-f]{32}")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def stage_for(destination: Path) -> Path:
    """Give a new name beside a destination, under which it is made."""
    return destination.with_name(f".{destination.name}.stage-{uuid.uuid4().hex}")


def publish(stage: Path, destination: Path) -> None:
    """Rename a finished folder to its destination, and have the disk hold the new name.

    Where there is something at the destination, both change places in one step. On a file system
    that cannot do that, the older one is set aside for a moment; :func:`remove_leftovers` puts it
    back if the process is killed in that moment.

    Raises:
        OSError: if that is not possible; the older one is still at the destination then.
    """
    if not os.path.lexists(destination):
        os.rename(stage, destination)
        _flush_or(destination.parent, lambda: os.rename(destination, stage))
        return
    if _exchange(stage, destination):
        _flush_or(destination.parent, lambda: _exchange(stage, destination))
        remove(stage)
        return
    backup = destination.with_name(f".{destination.name}.backup-{uuid.uuid4().hex}")
    os.rename(destination, backup)
    try:
        os.rename(stage, destination)
        _flush_or(destination.parent, lambda: os.rename(destination, stage))
    except BaseException:
        os.rename(backup, destination)
        raise
    remove(backup)


def _flush_or(folder: Path, undo: Callable[[], object]) -> None:
    """Have the disk hold the names in a folder, or undo the last change of them."""
    try:
        flush(folder)
    except BaseException:
        undo()
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(directory: str | Path) -> list[Path]:
    """Clear a folder of checkpoints of what killed processes left in it.

    Half-written and half-deleted checkpoints are removed. An older one that had been set aside
    when its successor was about to take its place goes back to its place if that is empty. Call it
    before a run goes on, while nobody saves to this folder.

    Args:
        directory: that of a ``CheckpointRotation``; it need not exist.

    Returns:
        The paths that were removed or moved.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     (Path(run) / f".checkpoint-1.stage-{'0' * 32}").mkdir()
        ...     len(remove_leftovers(run)), len(list(Path(run).iterdir()))
        (1, 0)
    """
    directory, cleared = Path(directory).expanduser().absolute(), []
    if not directory.is_dir():
        return cleared
    for path in sorted(directory.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        destination = directory / match[1]
        if match[2] == "backup" and not os.path.lexists(destination):
            os.rename(path, destination)
            flush(directory)
        else:
            remove(path)
        cleared.append(path)
    return cleared


def set_aside(directory: Path, name: str) -> Path | None:
    """Give a checkpoint that was set aside while nothing is at its place, or None."""
    if os.path.lexists(directory / name):
        return None
    for path in sorted(directory.glob(f".{name}.backup-*")):
        if _LEFTOVER.fullmatch(path.name):
            return path
    return None


def _exchange(one: Path, other: Path) -> bool:
    """Have two paths change places in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    paths = [ctypes.c_char_p(os.fsencode(path)) for path in (one, other)]
    code = rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_EXCHANGE))
    return code == 0
