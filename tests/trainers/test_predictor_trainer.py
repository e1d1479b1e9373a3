"""One object that trains a predictor and its planner."""

import os
import signal
import threading

import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.trainers import (
    CountFramesLog,
    EarlyStopping,
    LogScalar,
    LogTiming,
    LogValidationReward,
    TrainerHookBase,
    UTDRHook,
)

from layeredrl_trl import keys
from layeredrl_trl.data import TransitionSliceSampler
from layeredrl_trl.diagnostics import ModelReportHook
from layeredrl_trl.planners import Explorer
from layeredrl_trl.trainers import PredictorTrainer
from tests.trainers.small_trainers import (
    STORED,
    make_buffer,
    make_env,
    make_planner,
    make_predictor,
    make_trainer,
    rows_of,
    tensors_of,
)

# TorchRL 0.15 names a hook that is gone in 0.14 otherwise
pytestmark = pytest.mark.filterwarnings("ignore:.*experimental/prototype.*:UserWarning")


class Scalars:
    """A logger that keeps what it gets."""

    def __init__(self):
        self.values = {}

    def log_scalar(self, name, value, step=None):
        self.values.setdefault(name, []).append((step, float(value)))

    add_scalar = log_scalar


def changed(trainer, before):
    after = tensors_of(trainer.predictor)
    return {key.split(".")[0] for key, x in before.items() if not torch.equal(x, after[key])}


# --- collecting and learning


def test_trains_predictor_and_planner_in_one_call():
    trainer = make_trainer(total_frames=60, n_random=20, init_random_frames=20)
    before = tensors_of(trainer.predictor)
    trainer.train()
    assert trainer.collected_frames == 60
    assert trainer.optimization_stepper.steps == 12  # 0.2 * 60
    assert {"model", "rew_func", "val_func", "target_val_params"} <= changed(trainer, before)
    rows = rows_of(trainer.replay_buffer)
    assert set(rows.keys(True, True)) == {*STORED, "index"}
    assert rows["planned"].flatten().tolist() == [False] * 20 + [True] * 40
    follows = rows["next", "observation"][:-1] == rows["observation"][1:]
    assert follows.all()


@pytest.mark.parametrize("rate", [0.05, 0.29, 1.5])
def test_takes_the_steps_that_are_due(rate):
    trainer = make_trainer(total_frames=100, updates_per_frame=rate)
    steps = []
    trainer.register_op(
        "post_steps",
        lambda: steps.append((trainer.collected_frames, trainer.optimization_stepper.steps)),
    )
    trainer.train()
    assert steps == [(n, int(rate * n + 1e-9)) for n in (20, 40, 60, 80, 100)]
    assert trainer._optim_count == steps[-1][1]


def test_the_steps_of_the_first_phase_are_all_taken_at_its_end():
    trainer = make_trainer(total_frames=60, init_random_frames=40)
    steps = []
    trainer.register_op("post_steps", lambda: steps.append(trainer.optimization_stepper.steps))
    trainer.train()
    assert steps == [0, 8, 12]


def test_frames_of_skipped_steps_count():
    env = make_env(frame_skip=2)
    trainer = make_trainer(env, total_frames=80, frame_skip=2)
    trainer.train()
    assert trainer.collected_frames == 80 and len(trainer.replay_buffer) == 40
    assert trainer.optimization_stepper.steps == 16


def test_several_envs_have_columns():
    trainer = make_trainer(make_env(n_envs=2), total_frames=80)
    trainer.train()
    rows = trainer.replay_buffer.storage._storage[:40]
    assert rows.shape == (40, 2)
    assert (rows["next", "observation"][:-1] == rows["observation"][1:]).all()


def test_transitions_of_their_own_train_the_dynamics():
    trainer = make_trainer(total_frames=40, model_batch_size=4)
    sizes = []
    trainer.register_op("post_optim_log", lambda batch: sizes.append(batch.numel()))
    trainer.train()
    assert set(sizes) == {(8 + 4) * trainer.predictor.loss_module.slice_len}


