"""The rows that are kept: of which refills, and their state."""

import pytest
import torch
from torchrl.checkpoint import Checkpoint

from layeredrl_trl import TransitionSliceSampler
from layeredrl_trl.data import read_slices
from layeredrl_trl.schedules import PiecewiseLinearSchedule, RampSchedule
from tests.trainers.imagined_problems import (
    KnownDynamics,
    imagined_buffer,
    known_env,
    plain,
)

# ---- refills


def test_the_rows_of_the_last_refills_are_kept_the_oldest_first():
    imagined = imagined_buffer(refills=0, n=20, retain=3, length=lambda steps: 1 + steps // 10)
    buffer, refills = imagined.buffer, []
    for k in range(6):
        imagined.refill(10 * k)
        new = imagined.buffer[-imagined._rows.sizes[-1] :]
        refills.append(new.clone())
        assert imagined.buffer is buffer
        expected = torch.cat(refills[-3:])
        assert len(buffer) == len(imagined) == len(expected)
        assert (buffer[:] == expected).all()
    with pytest.raises(RuntimeError):
        buffer.extend(refills[0])


def test_only_the_last_refill_is_kept():
    imagined = imagined_buffer(refills=3, n=20, retain=1)
    assert len(imagined) == len(imagined.buffer) == 20


@pytest.mark.parametrize(
    ("length", "lengths"),
    [
        (3, [3, 3, 3, 3]),
        (RampSchedule(start=1, end=4, warm_up=20, duration=60), [1, 2, 3, 4]),
        (PiecewiseLinearSchedule([(0, 1.0), (80, 2.6)]), [1, 1, 2, 2]),
        (lambda steps: 2.9999999, [3, 3, 3, 3]),
    ],
    ids=["number", "ramp", "rounded down", "rounding error"],
)
def test_the_length_follows_its_schedule(length, lengths):
    env = known_env(KnownDynamics(hazard=0.0))
    imagined = imagined_buffer(env, refills=0, n=10, length=length)
    for steps, expected in zip([20, 40, 60, 80], lengths, strict=True):
        assert imagined.branch_length(steps) == expected
        assert imagined.refill(steps) == 10 * expected


def test_the_rows_can_be_drawn_as_slices_by_who_wants_them():
    imagined = imagined_buffer(n=50, length=3)
    slices = read_slices(
        imagined.buffer, TransitionSliceSampler(slice_len=1), 200, 3, ["observation"]
    )
    mask = slices["collector", "mask"].squeeze(-1)
    assert mask[:, 0].all() and not mask.all() and mask[:, 2].any()


# ---- state


def test_a_state_is_plain_and_goes_on_exactly():
    def make(refills):
        return imagined_buffer(refills=refills, n=30, retain=2, length=2)

    imagined = make(3)
    imagined.refill(70)
    state = imagined.state_dict()
    assert plain(state) and state["last_refill_at"] == 70
    torch.manual_seed(5)
    imagined.refill(80)
    expected = imagined.sample(50)
    loaded = make(0)
    loaded.load_state_dict(state)  # the refill after it changed nothing in the state
    torch.manual_seed(5)
    loaded.refill(80)
    assert (loaded.sample(50) == expected).all()
    assert len(loaded) == len(imagined)


def test_an_empty_state():
    imagined = imagined_buffer()
    imagined.load_state_dict(imagined_buffer(refills=0).state_dict())
    assert len(imagined) == len(imagined.buffer) == 0
    with pytest.raises(ValueError, match="call refill first"):
        imagined.sample(4)


def test_torchrls_checkpoint_keeps_the_rows(tmp_path):
    imagined = imagined_buffer(refills=2, n=30, length=2)
    Checkpoint(imagined=imagined).save(tmp_path / "here")
    loaded = imagined_buffer(refills=0, n=30, length=2)
    Checkpoint(imagined=loaded).load(tmp_path / "here")
    assert (loaded.buffer[:] == imagined.buffer[:]).all()
    assert plain(loaded.state_dict())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sizes": [10, 5]}, ValueError, "expected 15 rows"),
        ({"sizes": [10, 10, 10]}, ValueError, "3 refills, but retain=2"),
        ({"rows": {"observation": torch.zeros(20, 2)}}, KeyError, "have no .*action"),
        ({"last_refill_at": "x"}, ValueError, "x"),
    ],
    ids=["rows", "retain", "entries", "counter"],
)
def test_a_wrong_state_changes_nothing(change, error, message):
    imagined = imagined_buffer(known_env(KnownDynamics(hazard=0.0)), n=10, retain=2, refills=2)
    before, state = imagined.buffer[:].clone(), imagined.state_dict()
    with pytest.raises(error, match=message):
        imagined.load_state_dict({**state, **change})
    with pytest.raises(KeyError, match="sizes"):
        imagined.load_state_dict({"rows": {}, "last_refill_at": 3})
    assert (imagined.buffer[:] == before).all() and imagined.state_dict()["last_refill_at"] == 0
