"""A list of the sha256 of all files of a folder, kept in the folder itself."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from torchrl.checkpoint import CheckpointError

from layeredrl_trl.checkpoints.row_files import flush, sha256_of

CHECKSUMS = "checksums.sha256"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\r\n\\\0]+)")
_EMPTY = re.compile(r"# empty folder: ([^\r\n\\\0]+)")
_LAST = re.compile(r"# sha256 of the lines above: ([0-9a-f]{64})\n")


def seal(folder: Path, known: Mapping[str, str]) -> None:
    """Write the list of a folder's files, and have the disk hold all of it.

    The list can be checked by hand with ``sha256sum -c checksums.sha256``. Its last line is the
    sha256 of the list itself.

    Args:
        folder: complete but for the list.
        known: sha256 of files, by their path in the folder, that are on the disk already; they
            are not read.

    Raises:
        OSError: if a file cannot be read, or the list not be written.
        CheckpointError: if there is a link, or a file whose name a line cannot hold.
    """
    files, folders = _tree(folder)
    lines = []
    for name in sorted(files):
        digest = known.get(name)
        if digest is None:
            flush(folder / name)
            digest = sha256_of(folder / name)
        line = f"{digest}  {name}"
        if not _LINE.fullmatch(line):
            raise CheckpointError(f"the name of a file cannot be listed: {name!a}")
        lines.append(f"{line}\n")
    for name in sorted(folders - _parents(files)):
        if not _EMPTY.fullmatch(line := f"# empty folder: {name}"):
            raise CheckpointError(f"the name of a folder cannot be listed: {name!a}")
        lines.append(f"{line}\n")
    body = "".join(lines).encode()
    last = f"# sha256 of the lines above: {hashlib.sha256(body).hexdigest()}\n"
    with (folder / CHECKSUMS).open("xb") as file:
        file.write(body + last.encode())
        file.flush()
        os.fsync(file.fileno())
    for name in sorted(folders, reverse=True):  # the inner ones first
        flush(folder / name)


def verify(folder: Path) -> frozenset[str]:
    """Check that a folder holds the files of its list, each unchanged, and nothing else.

    Returns:
        The paths of all files but the list, within the folder.

    Raises:
        CheckpointError: if not; says what is wrong.
        OSError: if a file cannot be read.
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such folder")
    files, folders = _tree(folder)
    if CHECKSUMS not in files:
        raise CheckpointError(f"it has no {CHECKSUMS}")
    listed, empty = _read(folder / CHECKSUMS)
    found = files - {CHECKSUMS}
    if missing := sorted((listed.keys() - found) | (empty - folders)):
        raise CheckpointError(f"{len(missing)} files are missing, {missing[0]!a} among them")
    if surplus := sorted((found - listed.keys()) | (folders - _parents({*listed, *empty}) - empty)):
        raise CheckpointError(f"{len(surplus)} files are surplus, {surplus[0]!a} among them")
    for name, digest in listed.items():
        if sha256_of(folder / name) != digest:
            raise CheckpointError(f"{name!a} is damaged")
    return frozenset(listed)


def _read(file: Path) -> tuple[dict[str, str], set[str]]:
    """Read a list: the sha256 of every file, and the folders without any."""
    content = file.read_bytes()
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    try:
        last = _LAST.fullmatch(content[start:].decode())
        lines = content[:start].decode().split("\n")[:-1]
    except UnicodeDecodeError:
        last, lines = None, []
    listed, empty = {}, set()
    whole = last is not None and last[1] == hashlib.sha256(content[:start]).hexdigest()
    for line in lines:
        if match := _LINE.fullmatch(line):
            listed[match[2]] = match[1]
        elif match := _EMPTY.fullmatch(line):
            empty.add(match[1])
        else:
            whole = False
    if not whole:
        raise CheckpointError(f"{CHECKSUMS} is damaged")
    for name in (*listed, *empty):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name:
            raise CheckpointError(f"{CHECKSUMS} lists a path out of the checkpoint: {name!a}")
    if len(listed) + len(empty) != len(lines):
        raise CheckpointError(f"{CHECKSUMS} lists a file twice")
    return listed, empty


def _parents(names: Collection[str]) -> set[str]:
    """Give all folders that paths lead through, ``.`` among them."""
    return {"."} | {str(parent) for name in names for parent in PurePosixPath(name).parents}


def _tree(folder: Path) -> tuple[set[str], set[str]]:
    """Give the paths of all files and of all folders (``.`` among them) in a folder.

    Raises:
        CheckpointError: if anything else is there, such as a symbolic link.
    """
    files, folders, open_ones = set(), set(), ["."]
    while open_ones:
        name = open_ones.pop()
        folders.add(name)
        with os.scandir(folder / name) as entries:
            for entry in entries:
                path = entry.name if name == "." else f"{name}/{entry.name}"
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    open_ones.append(path)
                elif stat.S_ISREG(mode):
                    files.add(path)
                else:
                    raise CheckpointError(f"{path!a} is a link or no file")
    return files, folders
