"""TensorDicts that were saved to folders, read without running or changing anything."""

import hashlib
import json
import os
import pickle

import pytest
import torch
from tensordict import NonTensorData, TensorDict, lazy_stack

from layeredrl_trl.data.memmap_folder import read_memmap
from tests.data.datasets_on_disk import steps

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def hashes(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("method", ["memmap", "save"])
def test_entries_are_those_that_were_saved(method, tmp_path):
    data = steps()
    data["info"] = {"deep": {"flag": data["next", "done"].clone()}}
    getattr(data, method)(tmp_path)
    read = read_memmap(tmp_path)
    assert read.batch_size == data.batch_size
    assert set(read.keys(True, True)) == set(data.keys(True, True))
    for key in data.keys(True, True):
        torch.testing.assert_close(read[key], data[key], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, tmp_path):
    data = TensorDict(x=torch.arange(6).reshape(2, 3).to(dtype), batch_size=[2])
    data.memmap(tmp_path)
    read = read_memmap(tmp_path)["x"]
    assert read.dtype is dtype and torch.equal(read, data["x"])


def test_entries_without_elements(tmp_path):
    TensorDict(x=torch.zeros(4, 0), y=torch.ones(4), batch_size=[4]).memmap(tmp_path)
    assert read_memmap(tmp_path)["x"].shape == (4, 0)


def test_files_do_not_change_when_what_was_read_does(tmp_path):
    steps().memmap(tmp_path)
    before = hashes(tmp_path)
    read = read_memmap(tmp_path)
    for key in read.keys(True, True):
        read[key].zero_()
    assert not read["observation"].any()
    assert hashes(tmp_path) == before


def test_entries_that_are_no_tensors_are_left_out(tmp_path):
    data = steps()
    data["task"] = NonTensorData("swim", batch_size=data.batch_size)  # kept as JSON
    data.memmap(tmp_path)
    assert (tmp_path / "task").is_dir()
    assert "task" not in read_memmap(tmp_path).keys()


# --- errors


class Trap:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


def test_nothing_is_unpickled(tmp_path):
    data, sprung = steps(), tmp_path / "sprung"
    data["task"] = NonTensorData("swim", batch_size=data.batch_size)
    data.memmap(tmp_path / "data")
    trap = tmp_path / "data" / "task" / "other.pickle"
    trap.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match=r"pickled data \(other.pickle\)"):
        read_memmap(tmp_path / "data")
    assert not sprung.exists()
    pickle.loads(trap.read_bytes())
    assert sprung.exists()  # so the trap works


def test_lazy_stacks_are_named(tmp_path):
    lazy_stack([TensorDict(x=torch.zeros(2)), TensorDict(x=torch.zeros(3))]).memmap(tmp_path)
    with pytest.raises(ValueError, match=r"holds no TensorDict, but .*Lazy"):
        read_memmap(tmp_path)


def edit(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


ENTRY = {"device": "cpu", "shape": [18, 3], "dtype": "torch.float64", "is_nested": False}
DAMAGE = {
    "no meta": (lambda d: (d / "meta.json").unlink(), "meta.json cannot be read as JSON"),
    "no part": (lambda d: (d / "next" / "meta.json").unlink(), "next/meta.json cannot be read"),
    "no file": (lambda d: (d / "action.memmap").unlink(), "action.memmap is missing"),
    "a short file": (
        lambda d: (d / "action.memmap").write_bytes(b"1234"),
        r"has 4 bytes, expected 288 bytes for \[18, 2\]",
    ),
    "no batch size": (lambda d: edit(d, shape=None), "holds no TensorDict"),
    "another class": (lambda d: edit(d, _type="os.system"), "holds no TensorDict, but os.system"),
    "a path": (lambda d: edit(d, **{"../secret": ENTRY}), "'../secret' names no file"),
    "an absolute path": (lambda d: edit(d, **{"/etc/x": ENTRY}), "'/etc/x' names no file"),
    "another batch": (
        lambda d: edit(d, action=ENTRY | {"shape": [9, 2]}),
        "do not have its batch size",
    ),
    "no dtype": (lambda d: edit(d, action=ENTRY | {"dtype": "torch.load"}), "shape and dtype"),
    "no shape": (lambda d: edit(d, action=ENTRY | {"shape": [-1, 2]}), "shape and dtype"),
    "several shapes": (lambda d: edit(d, action=ENTRY | {"is_nested": True}), "shape and dtype"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_error(damage, tmp_path):
    steps().memmap(tmp_path)
    apply, text = DAMAGE[damage]
    apply(tmp_path)
    with pytest.raises(ValueError, match=text):
        read_memmap(tmp_path)
