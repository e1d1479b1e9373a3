"""N steps, a checkpoint, a new trainer, N steps: as 2N steps, to the bit."""

from functools import partial

import pytest
import torch
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    GymEnv,
    InitTracker,
    ParallelEnv,
    TransformedEnv,
)

from layeredrl_trl import keys
from layeredrl_trl.checkpoints import StoredRows, WholeCheckpoint
from layeredrl_trl.trainers import CollectorState, EpisodeLog
from tests.trainers.small_trainers import (
    make_buffer,
    make_env,
    make_trainer,
    rows_of,
    tensors_of,
)

ENVS = ["Pendulum-v1", "CartPole-v1", pytest.param("InvertedPendulum-v5", id="mujoco")]
INTERVAL = 60


def env_of(kind, seed):
    if kind == "several":
        return make_env("Pendulum-v1", n_envs=2, seed=seed)
    if kind == "unsavable":
        env = make_env("Pendulum-v1", seed=seed)
        env.base_env._env.unwrapped.secret = object()
        return env
    return make_env(kind, seed=seed)


def run(folder, kind, total_frames, *, resume=False, seed=0, whole=True, **options):
    """A trainer that has run, or gone on from the latest checkpoint in ``folder``."""
    checkpoint, rotation = WholeCheckpoint(), CheckpointRotation(folder / "saved", keep_last=9)
    if not whole:
        checkpoint = Checkpoint()
    trainer = make_trainer(
        env_of(kind, seed),
        seed=seed,
        total_frames=total_frames,
        checkpoint=checkpoint if not whole else None,
        checkpoint_rotation=rotation if not whole else None,
        save_trainer_interval=INTERVAL,
        **options,
    )
    if whole:
        rows = StoredRows(folder / "rows")
        checkpoint.register("replay_buffer", trainer.replay_buffer, adapter=rows)
        trainer.checkpoint, trainer.checkpoint_rotation = checkpoint, rotation
    if resume:
        trainer.load_from_file(rotation.latest())
    trainer.train()
    return trainer


def check_equal(one, other):
    for name, part in {"predictor": "predictor", "planner": "planner"}.items():
        expected = tensors_of(getattr(other, part))
        for key, x in tensors_of(getattr(one, part)).items():
            assert torch.equal(x, expected[key]), (name, key)
    moments = [x.predictor.update.optimizer.state_dict()["state"] for x in (one, other)]
    for number, entries in moments[0].items():
        for key, x in entries.items():
            assert torch.equal(x, moments[1][number][key]), (number, key)
    rows, expected = rows_of(one.replay_buffer), rows_of(other.replay_buffer)
    assert set(rows.keys(True, True)) == set(expected.keys(True, True))
    for key, x in rows.items(True, True):
        assert torch.equal(x, expected[key]), key
    assert one.optimization_stepper.steps == other.optimization_stepper.steps
    assert one.collected_frames == other.collected_frames


