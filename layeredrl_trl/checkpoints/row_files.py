"""A folder of immutable files, each named by the sha256 of its content."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

SUFFIX = ".rows"
_OWN = re.compile(r"[0-9a-f]{64}\.rows(\.partial-[0-9a-f]{32})?")
_BLOCK = 2**20

Stamp = tuple[int, int, int]
"""Inode, size and time of last change of a file: they tell whether somebody touched it."""


class RowFiles:
    """Keep files by their content, and give links to them.

    A file is complete or absent: it is written under another name, flushed to the disk, and then
    renamed. Nothing ever writes to it again, so it may have names in many folders.

    Args:
        folder: is made if it does not exist. Files in it that this class has not named stay.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stamps: dict[str, Stamp] = {}

    @property
    def known(self) -> set[str]:
        """The contents that were added or adopted, and not removed since."""
        return set(self._stamps)

    def path(self, digest: str) -> Path:
        """Give the path of the file with this content."""
        return self.folder / f"{digest}{SUFFIX}"

    def holds(self, digest: str) -> bool:
        """Tell whether the file is there as it was written, by its inode, size and time."""
        return digest in self._stamps and _stamp(self.path(digest)) == self._stamps[digest]

    def add(self, data: Tensor) -> tuple[str, bool]:
        """Store bytes, uint8 ``[n]``; give their sha256 and whether a file was written.

        Raises:
            OSError: if it cannot be written; nothing is left of it then.
        """
        digest = hashlib.sha256(memoryview(data.numpy())).hexdigest()
        if self.holds(digest):
            return digest, False
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._partial(digest)
        try:
            with partial.open("xb") as file:
                file.write(memoryview(data.numpy()))
                file.flush()
                os.fsync(file.fileno())
            self._name(partial, digest)
        finally:
            partial.unlink(missing_ok=True)
        return digest, True

    def link(self, digest: str, target: Path) -> None:
        """Give the file another name; where the file system cannot, copy it.

        Raises:
            OSError: if it can be neither linked nor copied.
        """
        try:
            os.link(self.path(digest), target)
        except OSError:
            target.unlink(missing_ok=True)
            shutil.copyfile(self.path(digest), target)
            flush(target)

    def adopt(self, digest: str, source: Path) -> bool:
        """Take over a file whose content has been checked; tell whether that was possible.

        Nothing is copied: where the file system cannot link, a file that is already here is read.
        """
        own = self.path(digest)
        if _stamp(own) != _stamp(source):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                partial = self._partial(digest)
                try:
                    os.link(source, partial)
                    self._name(partial, digest)
                finally:
                    partial.unlink(missing_ok=True)
            except OSError:
                try:
                    whole = sha256_of(own) == digest
                except OSError:
                    whole = False
                if not whole:
                    return False
        self._remember(digest)
        return True

    def discard(self, digests: Collection[str]) -> None:
        """Remove files that were added."""
        for digest in digests:
            self.path(digest).unlink(missing_ok=True)
            self._stamps.pop(digest, None)

    def sweep(self, keep: Collection[str]) -> None:
        """Remove the files of all other contents, and what killed processes left."""
        if not self.folder.is_dir():
            return
        names = {f"{digest}{SUFFIX}" for digest in keep}
        for file in self.folder.iterdir():
            if file.name not in names and _OWN.fullmatch(file.name):
                file.unlink(missing_ok=True)
        self._stamps = {d: stamp for d, stamp in self._stamps.items() if d in keep}

    def _partial(self, digest: str) -> Path:
        return self.folder / f"{digest}{SUFFIX}.partial-{uuid.uuid4().hex}"

    def _name(self, partial: Path, digest: str) -> None:
        os.replace(partial, self.path(digest))
        try:
            flush(self.folder)
        except OSError:
            self.path(digest).unlink(missing_ok=True)
            raise
        self._remember(digest)

    def _remember(self, digest: str) -> None:
        stamp = _stamp(self.path(digest))
        if stamp is not None:
            self._stamps[digest] = stamp


def sha256_of(file: Path) -> str:
    """Give the sha256 of a file's content.

    Raises:
        OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have the disk hold a file's content, or the names in a folder, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stamp(file: Path) -> Stamp | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
