import pytest
import torch
from torchrl.checkpoint import Checkpoint

from layeredrl_trl.checkpoints.stored_rows import StoredRows
from tests.checkpoints.checkpointed import (
    assert_equal,
    checkpoint_of,
    make_buffer,
    record_written,
    transitions,
    whole_state,
)

CHANGES = {
    "update_": lambda b: b.update_(transitions(len(b), 5)),
    "set_": lambda b: b.set_("observation", torch.ones(len(b), 3)),
    "set_at_": lambda b: b.set_at_("observation", torch.ones(3), 2),
    "setitem": lambda b: b.__setitem__(3, b[4].clone()),
    "write_all": lambda b: b.write_all(b[:].clone().zero_()),
    "empty": lambda b: b.empty(),
    "empty, then the same number of rows": lambda b: (b.empty(), b.extend(transitions(30, 5))),
    "other count": lambda b: (b.empty(empty_write_count=False), b.extend(transitions(4, 5))),
    "write_at": lambda b: b.writer.write_at(torch.tensor([2, 20]), transitions(2, 6)),
    "in place and rows": lambda b: (
        b.set_at_("step", torch.tensor(5), 2),
        b.extend(transitions(4)),
    ),
    "in place, as often as rows": lambda b: (
        b.set_at_("step", torch.tensor(5), 2),
        b.set_at_("step", torch.tensor(5), 9),
        b.extend(transitions(2)),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_in_place_are_saved(tmp_path, change):
    buffer, other = make_buffer(plain=True), make_buffer(plain=True)
    checkpoint = checkpoint_of(buffer, tmp_path)
    buffer.extend(transitions(30))
    checkpoint.save(tmp_path / "a")
    CHANGES[change](buffer)
    checkpoint_of(other, tmp_path / "other").load(checkpoint.save(tmp_path / "b"))
    assert_equal(whole_state(other), whole_state(buffer))


def test_changes_that_nothing_counts_are_saved_after_forget(tmp_path, monkeypatch):
    buffer, other = make_buffer(), make_buffer()
    adapter = StoredRows(tmp_path / "rows", chunk_rows=8)
    checkpoint = Checkpoint().register("buffer", buffer, adapter=adapter)
    buffer.extend(transitions(30))
    checkpoint.save(tmp_path / "a")
    buffer.storage._storage["observation"][3] = 9.0
    adapter.forget()
    written = record_written(monkeypatch)
    path = checkpoint.save(tmp_path / "b")
    assert len(written) == 1  # all are compared, the one that differs is written
    checkpoint_of(other, tmp_path / "other").load(path)
    assert_equal(whole_state(other), whole_state(buffer))


@pytest.mark.parametrize("n", [4, 25, 70])
def test_rows_that_another_process_wrote_are_saved(tmp_path, n, monkeypatch):
    """Its writer tells nobody here, but counts the rows that all of them wrote."""
    written = record_written(monkeypatch)
    buffer, other = make_buffer(plain=True), make_buffer(plain=True)
    checkpoint = checkpoint_of(buffer, tmp_path)
    buffer.extend(transitions(30))
    checkpoint.save(tmp_path / "a")
    attached = list(buffer.storage._attached_entities)
    buffer.storage._attached_entities[:] = []
    for rows in transitions(n, 1).split(10):
        buffer.extend(rows)
    buffer.storage._attached_entities[:] = attached
    buffer.extend(transitions(2, 2))
    written.clear()
    checkpoint_of(other, tmp_path / "other").load(checkpoint.save(tmp_path / "b"))
    assert_equal(whole_state(other), whole_state(buffer))
    assert n > 4 or len(written) == 2
