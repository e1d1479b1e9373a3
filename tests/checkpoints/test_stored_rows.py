import errno
import json
import os
import shutil
import threading

import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import CheckpointError
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    RandomSampler,
    ReplayBuffer,
    SamplerWithoutReplacement,
    TensorDictMaxValueWriter,
    TensorStorage,
)

from layeredrl_trl.checkpoints.row_layout import DTYPES
from layeredrl_trl.checkpoints.stored_rows import StoredRows
from tests.checkpoints.checkpointed import (
    CAPACITY,
    assert_equal,
    checkpoint_of,
    files_in,
    make_buffer,
    record_written,
    transitions,
    whole_state,
)

STORAGES = {
    "tensor": lambda: make_buffer(),
    "memmap": lambda: make_buffer(LazyMemmapStorage(CAPACITY)),
    "plain": lambda: make_buffer(plain=True),
    "two dims": lambda: make_buffer(LazyTensorStorage(2 * CAPACITY, ndim=2)),
    "memmap, two dims": lambda: make_buffer(LazyMemmapStorage(2 * CAPACITY, ndim=2)),
    "given": lambda: make_buffer(TensorStorage(transitions(CAPACITY, 99)), plain=True),
}


def batch(buffer, n, seed):
    return transitions(n, seed, (2,) if buffer.storage.ndim == 2 else ())


# Contract and oracle.


@pytest.mark.parametrize("sizes", [(), (5,), (8, 8), (CAPACITY,), (30, 25), (30, 30, 30)])
@pytest.mark.parametrize("kind", STORAGES)
def test_loaded_buffer_is_the_saved_one_and_goes_on_as_it(tmp_path, kind, sizes):
    buffer = STORAGES[kind]()
    checkpoint = checkpoint_of(buffer, tmp_path)
    for number, n in enumerate(sizes):
        checkpoint.save(tmp_path / str(number))
        buffer.extend(batch(buffer, n, number))
        buffer.sample()
    path = checkpoint.save(tmp_path / "last")
    other = STORAGES[kind]()
    checkpoint_of(other, tmp_path).load(path)
    assert_equal(whole_state(other), whole_state(buffer))
    for seed in (7, 8, 9):
        for each in (buffer, other):
            each.extend(batch(each, 17, seed))
        assert_equal(whole_state(other), whole_state(buffer))
        assert_equal(other.sample().to_dict(), buffer.sample().to_dict())


@pytest.mark.parametrize("n", [3, 60])
def test_single_rows(tmp_path, n):
    buffer, other = make_buffer(), make_buffer()
    checkpoint = checkpoint_of(buffer, tmp_path)
    for number, row in enumerate(transitions(n).unbind(0)):
        buffer.add(row)
        if number % 7 == 0:
            checkpoint.save(tmp_path / f"{number}")
    checkpoint_of(other, tmp_path).load(checkpoint.save(tmp_path / "last"))
    assert_equal(whole_state(other), whole_state(buffer))


def test_every_dtype_and_shape_is_kept(tmp_path):
    data = torch.randint(0, 255, (6, 48), dtype=torch.uint8)
    entries = {name: data.view(dtype) for name, dtype in DTYPES.items() if name != "bool"}
    entries |= {"bool": data > 99, "scalar": data[:, 0].double(), "none": torch.zeros(6, 0)}
    rows = TensorDict(entries, batch_size=[6])
    rows["nested"] = TensorDict({"a": torch.rand(6, 4, 2)}, batch_size=[6, 4])
    buffers = [
        ReplayBuffer(storage=storage, sampler=RandomSampler())
        for storage in (TensorStorage(rows), LazyTensorStorage(6))
    ]
    path = checkpoint_of(buffers[0], tmp_path, chunk_rows=4).save(tmp_path / "a")
    checkpoint_of(buffers[1], tmp_path, chunk_rows=4).load(path)
    one, other = (buffer.storage._storage[:6] for buffer in buffers)
    assert_equal(other.to_dict(), one.to_dict())
    assert other["nested"].batch_size == one["nested"].batch_size