def test_a_buffer_that_the_collector_fills_itself():
    env = make_env()
    predictor = make_predictor(env)
    buffer = make_buffer(predictor)
    collector = Collector(env, None, frames_per_batch=20, total_frames=-1, replay_buffer=buffer)
    trainer = PredictorTrainer(
        predictor=predictor,
        collector=collector,
        replay_buffer=buffer,
        total_frames=60,
        updates_per_frame=0.2,
        batch_size=8,
        progress_bar=False,
    )
    trainer.train()
    assert len(buffer) == trainer.collected_frames == 60
    assert trainer.optimization_stepper.steps == 12


def test_learning_while_a_thread_collects():
    env = make_env()
    predictor = make_predictor(env)
    buffer = make_buffer(predictor)
    collector = Collector(env, None, frames_per_batch=20, total_frames=200, replay_buffer=buffer)
    trainer = PredictorTrainer(
        predictor=predictor,
        collector=collector,
        replay_buffer=buffer,
        total_frames=200,
        updates_per_frame=0.1,
        batch_size=8,
        progress_bar=False,
        async_collection=True,
    )
    trainer.train()
    assert trainer.collected_frames >= 180 and trainer.optimization_stepper.steps > 0


def _worker_env(planner, seed):
    torch.manual_seed(seed)
    return make_env(seed=seed).append_transform(planner.make_tensordict_primer())


class _Maker:
    """Makes the env of a worker; functions of a test module cannot be sent to a process."""

    def __init__(self, planner, seed):
        self.arguments = planner, seed

    def __call__(self):
        return _worker_env(*self.arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MultiSyncCollector, MultiAsyncCollector])
def test_workers_act_by_the_weights_that_were_learned(kind):
    predictor = make_predictor(make_env())
    spec = make_env().action_spec
    policy, planner = make_planner(predictor, spec)
    explorer = Explorer(policy, spec, 5, planner=planner)
    is_sync = kind is MultiSyncCollector
    options = {"cat_results": "stack"} if is_sync else {}
    collector = kind(
        [_Maker(planner, seed) for seed in (0, 1)],
        explorer,
        frames_per_batch=20 if is_sync else 10,
        total_frames=-1,
        **options,
    )
    trainer = PredictorTrainer(
        predictor=predictor,
        collector=collector,
        replay_buffer=make_buffer(predictor, ndim=2 if is_sync else 1),
        total_frames=80,
        updates_per_frame=0.2,
        batch_size=8,
        planner=explorer,
        stored_keys=STORED,
        progress_bar=False,
    )
    weights = {}
    trainer.register_op("shutdown", lambda: weights.update(collector.state_dict()))
    trainer.train()
    rows = rows_of(trainer.replay_buffer)
    rows = rows.reshape(-1)
    assert len(rows) == 80 and rows["planned"].any()
    # no slice joins steps that do not follow each other
    sample = make_sample(trainer, 100)
    real = sample["collector", "mask"][:, 1, 0]
    assert real.any()
    assert (sample["next", "observation"][real, 0] == sample["observation"][real, 1]).all()
    own = tensors_of(explorer)
    for worker in (weights["worker0"], weights["worker1"]):
        for key, x in worker["policy_state_dict"].items():
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, own[key]), key


def make_sample(trainer, n):
    length = trainer.predictor.loss_module.slice_len
    return trainer.replay_buffer.sample(n * length).reshape(n, length)


# --- hooks, logging, stopping


def test_hooks_of_torchrl_work_beside_it():
    logger = Scalars()
    env = make_env()
    predictor = make_predictor(env)
    policy, _ = make_planner(predictor, env.action_spec)
    held_out = make_buffer(predictor)
    held_out.extend(make_env(seed=5).rollout(40).select(*STORED, strict=False))
    validation = make_env(seed=7)
    seen = []
    hooks = [
        LogScalar(keys.NEXT_REWARD, "r_training", log_pbar=True),
        CountFramesLog(frame_skip=1),
        LogTiming(),
        LogValidationReward(
            record_interval=1,
            record_frames=5,
            policy_exploration=policy,
            environment=validation,
            frame_skip=1,
        ),
        ModelReportHook(predictor, held_out, 5, interval=40),
        Counter(seen),
    ]
    buffer = make_buffer(predictor, batch_size=16)  # UTDRHook wants to know it
    options = {"hooks": hooks, "logger": logger, "log_interval": 1, "replay_buffer": buffer}
    trainer = make_trainer(env, predictor=predictor, total_frames=60, **options)
    UTDRHook(trainer).register(trainer)
    trainer.train()
    assert {
        *("r_training", "n_frames", "r_evaluation", "utd_ratio"),
        *("loss_reward", "loss_value", "loss_consistency", "grad_norm", "skipped"),
        "model/one_step/nll",
    } <= set(logger.values)
    assert seen == [20, 40, 60]
    assert logger.values["loss"][-1][0] == 60


