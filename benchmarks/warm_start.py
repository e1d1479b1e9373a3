"""What warm starts are worth on Pendulum with true dynamics, as a Markdown table.

Each planner plans with and without its previous plan (iCEM: and its elites) at equal compute, from
the same starts, for 200 steps, in the equations of Gymnasium's Pendulum-v1. All starts are one
batch. Shown is the return (mean and standard error over starts), and from how many starts the warm
planner got more. A budget is candidates times rounds.

    python -m benchmarks.warm_start --budget 32x2 128x3
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs.utils import step_mdp

from layeredrl_trl.planners import (
    CrossEntropyPlanner,
    ICEMPlanner,
    PathIntegralPlanner,
    SamplingPlanner,
)
from tests.problems import PendulumModel

COLUMNS = "planner,candidates x rounds,cold: mean,warm: mean,warm - cold (paired),warm won"


class OpenLoopPendulum(PendulumModel):
    """The model with the fast path of a planner."""

    def imagine(self, tensordict: TensorDict, actions: Tensor) -> TensorDict:
        x, rewards = tensordict["x"], []
        for action in actions.unbind(-2):
            x, reward = self.world_model.module(x, action)
            rewards.append(reward)
        following = TensorDict({"reward": torch.stack(rewards, -2)}, batch_size=actions.shape[:-1])
        return TensorDict({"next": following}, batch_size=actions.shape[:-1])


def make_planner(name: str, candidates: int, rounds: int, **options: object) -> SamplingPlanner:
    """Make a planner with its defaults."""
    elites = {"top_k": max(candidates // 10, 4)}
    make = {
        "CEM": partial(CrossEntropyPlanner, **elites),
        "iCEM": partial(ICEMPlanner, **elites),
        "MPPI": PathIntegralPlanner,
    }[name]
    sizes = {"num_candidates": candidates, "optim_steps": rounds}
    return make(OpenLoopPendulum(), **sizes, **options)


def episode_return(planner: SamplingPlanner, starts: TensorDict, steps: int, seed: int) -> Tensor:
    """Act for some steps from every start; ``[starts]``."""
    torch.manual_seed(seed)
    tensordict, total = starts.clone(), torch.zeros(len(starts))
    for _ in range(steps):
        tensordict = planner.env.step(planner(tensordict))
        total += tensordict["next", "reward"].squeeze(-1)
        tensordict = step_mdp(tensordict)
    return total


def row(name: str, budget: str, cold: Tensor, warm: Tensor) -> str:
    """Write a row of the table."""

    def mean_and_error(x: Tensor) -> str:
        return f"{x.mean():.1f} ± {x.std() / len(x) ** 0.5:.1f}"

    gain, won = warm - cold, f"{(warm > cold).sum()} of {len(warm)}"
    cells = name, budget, mean_and_error(cold), mean_and_error(warm), mean_and_error(gain), won
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--planner", nargs="+", default=["CEM", "iCEM", "MPPI"])
    parser.add_argument("--budget", nargs="+", default=["32x2", "64x2", "128x3", "400x5"])
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--planning-horizon", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    starts = OpenLoopPendulum().reset(TensorDict(batch_size=[args.starts]))
    print(f"| {COLUMNS.replace(',', ' | ')} |\n|{'---|' * (COLUMNS.count(',') + 1)}", flush=True)
    for name in args.planner:
        for budget in args.budget:
            candidates, rounds = map(int, budget.split("x"))
            cold, warm = (
                episode_return(
                    make_planner(
                        name,
                        candidates,
                        rounds,
                        planning_horizon=args.planning_horizon,
                        warm_start=warm_start,
                    ),
                    starts,
                    args.steps,
                    args.seed,
                )
                for warm_start in (False, True)
            )
            print(row(name, budget.replace("x", " x "), cold, warm), flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