def test_sampler_state_is_kept(tmp_path):
    buffers = [
        ReplayBuffer(
            storage=LazyTensorStorage(CAPACITY), sampler=SamplerWithoutReplacement(), batch_size=6
        )
        for _ in range(2)
    ]
    buffers[0].extend(transitions(30))
    buffers[0].sample()
    path = checkpoint_of(buffers[0], tmp_path).save(tmp_path / "a")
    checkpoint_of(buffers[1], tmp_path).load(path)
    rest = []
    for buffer in buffers:
        torch.manual_seed(3)
        rest.append(torch.cat([buffer.sample()["observation"] for _ in range(4)]))
    assert torch.equal(*rest)


# What is written.


def test_bytes_written_do_not_grow_with_the_run(tmp_path, monkeypatch):
    written = record_written(monkeypatch)
    buffer = make_buffer(LazyTensorStorage(200))
    checkpoint, counts = checkpoint_of(buffer, tmp_path, chunk_rows=8), []
    for number in range(40):  # wraps after 20
        buffer.extend(transitions(10, number))
        written.clear()
        checkpoint.save(tmp_path / str(number))
        counts.append(len(written))
    assert counts == [2] * 40  # chunks of 8 rows


def test_nothing_new_writes_nothing(tmp_path, monkeypatch):
    written = record_written(monkeypatch)
    buffer = make_buffer()
    checkpoint = checkpoint_of(buffer, tmp_path)
    buffer.extend(transitions(30))
    checkpoint.save(tmp_path / "a")
    files, _ = files_in(tmp_path / "rows"), written.clear()
    checkpoint.save(tmp_path / "b")
    buffer.sample()
    checkpoint.save(tmp_path / "c")
    assert written == []
    assert files_in(tmp_path / "rows") == files


def test_first_save_after_a_resume_writes_only_what_is_new(tmp_path, monkeypatch):
    written = record_written(monkeypatch)
    buffer, other = make_buffer(), make_buffer()
    buffer.extend(transitions(30))
    path = checkpoint_of(buffer, tmp_path).save(tmp_path / "a")
    resumed = checkpoint_of(other, tmp_path, chunk_rows=99)  # those of the checkpoint count
    resumed.load(path)
    written.clear()
    resumed.save(tmp_path / "b")
    assert written == []
    other.extend(transitions(3, 1))
    resumed.save(tmp_path / "c")
    assert len(written) == 2  # rows 30 to 32 lie in two chunks


def test_resume_without_the_folder_of_chunks(tmp_path, monkeypatch):
    written = record_written(monkeypatch)
    buffer, other = make_buffer(), make_buffer()
    buffer.extend(transitions(30))
    path = checkpoint_of(buffer, tmp_path).save(tmp_path / "a")
    resumed = checkpoint_of(other, tmp_path / "elsewhere")
    resumed.load(path)
    written.clear()
    resumed.save(tmp_path / "b")
    assert written == []


def test_checkpoints_share_files_and_each_may_go(tmp_path):
    buffer, other = make_buffer(), make_buffer()
    checkpoint = checkpoint_of(buffer, tmp_path)
    buffer.extend(transitions(30))
    first = checkpoint.save(tmp_path / "a")
    before = whole_state(buffer)
    buffer.extend(transitions(13, 1))  # rows 30 to 39 and 0 to 2: of chunks 0, 3 and 4
    second = checkpoint.save(tmp_path / "b")
    assert len(set(files_in(first).values()) & set(files_in(second).values())) == 2
    shutil.rmtree(second)
    shutil.rmtree(tmp_path / "rows")
    checkpoint_of(other, tmp_path / "other").load(first)
    assert_equal(whole_state(other), before)


def test_copies_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    written = record_written(monkeypatch)

    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    buffer, other = make_buffer(), make_buffer()
    checkpoint = checkpoint_of(buffer, tmp_path)
    buffer.extend(transitions(30))
    path = checkpoint.save(tmp_path / "a")
    assert not set(files_in(path).values()) & set(files_in(tmp_path / "rows").values())
    resumed = checkpoint_of(other, tmp_path)
    resumed.load(path)
    assert_equal(whole_state(other), whole_state(buffer))
    written.clear()
    resumed.save(tmp_path / "b")
    assert written == []