class Counter(TrainerHookBase):
    def __init__(self, seen):
        self.seen = seen

    def register(self, trainer, name="counter"):
        trainer.register_op("post_steps", lambda: self.seen.append(trainer.collected_frames))

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


def test_stops_early():
    stop = EarlyStopping(monitor="r_training", patience=1, min_delta=1e6, wait_for=0)
    hooks = [LogScalar(keys.NEXT_REWARD, "r_training"), stop]
    trainer = make_trainer(total_frames=2000, hooks=hooks)
    trainer.train()
    assert trainer.collected_frames < 200


def test_a_long_run_keeps_only_the_latest_scalars(monkeypatch):
    monkeypatch.setattr("layeredrl_trl.trainers.predictor_trainer._HISTORY", 3)
    trainer = make_trainer(total_frames=120)
    trainer.train()
    assert {len(x) for x in trainer._log_dict.values()} == {3}
    assert isinstance(trainer._log_dict["loss"][-1], float)


def test_two_trainers_do_not_share_when_they_logged():
    one, other = make_trainer(log_interval=1, logger=Scalars()), make_trainer(total_frames=20)
    one.train()
    assert one._last_log and not other._last_log


def test_one_warning_of_a_batch_that_is_skipped_names_the_rows():
    trainer = make_trainer(total_frames=40)
    trainer.register_op("batch_process", lambda batch: batch)

    def spoil():
        trainer.replay_buffer.storage._storage[keys.NEXT_REWARD][:] = torch.nan

    trainer.register_op("pre_steps_log", lambda _: spoil())
    with pytest.warns(UserWarning, match=r"\('next', 'reward'\): 20 of 20 rows are not finite"):
        trainer.train()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_after_the_batch(tmp_path, number):
    rotation = CheckpointRotation(tmp_path, keep_last=2)
    trainer = make_trainer(total_frames=1000, checkpoint=Checkpoint(), checkpoint_rotation=rotation)
    trainer.register_op(
        "pre_steps_log",
        lambda _: os.kill(os.getpid(), number) if trainer.collected_frames == 40 else None,
    )
    before = signal.getsignal(number)
    with trainer.stop_on_signal():
        trainer.train()
    assert signal.getsignal(number) is before
    assert trainer.collected_frames == 40
    assert trainer.optimization_stepper.steps == 8  # those of the batch are taken
    assert [path.name[-3:] for path in rotation.checkpoints()] == ["040"]


def test_a_second_signal_ends_it_at_once():
    trainer = make_trainer(total_frames=1000)
    kill = lambda _: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]  # noqa: E731
    trainer.register_op("pre_steps_log", kill)
    with pytest.raises(KeyboardInterrupt), trainer.stop_on_signal():
        trainer.train()
    assert trainer.collected_frames == 20


def test_signals_are_left_alone_in_another_thread():
    trainer, errors = make_trainer(total_frames=20), []

    def run():
        try:
            with trainer.stop_on_signal():
                trainer.train()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors and trainer.collected_frames == 20


# --- without a collector


def test_learns_from_data_that_are_there():
    env = make_env()
    predictor = make_predictor(env)
    buffer = make_buffer(predictor)
    buffer.extend(env.rollout(100).select(*STORED, strict=False))
    rows, logger, seen = rows_of(buffer), Scalars(), []
    trainer = PredictorTrainer(
        predictor=predictor,
        collector=None,
        replay_buffer=buffer,
        total_frames=250,
        batch_size=8,
        hooks=[Counter(seen)],
        logger=logger,
        log_interval=1,
        progress_bar=False,
    )
    before = tensors_of(predictor)
    trainer.train()
    assert trainer.optimization_stepper.steps == predictor.update.steps == 250
    assert seen == [100, 200, 250]
    assert "model" in changed(trainer, before)
    assert (rows_of(buffer) == rows).all()
    assert [step for step, _ in logger.values["loss"]] == [100, 200, 250]


# --- checkpoints


