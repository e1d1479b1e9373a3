"""Ways to damage a checkpoint, for `damaged_checkpoints`."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layeredrl_trl.checkpoints.checksums import CHECKSUMS, seal

_TRIES = 50  # until a random change is a change


class Canary:
    """An object that, if it is ever unpickled, makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


# Ways to damage a copy of a checkpoint. Files are hard links: they are replaced, never written to.


@dataclass
class Damage:
    """A copy to be damaged, a generator of choices, and other checkpoints to take bytes from."""

    copy: Path
    choose: random.Random
    older: Path
    foreign: Path
    canary: Path

    def files(self, ending: str = "") -> list[Path]:
        return sorted(p for p in self.copy.rglob(f"*{ending}") if p.is_file())

    def file(self, ending: str = "") -> Path:
        return self.choose.choice(self.files(ending))

    def folders(self) -> list[Path]:
        return sorted(p for p in self.copy.rglob("*") if p.is_dir())

    def twin(self, file: Path, of: Path) -> Path | None:
        """The file at the same place in another checkpoint."""
        twin = of / file.relative_to(self.copy)
        return twin if twin.is_file() else None


def put(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def change(damage: Damage, edit: Callable[[bytearray], None]) -> None:
    """Edit the bytes of a random file until that changes them."""
    for _ in range(_TRIES):
        file = damage.file()
        old = file.read_bytes()
        new = bytearray(old)
        edit(new)
        if bytes(new) != old:
            return put(file, bytes(new))
    raise RuntimeError("no change was found")


def flip_a_bit(damage: Damage) -> None:
    def edit(data: bytearray) -> None:
        if data:
            bit = damage.choose.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8

    change(damage, edit)


def random_bytes(damage: Damage) -> None:
    def edit(data: bytearray) -> None:
        for _ in range(damage.choose.randint(2, 64) if data else 0):
            data[damage.choose.randrange(len(data))] = damage.choose.randrange(256)

    change(damage, edit)


def truncated(damage: Damage) -> None:
    change(
        damage, lambda data: data.__delitem__(slice(damage.choose.randrange(len(data) + 1), None))
    )


def lengthened(damage: Damage) -> None:
    change(damage, lambda data: data.extend(damage.choose.randbytes(damage.choose.randint(1, 64))))


def zeros(damage: Damage) -> None:
    def edit(data: bytearray) -> None:
        low = damage.choose.randrange(len(data) + 1)
        high = damage.choose.randint(low, len(data))
        data[low:high] = bytes(high - low)

    change(damage, edit)


def all_zeros(damage: Damage) -> None:
    change(damage, lambda data: data.__setitem__(slice(None), bytes(len(data))))


def bytes_moved(damage: Damage) -> None:
    def edit(data: bytearray) -> None:
        start = damage.choose.randrange(len(data) + 1)
        data[:] = data[start:] + data[:start]

    change(damage, edit)


def file_missing(damage: Damage) -> None:
    damage.file().unlink()


def folder_missing(damage: Damage) -> None:
    shutil.rmtree(damage.choose.choice(damage.folders()))


def file_surplus(damage: Damage) -> None:
    folder = damage.choose.choice([damage.copy, *damage.folders()])
    name = damage.choose.choice(["state.pt", "x", "other.pickle", "a b", "é", "transform.t"])
    put(folder / name, damage.choose.randbytes(20))


def folder_surplus(damage: Damage) -> None:
    (damage.choose.choice([damage.copy, *damage.folders()]) / "state").mkdir(exist_ok=True)
    (damage.choose.choice([damage.copy, *damage.folders()]) / "more").mkdir()


def pickle_surplus(damage: Damage) -> None:
    bomb = pickle.dumps(Canary(damage.canary))
    put(damage.choose.choice(damage.folders()) / "state.pt", bomb)


def pickle_instead(damage: Damage) -> None:
    put(damage.file(), pickle.dumps(Canary(damage.canary)))


def files_swapped(damage: Damage) -> None:
    while True:
        one, other = damage.choose.sample(damage.files(), 2)
        first, second = one.read_bytes(), other.read_bytes()
        if first != second:
            put(one, second)
            return put(other, first)


def file_copied(damage: Damage) -> None:
    while True:
        one, other = damage.choose.sample(damage.files(), 2)
        if one.read_bytes() != other.read_bytes():
            return put(one, other.read_bytes())


def bytes_of_another(damage: Damage) -> None:
    while True:
        file = damage.file()
        twin = damage.twin(file, damage.choose.choice([damage.older, damage.foreign]))
        if twin is not None and twin.read_bytes() != file.read_bytes():
            return put(file, twin.read_bytes())


def component_of_another(damage: Damage) -> None:
    while True:
        other = damage.choose.choice([damage.older, damage.foreign])
        folder = damage.choose.choice(sorted((damage.copy / "components").iterdir()))
        twin = other / folder.relative_to(damage.copy)
        if _content(twin) != _content(folder):
            shutil.rmtree(folder)
            shutil.copytree(twin, folder)
            return None


def lists_of_another(damage: Damage) -> None:
    other = damage.choose.choice([damage.older, damage.foreign])
    for name in ("manifest.json", CHECKSUMS):
        put(damage.copy / name, (other / name).read_bytes())


def json_edited(damage: Damage) -> None:
    edit_json(damage, damage.file(".json"))


def checksum_edited(damage: Damage) -> None:
    """Let the list agree with a changed file, but not with itself."""
    file = damage.choose.choice([f for f in damage.files() if f.name != CHECKSUMS])
    old = hashlib.sha256(file.read_bytes()).hexdigest()
    put(file, file.read_bytes() + b"\n")
    text = (damage.copy / CHECKSUMS).read_text()
    new = hashlib.sha256(file.read_bytes()).hexdigest()
    put(damage.copy / CHECKSUMS, text.replace(old, new).encode())


def link_instead(damage: Damage) -> None:
    path = damage.choose.choice([*damage.files(), *damage.folders()])
    other = damage.copy.with_name("elsewhere")
    shutil.rmtree(other, ignore_errors=True)
    other.mkdir()
    shutil.move(path, other / path.name)
    path.symlink_to(other / path.name)


def no_file_instead(damage: Damage) -> None:
    file = damage.file()
    file.unlink()
    if damage.choose.random() < 0.5:
        file.mkdir()
    else:
        os.mkfifo(file)


def forged_json(damage: Damage) -> None:
    """Put something where it cannot be, and seal the copy again."""
    folder, choose = damage.copy / "components", damage.choose
    index, state = folder / "0000-buffer/index.json", folder / "0002-predictor/state.json"
    huge, deep = 2**62, "[" * 100_000
    edits: list[tuple[Path, Callable[[Any], Any]]] = [
        *((index, lambda c, n=n: c | {n: -1}) for n in ("rows", "cursor", "length", "chunk_rows")),
        *((index, lambda c, n=n: c | {n: huge}) for n in ("rows", "cursor", "length", "capacity")),
        *((index, lambda c, n=n: c | {n: "1"}) for n in ("ndim", "rows", "write_count", "chunks")),
        *((index, lambda c, n=n: {k: c[k] for k in c if k != n}) for n in ("layout", "format")),
        (index, lambda c: c | {"chunks": ["../../../../x", *c["chunks"][1:]]}),
        (index, lambda c: c | {"chunks": c["chunks"][:-1]}),
        (index, lambda c: c | {"chunks": c["chunks"][::-1]} if len(c["chunks"]) > 4 else []),
        (index, lambda c: _entry(c, 1, "float16")),
        (index, lambda c: _entry(c, 1, "os.system")),
        (index, lambda c: _entry(c, 2, [huge])),
        (index, lambda c: _entry(c, 2, [-1])),
        (index, lambda c: _entry(c, 0, ["action", "x"])),
        (index, lambda c: _entry(c, 0, [])),
        (index, lambda _: deep),
        (state, lambda _: deep),
        (state, lambda _: {"kind": "os.system", "value": "true"}),
        (state, lambda _: {"kind": "torch_dtype", "value": "load"}),
        (state, lambda _: {"kind": "numpy_scalar", "dtype": "O", "value": 1}),
        (state, lambda _: {"kind": "dict", "items": []}),
        (state, lambda _: []),
        (folder / "0000-buffer/state/state.json", lambda _: {"kind": "dict", "items": []}),
        (folder / "0003-rng/state.json", lambda _: {"kind": "dict", "items": []}),
        (damage.copy / "manifest.json", lambda c: _record(c, choose, "path", "../x")),
        (damage.copy / "manifest.json", lambda c: _record(c, choose, "path", "/etc")),
        (damage.copy / "manifest.json", lambda c: _record(c, choose, "path", "components")),
        (damage.copy / "manifest.json", lambda c: _record(c, choose, "adapter", "torchrl.x")),
        (
            damage.copy / "manifest.json",
            lambda c: _record(c, choose, "adapter", "torchrl.dump_load"),
        ),
        (damage.copy / "manifest.json", lambda c: _record(c, choose, "adapter_version", 2)),
        (damage.copy / "manifest.json", lambda c: c | {"format_version": 9}),
        (damage.copy / "manifest.json", lambda c: c | {"components": {}}),
        (damage.copy / "manifest.json", lambda _: []),
        (damage.copy / "manifest.json", lambda _: deep),
    ]
    file, edit = choose.choice(edits)
    content = edit(json.loads(file.read_text()))
    text = content if isinstance(content, str) else json.dumps(content)
    put(file, text.encode())
    reseal(damage.copy)


def forged_pickle(damage: Damage) -> None:
    """Give a component the files of a format that is unpickled, and seal the copy again."""
    folder = damage.copy / "components" / damage.choose.choice(["0002-predictor", "0003-rng"])
    if damage.choose.random() < 0.5:
        for file in folder.iterdir():
            file.unlink()
    if damage.choose.random() < 0.5:
        torch.save({"a": Canary(damage.canary)}, folder / "state.pt")
    else:
        (folder / "state").mkdir(parents=True)
        put(folder / "state" / "other.pickle", pickle.dumps(Canary(damage.canary)))
        put(folder / "state" / "meta.json", b'{"_type": "x", "shape": [], "device": "cpu"}')
    reseal(damage.copy)


def forged_numbers(damage: Damage) -> None:
    """Give a component numbers that do not fit, and seal the copy again."""
    folder, choose = damage.copy / "components", damage.choose
    kind = choose.randrange(3)
    if kind == 0:  # a predictor of another architecture, refused after the buffer was loaded
        for file in (folder / "0002-predictor").iterdir():
            put(file, (damage.foreign / file.relative_to(damage.copy)).read_bytes())
    elif kind == 1:  # one file of numbers cut off
        file = choose.choice([f for f in damage.files(".tdc") if "predictor" in str(f)])
        put(file, file.read_bytes()[: -choose.randint(1, 200)])
    else:
        file = damage.file(".rows")
        put(file, choose.randbytes(file.stat().st_size))
    reseal(damage.copy)


def _entry(content: dict[str, Any], place: int, value: Any) -> dict[str, Any]:
    content["layout"]["entries"][0][place] = value
    return content


def _record(content: dict[str, Any], choose: random.Random, name: str, value: Any):
    content["components"][choose.choice(sorted(content["components"]))][name] = value
    return content


def edit_json(damage: Damage, file: Path) -> None:
    """Change one value somewhere in a JSON file."""
    for _ in range(_TRIES):
        content = json.loads(file.read_text())
        places = list(_places(content))
        if not places:
            break
        holder, key = damage.choose.choice(places)
        old = holder[key]
        new = damage.choose.choice([None, True, -1, 1e300, "x", [], {}, old, old])
        if isinstance(old, int | float) and damage.choose.random() < 0.7:
            new = old + damage.choose.choice([1, -1, 0.5])
        if isinstance(holder, dict) and damage.choose.random() < 0.2:
            del holder[key]
        else:
            holder[key] = new
        text = json.dumps(content)
        if json.loads(file.read_text()) != content:
            return put(file, text.encode())
    return put(file, b"{}")


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    keys = content if isinstance(content, dict) else range(len(content))
    for key in keys:
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _places(content[key])


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def reseal(copy: Path) -> None:
    (copy / CHECKSUMS).unlink()
    seal(copy, {})


KINDS: tuple[Callable[[Damage], None], ...] = (
    *(flip_a_bit, random_bytes, truncated, lengthened, zeros, all_zeros, bytes_moved),
    *(file_missing, folder_missing, file_surplus, folder_surplus, pickle_surplus, pickle_instead),
    *(files_swapped, file_copied, bytes_of_another, component_of_another, lists_of_another),
    *(json_edited, checksum_edited, link_instead, no_file_instead),
    *(forged_json, forged_pickle, forged_numbers),
)