@pytest.mark.parametrize("damage", ["removed", "touched", "cut"])
def test_chunk_that_somebody_spoilt_is_written_anew(tmp_path, damage):
    buffer, other = make_buffer(), make_buffer()
    checkpoint = checkpoint_of(buffer, tmp_path)
    buffer.extend(transitions(30))
    checkpoint.save(tmp_path / "a")
    file = sorted((tmp_path / "rows").iterdir())[0]
    content = file.read_bytes()
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(content[:-5] if damage == "cut" else content[::-1])
        os.utime(file, (1, 1))
    checkpoint_of(other, tmp_path / "other").load(checkpoint.save(tmp_path / "b"))
    assert_equal(whole_state(other), whole_state(buffer))


def test_folder_holds_the_current_chunks_and_leaves_other_files_alone(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / f"{'0' * 64}.rows.partial-{'0' * 32}").write_text("of a killed process")
    (folder / f"{'0' * 64}.rows").write_text("of an older run")
    buffer = make_buffer()
    checkpoint = checkpoint_of(buffer, tmp_path)
    for number in range(9):
        buffer.extend(transitions(30, number))
        path = checkpoint.save(tmp_path / str(number))
        checkpoint.save(tmp_path / f"again {number}")
        chunks = {file.name for file in (path / "components/0000-buffer/chunks").iterdir()}
        assert {file.name for file in folder.iterdir()} == chunks | {"notes.txt"}


@pytest.mark.parametrize("fails_at", range(4))
def test_full_disk_leaves_the_folder_and_older_checkpoints(tmp_path, monkeypatch, fails_at):
    buffer, other = make_buffer(), make_buffer()
    checkpoint = checkpoint_of(buffer, tmp_path)
    buffer.extend(transitions(30))
    first, before = checkpoint.save(tmp_path / "a"), whole_state(buffer)
    buffer.extend(transitions(30, 1))
    files, calls = files_in(tmp_path), []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path / "b")
    assert files_in(tmp_path) == files
    checkpoint_of(other, tmp_path / "other").load(first)
    assert_equal(whole_state(other), before)
    second = checkpoint.save(tmp_path / "b")
    checkpoint_of(other, tmp_path / "other").load(second)
    assert_equal(whole_state(other), whole_state(buffer))


def test_collector_may_write_meanwhile(tmp_path):
    """Each checkpoint holds the rows of one moment: the last ones of a sequence of numbers."""

    def make():
        return ReplayBuffer(storage=LazyTensorStorage(500), sampler=RandomSampler(), batch_size=2)

    buffer, stop = make(), threading.Event()
    checkpoint = checkpoint_of(buffer, tmp_path, chunk_rows=64)

    def collect():
        start = 0
        while not stop.is_set():
            number = torch.arange(start, start + 7)
            buffer.extend(TensorDict({"a": number, "b": -number}, batch_size=[7]))
            start += 7

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        while len(buffer) < 500:
            pass
        paths = [checkpoint.save(tmp_path / str(number)) for number in range(10)]
    finally:
        stop.set()
        thread.join()
    counts = []
    for path in paths:
        other = make()
        checkpoint_of(other, tmp_path / "other", chunk_rows=64).load(path)
        count = other.write_count
        rows = other[:]
        expected = torch.arange(count - 500, count)
        assert torch.equal(rows["a"].sort().values, expected)
        assert torch.equal(rows["a"][expected % 500], expected)
        assert torch.equal(rows["b"], -rows["a"])
        counts.append(count)
    assert counts == sorted(counts) and counts[0] < counts[-1]


# A storage of another size.


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("n", [30, CAPACITY])
def test_larger_storage_goes_on_as_if_it_had_been_so_large(tmp_path, n, ndim):
    size = 2 * CAPACITY if ndim == 2 else CAPACITY
    buffer, large, other = (make_buffer(LazyTensorStorage(k * size, ndim=ndim)) for k in (1, 2, 2))
    for each in (buffer, large):
        each.extend(batch(each, n, 1))
    checkpoint_of(other, tmp_path).load(checkpoint_of(buffer, tmp_path).save(tmp_path / "a"))
    assert_equal(whole_state(other), whole_state(large))
    for each in (other, large):
        each.extend(batch(each, 33, 2))
    assert_equal(whole_state(other), whole_state(large))


