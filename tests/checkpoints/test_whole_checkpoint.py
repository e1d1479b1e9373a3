import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointAdapter,
    CheckpointError,
    CheckpointRotation,
    StateDictCheckpointAdapter,
)

from benchmarks import damage, damaged_checkpoints
from layeredrl_trl.checkpoints import checksums
from layeredrl_trl.checkpoints.stored_rows import StoredRows
from layeredrl_trl.checkpoints.whole_checkpoint import (
    WholeCheckpoint,
    latest_whole,
    set_damaged_aside,
)
from tests.checkpoints.checkpointed import (
    assert_equal,
    files_in,
    make_buffer,
    transitions,
    whole_state,
)
from tests.checkpoints.whole_runs import Everything, Picky

# Contract.


def test_fresh_objects_get_what_was_saved(tmp_path):
    run, other = Everything(tmp_path, 1), Everything(tmp_path / "other", 2)
    path = run.checkpoint.save(tmp_path / "a", metadata={"frames": 1})
    expected = run.state()
    torch.rand(3), random.random(), np.random.rand()
    result = other.checkpoint.load(path)
    assert result.loaded == set(run.checkpoint.components) and result.values["name"] == "a run"
    assert_equal(other.state(), expected)


def test_buffer_that_holds_nothing_yet(tmp_path):
    run, other = make_buffer(), make_buffer()
    options = {"adapter": StoredRows(tmp_path / "rows", chunk_rows=8)}
    path = WholeCheckpoint(step={}).register("buffer", run, **options).save(tmp_path / "a")
    WholeCheckpoint(step={}).register("buffer", other, **options).load(path)
    for each in (run, other):
        each.extend(transitions(9))
    assert_equal(whole_state(other), whole_state(run))
    (path / "components/0000-buffer/chunks").rmdir()
    with pytest.raises(CheckpointError, match="chunks' among them"):
        WholeCheckpoint.verify(path)


def test_files_are_listed_as_sha256sum_lists_them(tmp_path):
    run = Everything(tmp_path, 1)
    path = run.checkpoint.save(tmp_path / "a", metadata={"frames": 1})
    lines = (path / checksums.CHECKSUMS).read_text().splitlines()
    assert [line.split("  ") for line in lines[:-1]] == [
        [hashlib.sha256((path / name).read_bytes()).hexdigest(), name]
        for name in sorted(files_in(path))
        if name != checksums.CHECKSUMS
    ]
    assert WholeCheckpoint.verify(path)["metadata"] == {"frames": 1}
    assert Checkpoint.manifest(path)["metadata"] == {"frames": 1}


def test_rotation_keeps_and_removes(tmp_path):
    run = Everything(tmp_path, 1)
    rotation = CheckpointRotation(tmp_path, keep_last=2, keep_best=("score", "max"))
    states = {}
    for step in range(6):
        rotation.save(run.checkpoint, step=step, metadata={"score": -abs(step - 1)})
        states[step] = run.state()
        run.go_on(step)
    assert [int(path.name[-1]) for path in rotation.checkpoints()] == [1, 4, 5]
    assert latest_whole(rotation) == rotation.latest()
    for path in rotation.checkpoints():
        run.checkpoint.load(path)
        assert_equal(run.state(), states[int(path.name[-1])])


def test_selected_components(tmp_path):
    run, other = Everything(tmp_path, 1), Everything(tmp_path / "other", 2)
    path = run.checkpoint.save(tmp_path / "a", components=["buffer", "counters"])
    before = other.state()
    other.checkpoint.load(path, components=["counters"])
    assert_equal(other.state(), before | {"counters": {"frames": 1}})
    with pytest.raises(CheckpointError, match=r"missing=\['layer'\]"):
        other.checkpoint.load(path, components=["layer"])


def test_chunks_of_rows_are_not_read_when_saving(tmp_path, monkeypatch):
    run = Everything(tmp_path, 1)
    run.checkpoint.save(tmp_path / "a")
    run.go_on(1)
    read, hashed = [], checksums.sha256_of
    monkeypatch.setattr(checksums, "sha256_of", lambda f: (read.append(f.name), hashed(f))[1])
    run.checkpoint.save(tmp_path / "b")
    assert read and not [name for name in read if name.endswith(".rows")]


