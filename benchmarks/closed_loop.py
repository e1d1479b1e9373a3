"""A policy in an imagined env: TorchRL's ``rollout`` against steps and policy in a plain loop.

    python -m benchmarks.closed_loop

One thread, least processor time of calls in turns; `ens5` with one particle an env.
"""

from __future__ import annotations

import argparse
import time

import torch
import torchrl
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal

from benchmarks.workloads import (
    ACTION_DIM,
    OBSERVATION_DIM,
    WORKLOADS,
    action_spec,
    make_predictor,
)
from layeredrl_trl.envs import ImaginedState, PredictorEnv

HORIZON = 15
ENDS = {"soft": 0.0, "sample, never drawn": 30.0, "sample, one of 400 steps": 6.0}
"""Ways to terminate, and what is taken off the logit of the termination."""


def make_env(ends: str) -> PredictorEnv:
    predictor = make_predictor(WORKLOADS["ens5"])
    with torch.no_grad():
        predictor.model.termination_net.biases[-1] -= ENDS[ends]
    options = {"num_particles": 1, "propagation": "random_model"}
    return predictor.env(action_spec(), termination=ends.split(",")[0], **options)


def make_policy(kind: str) -> TensorDictModule:
    sizes = {"in_features": OBSERVATION_DIM, "num_cells": [128, 128]}
    if kind == "plain":
        net = torch.nn.Sequential(MLP(out_features=ACTION_DIM, **sizes), torch.nn.Tanh())
        return TensorDictModule(net, ["observation"], ["action"])
    net = torch.nn.Sequential(MLP(out_features=2 * ACTION_DIM, **sizes), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def by_hand(env: PredictorEnv, state: TensorDictBase, policy: TensorDictModule) -> list[Tensor]:
    """The same steps, in the order of time; an env that has terminated is not reset."""
    steps, batch = [], state.batch_size
    imagined = ImaginedState(*(state[k] for k in ("latent", "context", "alive", "member")))
    observation = state["observation"]
    for _ in range(HORIZON):
        seen = policy(TensorDict({"observation": observation}, batch))
        outcome = env.world_model.step(imagined, seen["action"], deterministic=False)
        after = {"latent": outcome.latent, "alive": outcome.alive, "member": outcome.member}
        imagined = imagined._replace(**after)
        observation = outcome.latent[:, 0, 0]  # what the identity encoder decodes
        parts = (*seen.values(), *outcome, observation)
        steps.append([x for x in parts if x is not None])
    return [torch.stack(x, 1) for x in zip(*steps, strict=True)]


@torch.no_grad()
def measure(ends: str, kind: str, n_envs: int, calls: int) -> tuple[float, float]:
    """Milliseconds by TorchRL and by hand."""
    env, policy = make_env(ends), make_policy(kind)
    state = env.initial_state(
        TensorDict(observation=torch.randn(n_envs, OBSERVATION_DIM), batch_size=[n_envs])
    )
    options = {"auto_reset": False, "break_when_any_done": False}
    ways = (
        lambda: env.rollout(HORIZON, policy, tensordict=state.clone(), **options),
        lambda: by_hand(env, state, policy),
    )
    least = [float("inf")] * 2
    for _ in range(calls):
        for i, way in enumerate(ways):
            begin = time.process_time()
            way()
            least[i] = min(least[i], 1000 * (time.process_time() - begin))
    return least[0], least[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--envs", type=int, nargs="+", default=[64, 256, 1024, 4096])
    args = parser.parse_args()
    torchrl.logger.setLevel("WARNING")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| termination | policy | envs | `rollout`, ms | by hand, ms | ratio |")
    print("|---|---|---|---|---|---|")
    for ends in ENDS:
        for kind in ("plain", "TanhNormal"):
            for n_envs in args.envs:
                ours, hand = measure(ends, kind, n_envs, args.calls)
                row = f"| {ends} | {kind} | {n_envs:,} | {ours:.1f} | {hand:.1f} |"
                print(f"{row} {ours / hand:.2f} |", flush=True)


if __name__ == "__main__":
    main()
