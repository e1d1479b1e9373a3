"""One-step error of the default predictor on goal-based environments, as a Markdown table.

For each environment and seed, a predictor from ``get_default_predictor_factory`` is trained on
transitions of uniformly random actions. On as many transitions of other random episodes, the mean
of its prediction of the next achieved goal is compared with the guess that nothing changes. Both
errors are root mean squares of the Euclidean distance, in the env's units; a ratio below 1 beats
the guess.

How much there is to know depends on two things, which therefore are options:

- ``--hold``: simulator steps for which an action is held, which together are one step. Random
  torques that change at every simulator step cancel out, and what happens to the achieved goal is
  then nearly all due to velocities.
- ``--latent goal`` is the default predictor: it sees the achieved goal, and no velocities.
  ``--latent all`` is the same factory with another encoder, which adds the entry ``observation``
  to the latent state.

``--least-std`` raises the least standard deviation of the model, in units of that of the changes.
With ``AntMaze_UMaze-v5 --latent all`` it has to be: 78 of the 107 dims are contact forces, which
hardly ever change and then by many standard deviations, and drown the others.

Few steps are few trajectories, along which the velocity is a function of the position: with 3000
steps of PointMaze_Medium-v3 (5 episodes) the default predictor learns these by heart and is worse
than the guess on others, with 12000 it is not.

The column ``linear`` is the ratio of a least-squares fit from latent state and action: what there
is to know with the least machinery.

    python -m benchmarks.goal_envs --env PointMaze_UMaze-v3 --seed 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import lru_cache, partial
from typing import NamedTuple

import gymnasium
import gymnasium_robotics
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, DoubleToFloat, EnvBase, GymWrapper, TransformedEnv

from layeredrl_trl.envs import flatten_observation, observation_layout
from layeredrl_trl.modules import SelectEncoder
from layeredrl_trl.predictors import Predictor, get_default_predictor_factory

ENVS = ("PointMaze_UMaze-v3", "PointMaze_Medium-v3", "AntMaze_UMaze-v5")
COLUMNS = "env,hold,latent,steps,updates,seeds,error,zero change,ratio (range),linear"

gymnasium.register_envs(gymnasium_robotics)


class OneStepError(NamedTuple):
    """Errors on held-out transitions, in units of the achieved goal."""

    model: float
    zero_change: float
    linear: float

    @property
    def ratio(self) -> float:
        """Error of the model in units of that of the zero-change guess."""
        return self.model / self.zero_change


class HoldAction(gymnasium.Wrapper):
    """Take every action for several steps, or until the episode ends; rewards are summed."""

    def __init__(self, env: gymnasium.Env, steps: int) -> None:
        super().__init__(env)
        self.steps = steps

    def step(self, action):
        total = 0.0
        for _ in range(self.steps):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


def make_goal_env(env_id: str, hold: int = 1) -> EnvBase:
    """Make an env whose ``observation`` is the flattened one, float32."""
    env = GymWrapper(HoldAction(gymnasium.make(env_id), hold))
    return TransformedEnv(env, Compose(flatten_observation(env), DoubleToFloat()))


@lru_cache
def collect(env_id: str, hold: int, frames: int, seed: int) -> TensorDictBase:
    """Act at random for ``frames`` steps, episode after episode."""
    env = make_goal_env(env_id, hold)
    torch.manual_seed(seed)
    env.set_seed(seed)
    data = env.rollout(frames, break_when_any_done=False)
    env.close()
    return data


def make_predictor(
    env: EnvBase, latent: str, sb_start_duration: int, least_std: float | None = None
) -> Predictor:
    """Make the default predictor, for ``latent="all"`` with ``observation`` in its latent state."""
    factory = get_default_predictor_factory(env, sb_start_duration)
    if least_std is not None:
        factory.partial_model = partial(factory.partial_model, std_bounds=(least_std, 2.0))
    if latent == "all":
        layout = observation_layout(env)
        factory.partial_encoder = partial(
            SelectEncoder,
            latent_state_dims=[*layout["achieved_goal"], *layout["observation"]],
            context_dims=layout["desired_goal"],
        )
    return factory(env.observation_spec["observation"].shape, env.action_spec)


def rms(distance: Tensor) -> float:
    """Root mean square of the length of the rows."""
    return distance.square().sum(-1).mean().sqrt().item()


def linear_fit(inputs: Tensor, targets: Tensor, at: Tensor) -> Tensor:
    """Predict the targets at other inputs by least squares, with an intercept."""
    inputs, at = (torch.cat([x, torch.ones(len(x), 1)], -1).double() for x in (inputs, at))
    return (at @ torch.linalg.lstsq(inputs, targets.double(), driver="gelsd").solution).float()


@torch.no_grad()
def one_step_errors(
    predictor: Predictor, train: TensorDictBase, test: TensorDictBase, goal_dims: int
) -> tuple[float, float, float]:
    """Errors of the model, of the zero-change guess, and of a linear fit, on ``test``.

    The first ``goal_dims`` of the latent state are the achieved goal.
    """

    def inputs_and_change(data: TensorDictBase) -> tuple[Tensor, Tensor]:
        now, _ = predictor.encode(data["observation"])
        later, _ = predictor.encode(data["next", "observation"])
        return torch.cat([now, data["action"]], -1), (later - now)[:, :goal_dims]

    mean, weights, *_ = predictor.predict(test["observation"], test["action"])
    expected = (mean * weights.unsqueeze(-1)).sum(-2).mean(-2)
    inputs, change = inputs_and_change(test)
    predicted = (expected - inputs[:, : expected.shape[-1]])[:, :goal_dims]
    fitted = linear_fit(*inputs_and_change(train), inputs)
    return rms(predicted - change), rms(change), rms(fitted - change)


def measure(
    env_id: str,
    seed: int,
    total_frames: int,
    updates: int,
    *,
    hold: int = 1,
    latent: str = "goal",
    least_std: float | None = None,
) -> OneStepError:
    """Collect, learn, and compare with the zero-change guess on as many held-out steps."""
    env = make_goal_env(env_id, hold)
    goal_dims = len(observation_layout(env)["achieved_goal"])
    train = collect(env_id, hold, total_frames, seed)
    test = collect(env_id, hold, total_frames, 10_000 + seed)
    torch.manual_seed(seed)
    predictor = make_predictor(env, latent, total_frames, least_std)
    env.close()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(total_frames))
    buffer.extend(train)
    predictor.learn(buffer, updates, 256, 256, n_total_env_steps=total_frames)
    return OneStepError(*one_step_errors(predictor, train, test, goal_dims))


def row(*setting: object, runs: list[OneStepError]) -> str:
    """Write a row of the table: means over seeds, and for the ratio also the range."""
    model, zero_change, linear = (statistics.mean(x) for x in zip(*runs, strict=True))
    ratios = [run.ratio for run in runs]
    cells = (
        *setting,
        len(runs),
        f"{model:.4f}",
        f"{zero_change:.4f}",
        f"{statistics.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        f"{linear / zero_change:.3f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", nargs="+", default=ENVS, help="Gymnasium ids")
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--total-frames", type=int, default=12000, help="to train; as many to test")
    parser.add_argument("--updates", type=int, default=600, help="optimisation steps")
    parser.add_argument("--hold", nargs="+", type=int, default=[1, 10], help="steps of an action")
    parser.add_argument("--latent", nargs="+", choices=["goal", "all"], default=["goal", "all"])
    parser.add_argument("--least-std", type=float, help="the model's lower std_bounds")
    args = parser.parse_args()
    started = time.perf_counter()
    print(f"| {COLUMNS.replace(',', ' | ')} |\n|{'---|' * (COLUMNS.count(',') + 1)}", flush=True)
    for env_id in args.env:
        for hold in args.hold:
            for latent in args.latent:
                size = args.total_frames, args.updates
                runs = [
                    measure(env_id, seed, *size, hold=hold, latent=latent, least_std=args.least_std)
                    for seed in args.seed
                ]
                print(row(env_id, hold, latent, *size, runs=runs), flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