class Draws(Picky):
    """Draws a random number when it is loaded."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        torch.rand(1)
        super().load_state_dict(state)


@pytest.mark.parametrize("number", [1, 2], ids=["loaded", "refused"])
def test_random_numbers_are_set_last(tmp_path, number):
    run, other = Everything(tmp_path, 1), Everything(tmp_path / "other", 2)
    run.checkpoint.register("z", Draws(1))
    other.checkpoint.register("z", Draws(number))
    path, saved = run.checkpoint.save(tmp_path / "a"), torch.random.get_rng_state()
    torch.rand(3)
    before = torch.random.get_rng_state()
    if number == 1:
        other.checkpoint.load(path)
    else:
        with pytest.raises(CheckpointError, match="not mine"):
            other.checkpoint.load(path)
    assert torch.equal(torch.random.get_rng_state(), saved if number == 1 else before)


# A load is all or nothing.


@pytest.mark.parametrize("name", ["a", "m", "z"])  # before, between and behind the others
def test_component_that_refuses_changes_nothing(tmp_path, name):
    run, other = Everything(tmp_path, 1), Everything(tmp_path / "other", 2)
    run.checkpoint.register(name, Picky(1))
    other.checkpoint.register(name, Picky(2))
    path = run.checkpoint.save(tmp_path / "a")
    before = other.state()
    with pytest.raises(CheckpointError) as raised:
        other.checkpoint.load(path)
    text = str(raised.value)
    assert "\n" not in text and str(path) in text and f"{name!r}: not mine: 1" in text
    assert_equal(other.state(), before)
    other.go_on(3)
    last = Everything(tmp_path / "last", 3)
    last.checkpoint.register(name, Picky(2))
    last.checkpoint.load(other.checkpoint.save(tmp_path / "b"))
    assert_equal(last.state()["buffer"], other.state()["buffer"])


def test_buffer_that_refuses_changes_nothing(tmp_path):
    run, other = Everything(tmp_path, 1), Everything(tmp_path / "other", 2)
    run.buffer.extend(transitions(60).exclude("index"))
    other.buffer.empty()
    other.buffer.storage._storage = other.buffer.storage._storage.float()
    path, before = run.checkpoint.save(tmp_path / "a"), other.state()
    with pytest.raises(CheckpointError, match=r"'half': half bfloat16.* and half float32"):
        other.checkpoint.load(path)
    assert_equal(other.state(), before)


# Damage.


@pytest.mark.filterwarnings("ignore:Truncating the start/stop/step of slice")
def test_damaged_checkpoints_are_refused(tmp_path):
    said: list[str] = []
    number = 2 * len(damaged_checkpoints.KINDS)
    counts = damaged_checkpoints.try_damage(tmp_path, number, seed=1, say=said.append)
    total = sum(counts.values(), start=damaged_checkpoints.Counter())
    assert total.total() == number
    assert set(total) <= set(damaged_checkpoints.GOOD), said


def test_the_damage_is_noticed_by_what_looks_for_it(tmp_path, monkeypatch):
    """Without the hashes, damaged numbers load and the count of them is not zero."""
    monkeypatch.setattr(checksums, "sha256_of", lambda file: _listed(file))
    monkeypatch.setattr(damaged_checkpoints, "KINDS", (damage.bytes_of_another,))
    counts = damaged_checkpoints.try_damage(tmp_path, 20, say=lambda text: None)
    assert counts["bytes_of_another"]["changed numbers"] > 0


def _listed(file: Path) -> str:
    """What the list says, whatever the file holds; the true hash while there is no list yet."""
    for folder in file.parents:
        listed = folder / checksums.CHECKSUMS
        if listed.is_file():
            name = file.relative_to(folder).as_posix()
            return next(x[:64] for x in listed.read_text().splitlines() if x.endswith(f"  {name}"))
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["state.pt", "state.tdz", "state/other.pickle"])
def test_format_that_could_be_unpickled_is_refused_even_if_harmless(tmp_path, name):
    run = Everything(tmp_path, 1)
    path, before = run.checkpoint.save(tmp_path / "a"), run.state()
    file = path / "components/0002-layer" / name
    file.parent.mkdir(exist_ok=True)
    torch.save({key: x + 1 for key, x in run.layer.state_dict().items()}, file)
    damage.reseal(path)
    with pytest.raises(CheckpointError, match="'layer' is of a format that is not accepted"):
        run.checkpoint.load(path)
    assert_equal(run.state(), before)


def test_latest_whole_passes_over_damaged_ones(tmp_path):
    run = Everything(tmp_path, 1)
    rotation = CheckpointRotation(tmp_path, keep_last=5)
    assert latest_whole(rotation) is None
    paths = [rotation.save(run.checkpoint, step=step) for step in range(4)]
    (paths[3] / "manifest.json").unlink()
    os.truncate(next(paths[2].rglob("state.tdc")), 10)
    with pytest.warns(UserWarning, match="an older one is looked for") as caught:
        assert latest_whole(rotation) == paths[1]
    assert [paths[3].name in str(caught[0].message), paths[2].name in str(caught[1].message)] == [
        True,
        True,
    ]
    for path in paths[:2]:
        (path / "x").touch()
    with pytest.warns(UserWarning):
        assert latest_whole(rotation) is None


def test_run_that_goes_on_from_an_older_one_keeps_what_it_saves(tmp_path):
    run = Everything(tmp_path, 1)
    rotation = CheckpointRotation(tmp_path, keep_last=1)
    rotation.keep_last = 2
    first, second = (rotation.save(run.checkpoint, step=step) for step in (10, 30))
    (second / "manifest.json").write_text("[]")
    assert set_damaged_aside(rotation) == [tmp_path / f"damaged-{second.name}"]
    assert set_damaged_aside(rotation) == []
    rotation.keep_last = 1
    path = rotation.save(run.checkpoint, step=20)
    assert latest_whole(rotation) == path and not first.exists()


# Errors.


class ByHand(CheckpointAdapter):
    adapter_id = "by_hand"

    def save(self, component, path, *, args, kwargs):
        path.mkdir()
        (path / "a\nb").touch()

    def load(self, component, path, **_):
        raise ValueError("never")


class Dumps:
    def dump(self, path): ...

    def load(self, path): ...


@pytest.mark.parametrize(
    ("register", "text"),
    [
        (lambda c: c.register("x", make_buffer()), r"adapter=StoredRows\(folder\)"),
        (lambda c: c.register("x", Dumps()), "Dumps would be saved by its dump"),
        (
            lambda c: c.register("x", Picky(), adapter=StateDictCheckpointAdapter("torch")),
            "payload_format='consolidated', got 'torch'",
        ),
        (lambda c: c.register("x", object(), adapter=ByHand()), "name of a file"),
        (lambda c: c.register("x", object()), "No checkpoint adapter"),
    ],
)
def test_components_that_are_refused(tmp_path, register, text):
    checkpoint = register(WholeCheckpoint(step=1))
    with pytest.raises(CheckpointError, match=text) as raised:
        checkpoint.save(tmp_path / "a")
    assert "\n" not in str(raised.value) and str(tmp_path / "a") in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_component_whose_load_cannot_be_undone(tmp_path):
    adapter = ByHand()
    adapter.save = lambda component, path, **_: path.mkdir()
    checkpoint = WholeCheckpoint(step=1).register("x", object(), adapter=adapter)
    path = checkpoint.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"ByHand has no restore_point\(\)"):
        checkpoint.load(path)


@pytest.mark.parametrize("options", [{"format": "archive"}, {"strict": "warn"}])
def test_options_of_torchrl_that_do_not_fit(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options.values()))):
        WholeCheckpoint(step=1, **options)
    checkpoint = WholeCheckpoint(step=1)
    with pytest.raises(ValueError, match=next(iter(options.values()))):
        (checkpoint.save if "format" in options else checkpoint.load)(tmp_path / "a", **options)


def test_path_that_is_no_checkpoint(tmp_path):
    checkpoint = WholeCheckpoint(step=1)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("none", "file", "empty"):
        with pytest.raises(CheckpointError, match=f"{name}' cannot be loaded: "):
            checkpoint.load(tmp_path / name)
    plain = Checkpoint(step=1).save(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"has no checksums\.sha256"):
        checkpoint.load(plain)


def test_plain_checkpoint_of_torchrl_can_read_it(tmp_path):
    run, other = Everything(tmp_path, 1), Everything(tmp_path / "other", 2)
    path = run.checkpoint.save(tmp_path / "a")
    plain = Checkpoint(layer=other.layer, counters=other.counters)
    plain.load(path)
    assert_equal(other.state()["layer"], run.state()["layer"])
    assert json.loads((path / "manifest.json").read_text())["container"] == "directory"
    shutil.rmtree(path)