@pytest.mark.parametrize("kind", [*ENVS, "several", "unsavable"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind):
    """Episodes of the unsavable env end at each checkpoint, those of the others go on."""
    whole = run(tmp_path / "whole", kind, 2 * INTERVAL)
    run(tmp_path / "parts", kind, INTERVAL)
    resumed = run(tmp_path / "parts", kind, 2 * INTERVAL, resume=True, seed=7)
    check_equal(resumed, whole)
    rows = rows_of(whole.replay_buffer)
    middle = INTERVAL // (2 if kind == "several" else 1) - 1
    assert rows[keys.NEXT_TRUNCATED][middle].all() == (kind == "unsavable")
    if kind == "Pendulum-v1":  # it does go on in mid-episode
        following = rows[keys.OBSERVATION][middle + 1]
        assert torch.equal(rows[keys.NEXT_OBSERVATION][middle], following)


@pytest.mark.parametrize("stop", [20, 40, 80])
def test_at_other_moments_and_by_a_plain_checkpoint(tmp_path, stop):
    whole = run(tmp_path / "whole", "Pendulum-v1", 100, whole=False)
    run(tmp_path / "parts", "Pendulum-v1", stop, whole=False)
    resumed = run(tmp_path / "parts", "Pendulum-v1", 100, resume=True, seed=7, whole=False)
    check_equal(resumed, whole)


def test_after_the_ring_has_wrapped(tmp_path):
    def wrapped(folder, n, **options):
        buffer = make_buffer(_Slices(2), capacity=50)
        return run(folder, "Pendulum-v1", n, replay_buffer=buffer, **options)

    whole = wrapped(tmp_path / "whole", 2 * INTERVAL)
    wrapped(tmp_path / "parts", INTERVAL)
    check_equal(wrapped(tmp_path / "parts", 2 * INTERVAL, resume=True, seed=7), whole)


class _Slices:
    """What ``make_buffer`` asks of a predictor."""

    def __init__(self, slice_len):
        self.loss_module = type("Loss", (), {"slice_len": slice_len})


def test_two_resumes_of_one_checkpoint_are_alike(tmp_path):
    run(tmp_path, "Pendulum-v1", INTERVAL)
    latest = CheckpointRotation(tmp_path / "saved", keep_last=9).latest()
    both = []
    for seed in (5, 6):
        trainer = make_trainer(env_of("Pendulum-v1", seed), seed=seed, total_frames=100)
        checkpoint = WholeCheckpoint()
        rows = StoredRows(tmp_path / f"rows{seed}")
        checkpoint.register("replay_buffer", trainer.replay_buffer, adapter=rows)
        trainer.checkpoint = checkpoint
        trainer.load_from_file(latest)
        trainer.train()
        both.append(trainer)
    check_equal(*both)


def test_a_checkpoint_of_another_predictor_changes_nothing(tmp_path):
    run(tmp_path, "Pendulum-v1", INTERVAL)
    latest = CheckpointRotation(tmp_path / "saved", keep_last=9).latest()
    trainer = make_trainer(env_of("CartPole-v1", 3), seed=3)
    trainer.checkpoint = WholeCheckpoint()
    rows = StoredRows(tmp_path / "rows2")
    trainer.checkpoint.register("replay_buffer", trainer.replay_buffer, adapter=rows)
    before, random = tensors_of(trainer.predictor), torch.get_rng_state()
    with pytest.raises(Exception, match="checkpoint-000000000060"):
        trainer.load_from_file(latest)
    after = tensors_of(trainer.predictor)
    assert all(torch.equal(x, after[key]) for key, x in before.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert trainer.collected_frames == 0 and not len(trainer.replay_buffer)


def test_finished_episodes_are_written_once(tmp_path):
    def log(name):
        return {"hooks": [EpisodeLog(tmp_path / name, ("next", "reward"))]}

    run(tmp_path / "whole", "CartPole-v1", 2 * INTERVAL, **log("whole.csv"))
    run(tmp_path / "parts", "CartPole-v1", INTERVAL, **log("parts.csv"))
    with (tmp_path / "parts.csv").open("a") as file:
        file.write("99,99.0\n")  # as of steps after the checkpoint
    run(tmp_path / "parts", "CartPole-v1", 2 * INTERVAL, resume=True, **log("parts.csv"))
    assert (tmp_path / "parts.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert (tmp_path / "whole.csv").read_text().count("\n") > 2


# --- the state of a collector


def test_what_can_go_on():
    assert CollectorState(make_trainer().collector).is_exact
    assert CollectorState(make_trainer(env_of("several", 0)).collector).is_exact
    assert not CollectorState(make_trainer(env_of("unsavable", 0)).collector).is_exact


@pytest.mark.slow
def test_envs_in_processes_of_their_own_begin_new_episodes(tmp_path):
    def parallel(**options):
        env = ParallelEnv(2, partial(GymEnv, "Pendulum-v1"))
        env = TransformedEnv(env, Compose(DoubleToFloat(), InitTracker()))
        env.set_seed(options["seed"])
        rotation = CheckpointRotation(tmp_path / "saved", keep_last=9)
        saved = {"checkpoint": Checkpoint(), "checkpoint_rotation": rotation}
        trainer = make_trainer(env, save_trainer_interval=40, **saved, **options)
        if options["seed"]:
            trainer.load_from_file(tmp_path / "saved" / "checkpoint-000000000040")
        trainer.train()
        return trainer

    whole = parallel(seed=0, total_frames=80)
    check_equal(parallel(seed=1, total_frames=80), whole)
    truncated = rows_of(whole.replay_buffer)[keys.NEXT_TRUNCATED][..., 0]
    assert truncated.any(-1).nonzero().flatten().tolist() == [19, 39]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.update(frames=-1), "collector: frames must be at least 0"),
        (lambda s: s["step"].pop("observation"), "'observation' of the current step"),
        (lambda s: s["step"].update(observation=torch.zeros(4)), r"expected .* got \(\[4\]"),
        (lambda s: s.update(step=3), "its current step is no TensorDict"),
        (lambda s: s.update(workers={}), "the checkpoint is of one with workers"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, text):
    one, other = make_trainer(), make_trainer(seed=1)
    state = CollectorState(one.collector).state_dict()
    change(state)
    before = other.collector._carrier.clone().apply(torch.nan_to_num)
    with pytest.raises((ValueError, TypeError), match=text):
        CollectorState(other.collector).load_state_dict(state)
    assert (
        other.collector._carrier.apply(torch.nan_to_num) == before
    ).all() and other.collector._frames == 0