def test_a_checkpoint_holds_each_thing_once(tmp_path):
    trainer = make_trainer(checkpoint=Checkpoint(), save_trainer_file=tmp_path / "one")
    assert set(trainer.checkpoint.components) == {
        *("predictor", "replay_buffer", "planner", "collector", "trainer_state", "rng"),
        "trainer_module.optimization_stepper",
    }
    trainer.train()
    assert Checkpoint.is_checkpoint(tmp_path / "one")


@pytest.mark.parametrize("interval", [40, 50])
def test_checkpoints_are_taken_at_multiples_of_the_interval(tmp_path, interval):
    """TorchRL saved 40 steps after the last one, and so at 60, 120, ... with batches of 20."""
    rotation = CheckpointRotation(tmp_path, keep_last=9)
    trainer = make_trainer(
        total_frames=140,
        checkpoint=Checkpoint(),
        checkpoint_rotation=rotation,
        save_trainer_interval=interval,
    )
    trainer.train()
    steps = [int(path.name[-6:]) for path in rotation.checkpoints()]
    assert steps == {40: [40, 80, 120, 140], 50: [60, 100, 140]}[interval]


def test_an_error_of_the_env_loses_no_step(tmp_path):
    rotation = CheckpointRotation(tmp_path, keep_last=1)
    trainer = make_trainer(total_frames=400, checkpoint=Checkpoint(), checkpoint_rotation=rotation)
    step = trainer.collector.env.base_env._step
    calls = iter(range(50))

    def failing(tensordict):
        if next(calls, None) is None:
            raise OSError("the simulator is gone")
        return step(tensordict)

    trainer.collector.env.base_env._step = failing
    with pytest.raises(OSError, match="the simulator is gone"):
        trainer.train()
    trainer.save_after_error()
    other = make_trainer(seed=1, total_frames=80)
    other.load_from_file(rotation.latest())
    assert other.collected_frames == len(other.replay_buffer) == 40
    last = rows_of(other.replay_buffer)[-1]
    assert last["next", "truncated"].all() and last["next", "done"].all()
    other.train()
    assert other.collected_frames == 80


def test_a_finished_run_does_nothing_more(tmp_path):
    trainer = make_trainer(total_frames=20)
    trainer.train()
    before = tensors_of(trainer.predictor)
    trainer.train()
    assert not changed(trainer, before)


# --- errors


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"total_frames": 0}, ValueError, "total_frames must be at least 1"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer"),
        ({"updates_per_frame": -0.1}, ValueError, "updates_per_frame must not be negative"),
        ({"updates_per_frame": float("inf")}, ValueError, "updates_per_frame must be finite"),
        ({"frame_skip": -1}, ValueError, "frame_skip must be at least 1"),
        ({"init_random_frames": -1}, ValueError, "init_random_frames must be at least 0"),
        ({"save_trainer_interval": 0}, ValueError, "save_trainer_interval must be at least 1"),
        ({"predictor": None}, TypeError, "expected a RewardPredictor, got NoneType"),
        ({"model_batch_size": 0}, ValueError, "model_batch_size must be at least 1"),
    ],
)
def test_options_out_of_range(options, error, text):
    env = make_env()
    predictor = make_predictor(env)
    usual = {
        "predictor": predictor,
        "collector": None,
        "replay_buffer": make_buffer(predictor),
        "total_frames": 10,
        "batch_size": 4,
    }
    with pytest.raises(error, match=text):
        PredictorTrainer(**usual | options)


def test_slices_of_another_length():
    predictor = make_predictor(make_env())
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10), sampler=TransitionSliceSampler(slice_len=5)
    )
    with pytest.raises(ValueError, match=r"slice_len=2\), as predictor.*got slice_len=5"):
        PredictorTrainer(
            predictor=predictor,
            collector=None,
            replay_buffer=buffer,
            total_frames=10,
            batch_size=4,
        )


def test_waits_for_data():
    predictor = make_predictor(make_env())
    trainer = PredictorTrainer(
        predictor=predictor,
        collector=None,
        replay_buffer=make_buffer(predictor),
        total_frames=10,
        batch_size=4,
        progress_bar=False,
    )
    trainer.collected_frames = 10
    trainer.optim_steps(TensorDict(batch_size=[10]))
    assert trainer.optimization_stepper.steps == 0
