"""A long run under ``PredictorTrainer``: does memory stay flat, does anything become non-finite?

``python -m benchmarks.soak`` takes 100,000 learn steps and more than 10,000 plans on a small model
of Pendulum-v1 with terminations and truncations, a buffer that wraps many times, and a checkpoint
every so often, each of which is loaded again into the running trainer. It prints a table, a row for
each tenth of the run, and fails if memory or losses drift.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

import gymnasium
import torch
from tensordict.nn import TensorDictSequential
from torchrl.checkpoint import CheckpointRotation
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, DoubleToFloat, GymWrapper, InitTracker, TransformedEnv

from layeredrl_trl import (
    IdentityEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    RewardPredictor,
    TransitionSliceSampler,
    ValueNet,
    keys,
)
from layeredrl_trl.checkpoints import StoredRows, WholeCheckpoint
from layeredrl_trl.planners import Explorer, ICEMPlanner
from layeredrl_trl.trainers import PredictorTrainer

_STORED = (
    *(keys.OBSERVATION, keys.ACTION, keys.PLANNED),
    *(keys.NEXT_OBSERVATION, keys.NEXT_REWARD),
    *(keys.NEXT_TERMINATED, keys.NEXT_TRUNCATED, keys.NEXT_DONE),
)


class Falls(gymnasium.Wrapper):
    """A pendulum whose episode terminates when it turns too fast, and is truncated after a time."""

    def step(self, action):
        observation, reward, _, truncated, info = self.env.step(action)
        return observation, reward, bool(abs(observation[2]) > 7.0), truncated, info


def make_trainer(folder: Path, total_frames: int, updates_per_frame: float) -> PredictorTrainer:
    torch.manual_seed(0)
    real = Falls(gymnasium.make("Pendulum-v1", max_episode_steps=100))
    env = TransformedEnv(GymWrapper(real), Compose(DoubleToFloat(), InitTracker()))
    env.set_seed(0)
    net = {"hidden_sizes": (16,)}
    predictor = RewardPredictor(
        ProbabilisticEnsemble(3, 0, env.action_spec, n_models=3, **net),
        ValueNet(3, 0, **net),
        RewardNet(3, 0, 1, **net),
        IdentityEncoder(3),
        latent_state_dim=3,
        context_dim=0,
        n_steps=3,
        learn_encoder=False,
    )
    model = predictor.env(env.action_spec, num_particles=1)
    search = {"planning_horizon": 5, "optim_steps": 2, "num_candidates": 16, "top_k": 4}
    planner = ICEMPlanner(model, terminal_value=predictor.val_func, **search)
    policy = TensorDictSequential(model.initial_state, planner, selected_out_keys=planner.out_keys)
    env.append_transform(planner.make_tensordict_primer())
    explorer = Explorer(policy, env.action_spec, 400, 500, 20, planner)
    collector = Collector(env, explorer, frames_per_batch=100, total_frames=-1)
    explorer.steps = 0
    sampler = TransitionSliceSampler(slice_len=predictor.loss_module.slice_len)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(2000), sampler=sampler)
    checkpoint = WholeCheckpoint()
    checkpoint.register("replay_buffer", buffer, adapter=StoredRows(folder / "rows"))
    return PredictorTrainer(
        predictor=predictor,
        collector=collector,
        replay_buffer=buffer,
        total_frames=total_frames,
        updates_per_frame=updates_per_frame,
        batch_size=32,
        planner=explorer,
        init_random_frames=400,
        stored_keys=_STORED,
        save_trainer_interval=500,
        checkpoint=checkpoint,
        checkpoint_rotation=CheckpointRotation(folder / "saved", keep_last=2),
        progress_bar=False,
    )


def memory() -> float:
    """Memory of this process that is its own, in MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=12_000)
    parser.add_argument("--updates-per-frame", type=float, default=100_000 / 12_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), arguments.frames, arguments.updates_per_frame)
        tenth, started = arguments.frames // 10, time.perf_counter()
        counts = {"plans": 0, "terminated": 0, "truncated": 0, "loads": 0}

        def note(batch) -> None:
            counts["plans"] += int(batch[keys.PLANNED].sum())
            counts["terminated"] += int(batch[keys.NEXT_TERMINATED].sum())
            counts["truncated"] += int(batch[keys.NEXT_TRUNCATED].sum())

        def load() -> None:
            latest = trainer.checkpoint_rotation.latest()
            if latest is not None and trainer.collected_frames % 1000 == 100:
                frames = trainer.collected_frames
                trainer.checkpoint.load(latest, components=["trainer_state"])
                trainer.collected_frames = frames  # the rest of the run goes on from here
                twin = make_trainer(Path(folder) / "twin", arguments.frames, 1.0)
                twin.load_from_file(latest)
                twin.collector.shutdown()
                counts["loads"] += 1

        def row() -> None:
            if trainer.collected_frames % tenth:
                return
            gc.collect()
            state = trainer.predictor.state_dict().values()
            finite = all(bool(x.isfinite().all()) for x in state if isinstance(x, torch.Tensor))
            loss = trainer._log_dict["loss"][-20:] or [float("nan")]
            rows.append((trainer.collected_frames, memory(), sum(loss) / len(loss), finite))
            seconds = time.perf_counter() - started
            steps = trainer.optimization_stepper.steps
            print(
                f"{trainer.collected_frames:7d} frames {steps:7d} steps"
                f" {counts['plans']:6d} plans {counts['terminated']:4d} terminated"
                f" {counts['truncated']:4d} truncated {counts['loads']:3d} loads"
                f" {rows[-1][1]:7.1f} MiB  loss {rows[-1][2]:7.3f}  finite {finite}"
                f" skipped {trainer.predictor.update.skipped} {seconds:6.0f} s",
                flush=True,
            )

        trainer.register_op("pre_steps_log", note)
        trainer.register_op("post_steps", load)
        trainer.register_op("post_steps", row)
        trainer.train()
    half = rows[len(rows) // 2]
    grown = rows[-1][1] - half[1]
    print(f"memory grew by {grown:.1f} MiB in the second half of the run")
    return int(grown > 20 or not all(row[3] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
