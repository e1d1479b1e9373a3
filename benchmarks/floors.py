"""What a rollout and a plan are made of on a CPU, each part on its own: how much is left to gain.

    python -m benchmarks.floors

The parts are the matrix products of all layers, their nonlinearities, and normal noise, for as many
rows as the work has, in the same pieces of 2,048 rows. They and the work are timed in turns, with a
large product (1,024 x 1,024 x 1,024) for the rate that the machine can reach; least times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
import torchrl

from benchmarks.bench_plan import SEARCH, make_plan
from benchmarks.workloads import ACTION_DIM, OBSERVATION_DIM, WORKLOADS, Workload, make_predictor

PIECE = 2048

LARGE = 1024


def layers_of(workload: Workload) -> list[list[tuple[int, int]]]:
    """Inputs and outputs of each layer of each network that a particle's step goes through."""
    predictor = make_predictor(workload)
    nets = [predictor.model.net.weights, predictor.model.termination_net.weights]
    heads = [p.mT for p in predictor.rew_func.parameters() if p.ndim == 2]
    return [[tuple(w.shape[-2:]) for w in net] for net in (*nets, heads)]


class Parts:
    """The parts of ``rows`` steps of a particle.

    Args:
        workload: whose networks are asked.
        rows: how many.
    """

    def __init__(self, workload: Workload, rows: int) -> None:
        self.n_pieces = -(-rows // PIECE)
        self.rows = self.n_pieces * PIECE
        nets = layers_of(workload)
        self.operations = 2 * self.rows * sum(a * b for net in nets for a, b in net)
        self._products = [
            (torch.randn(PIECE, a), torch.randn(a, b), torch.empty(PIECE, b))
            for net in nets
            for a, b in net
        ]
        self._hidden = [torch.randn(PIECE, b) for net in nets for _, b in net[:-1]]
        n_modes = workload.n_modes
        # a mode is drawn by as many pairs of normals
        self._noise = torch.empty(PIECE, OBSERVATION_DIM + (2 * n_modes if n_modes > 1 else 0))

    def products(self) -> None:
        for _ in range(self.n_pieces):
            for x, weight, out in self._products:
                torch.mm(x, weight, out=out)

    def nonlinearities(self) -> None:
        for _ in range(self.n_pieces):
            for x in self._hidden:
                torch.nn.functional.silu(x, inplace=True)

    def noise(self) -> None:
        for _ in range(self.n_pieces):
            self._noise.normal_()


def works() -> Iterator[tuple[str, Workload, int, Callable[[], object]]]:
    """Name, workload, steps of a particle, and what does it."""
    for name, workload in WORKLOADS.items():
        predictor = make_predictor(workload)
        observation = torch.randn(1024, OBSERVATION_DIM)
        actions = torch.rand(1024, 15, ACTION_DIM) * 2 - 1
        rows = 1024 * 15 * workload.n_models * workload.n_particles
        yield (
            f"rollout, {name}, 1,024 x 15",
            workload,
            rows,
            lambda p=predictor, o=observation, a=actions: p.rollout(o, a),
        )
        rows = 8 * SEARCH["num_candidates"] * SEARCH["planning_horizon"] * SEARCH["optim_steps"]
        yield f"CEM plan, {name}, 8 envs", workload, rows, make_plan(workload, "CEM", 8)


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torchrl.logger.setLevel("WARNING")
    a, b, out = (torch.randn(LARGE, LARGE) for _ in range(3))
    print(f"torch {torch.__version__}, {args.threads} threads; ms, and GFLOP/s of products\n")
    print("| work | all | products | nonlinearities | noise | parts / all | rate | of products |")
    print("|---|---|---|---|---|---|---|---|")
    rates = []
    for what, workload, rows, work in works():
        parts = Parts(workload, rows)
        timed = {
            "all": work,
            "products": parts.products,
            "nonlinearities": parts.nonlinearities,
            "noise": parts.noise,
            "large": lambda: torch.mm(a, b, out=out),
        }
        least = dict.fromkeys(timed, float("inf"))
        for i in range(args.rounds + 2):
            for name, part in timed.items():
                seconds = seconds_of(part)
                least[name] = min(least[name], seconds if i >= 2 else float("inf"))
        rates.append(2e-9 * LARGE**3 / least["large"])
        own = [least[name] for name in ("products", "nonlinearities", "noise")]
        rate = parts.operations * 1e-9 * rows / parts.rows
        print(
            f"| {what} | {1e3 * least['all']:.0f} | "
            + " | ".join(f"{1e3 * seconds:.0f}" for seconds in own)
            + f" | {sum(own) / least['all']:.2f} | {rate / least['all']:.0f} | "
            f"{parts.operations * 1e-9 / own[0]:.0f} |",
            flush=True,
        )
    print(f"\nlarge products: {min(rates):.0f} to {max(rates):.0f} GFLOP/s")


if __name__ == "__main__":
    main()