# Errors.


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: make_buffer(ListStorage(9)), "ListStorage"),
        (lambda: torch.nn.Linear(1, 1), "Linear"),
        (
            lambda: make_buffer(writer=TensorDictMaxValueWriter(rank_key="step")),
            "TensorDictMaxValueWriter",
        ),
        (lambda: make_buffer(TensorStorage(torch.zeros(9, 2))), "Tensor"),
        (lambda: make_buffer(prefetch=2), "prefetch"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, make, text):
    with pytest.raises(TypeError, match=text):
        checkpoint_of(make(), tmp_path).save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_sampler_with_odd_state_is_refused_before_anything_is_written(tmp_path):
    buffer = make_buffer()
    buffer.extend(transitions(9))
    buffer.sampler.state_dict = lambda: {"tree": object()}
    with pytest.raises(TypeError, match="plain values"):
        checkpoint_of(buffer, tmp_path).save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def other_rows():
    return transitions(9).exclude("step").set("more", torch.zeros(9, 2))


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (lambda: make_buffer(LazyTensorStorage(39)), {}, "40 rows.* overwritten.* 39"),
        (lambda: make_buffer(LazyTensorStorage(99)), {}, "40 rows.* overwritten.* 99"),
        (lambda: make_buffer(LazyTensorStorage(40, ndim=2)), {}, "ndim"),
        (make_buffer, {"like": other_rows()}, "like.*'more'"),
        (make_buffer, {"like": transitions(9).float()}, "like.*'half'.*bfloat16"),
        (lambda: filled(other_rows()), {}, "this buffer.*'more'"),
        (lambda: filled(transitions(9).double()), {}, "this buffer.*float64"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path, make, options, text):
    buffer = make_buffer(plain=True)
    buffer.extend(transitions(60))
    path = checkpoint_of(buffer, tmp_path).save(tmp_path / "a")
    other = make()
    before = whole_state(other)
    with pytest.raises(CheckpointError, match=text):
        checkpoint_of(other, tmp_path / "other", **options).load(path)
    assert_equal(whole_state(other), before)


def filled(rows):
    buffer = make_buffer(plain=True)
    buffer.extend(rows)
    return buffer


@pytest.mark.parametrize("n", [0, 30])
@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
def test_failure_halfway_is_undone(tmp_path, monkeypatch, storage, n):
    """A chunk changes between the check and the reading of its rows; later saves are right."""
    buffer = make_buffer()
    buffer.extend(transitions(60))
    path = checkpoint_of(buffer, tmp_path).save(tmp_path / "a")
    options = {"scratch_dir": tmp_path / "memory"} if storage is LazyMemmapStorage else {}
    other = make_buffer(storage(CAPACITY, **options))
    if n:
        other.extend(transitions(n, 1))
    before = whole_state(other)
    saving = checkpoint_of(other, tmp_path / "other")
    saving.save(tmp_path / "b")
    monkeypatch.setattr("layeredrl_trl.checkpoints.stored_rows.sha256_of", lambda file: file.stem)
    file = sorted((path / "components/0000-buffer/chunks").iterdir())[-1]
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match=r"chunk of rows .* is damaged"):
        saving.load(path)
    monkeypatch.undo()
    assert_equal(whole_state(other), before)
    assert other.storage.initialized == bool(n)
    other.extend(transitions(5, 2))
    last = make_buffer()
    checkpoint_of(last, tmp_path / "last").load(saving.save(tmp_path / "c"))
    assert_equal(whole_state(last), whole_state(other))


def test_own_generator_that_the_saved_buffer_had_not(tmp_path):
    buffer = make_buffer(seed=None)
    buffer.extend(transitions(9))
    path = checkpoint_of(buffer, tmp_path).save(tmp_path / "a")
    other = make_buffer(seed=4)
    before = whole_state(other)
    with pytest.raises(CheckpointError, match="generator"):
        checkpoint_of(other, tmp_path / "other").load(path)
    assert_equal(whole_state(other), before)


@pytest.mark.parametrize("name", ["rows", "cursor", "chunks", "layout", "format"])
def test_index_that_contradicts_itself(tmp_path, name):
    buffer = make_buffer()
    buffer.extend(transitions(30))
    path = checkpoint_of(buffer, tmp_path).save(tmp_path / "a")
    file = path / "components/0000-buffer/index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {name: 2**40}))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        checkpoint_of(make_buffer(), tmp_path / "other").load(path)


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="chunk_rows"):
        StoredRows(tmp_path, chunk_rows=0)
    with pytest.raises(TypeError, match="options"):
        StoredRows(tmp_path).save(make_buffer(), tmp_path / "a", args=(1,), kwargs={})
