"""Check and time everything on a GPU, in one call of a few minutes, and print tables.

    python -m benchmarks.gpu                     # on a machine with CUDA
    python -m benchmarks.gpu --device cpu        # that the script works, where there is none

One workload after the other. First its numbers are checked: those of the GPU against the CPU's, and
those of compiled code and of replayed CUDA graphs against what is done operation by operation. Then
learning steps, rollouts and plans are timed in each of these ways, beside three floors by
arithmetic: operations of the networks over the measured rate of a matrix product, bytes that must
be read and written over the measured bandwidth, and 2 us for each kernel that is launched.

The last two ways are what others offer for the same: ``tensordict.nn.CudaGraphModule`` in the place
of ``GraphReplay``, and ``torch.compile(mode="reduce-overhead")`` of the loss and of a whole rollout
(a plan would take too long to compile).

What fails is said, and the rest goes on. After `--minutes` nothing more is begun: compiling takes
most of the time, and what matters most comes first. What was left out is listed at the end; the
exit status is 1 if anything failed or was left out.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torchrl
from tensordict import TensorDict
from tensordict.nn import CudaGraphModule
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only

from benchmarks.workloads import (
    ACTION_DIM,
    BATCH_SIZE,
    BUFFER_SIZE,
    GAMMA,
    N_STEPS,
    OBSERVATION_DIM,
    WORKLOADS,
    Workload,
    action_spec,
    make_buffer,
    make_predictor,
    make_transitions,
)
from layeredrl_trl.acceleration import DeviceUpdate
from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.planners import ICEMPlanner
from layeredrl_trl.predictors import RewardPredictor


def graph_module(function: Callable) -> Callable:
    """TensorDict's replay of a function; it takes tensors of one shape only."""
    return CudaGraphModule(function, warmup=5)  # two learning steps start statistics


def reduced_overhead(function: Callable) -> Callable:
    """Compile as ``mode="reduce-overhead"`` does, but draw the random numbers of eager code."""
    compiled = torch.compile(function, options={"triton.cudagraphs": True, "fallback_random": True})

    def call(*arguments):
        # the next call writes to the same memory
        return tree_map_only(torch.Tensor, torch.clone, compiled(*arguments))

    return call


class Way(NamedTuple):
    """How learning steps, rollouts and plans are carried out.

    Attributes:
        compile: in code that ``torch.compile`` makes of a learning step and of a step of the model.
        cudagraphs: by replaying CUDA graphs.
        replay: makes what replays a function; ``None`` for ``GraphReplay``.
        compile_loss: makes code of a loss; ``None`` for ``CompiledLoss``, if that is asked for.
        plans: whether plans are made in this way too.
    """

    compile: bool = False
    cudagraphs: bool = False
    replay: Callable[[Callable], Callable] | None = None
    compile_loss: Callable[[Callable], Callable] | None = None
    plans: bool = True


EAGER, BEST = "eager", "compiled and replayed"

WAYS = {
    EAGER: Way(),
    "compiled": Way(compile=True),
    "replayed": Way(cudagraphs=True),
    BEST: Way(compile=True, cudagraphs=True),
    "CudaGraphModule": Way(compile=True, cudagraphs=True, replay=graph_module),
    "reduce-overhead": Way(
        cudagraphs=True, replay=reduced_overhead, compile_loss=reduced_overhead, plans=False
    ),
}

STEPS = 20
"""Learning steps in a call."""

SECONDS_PER_KERNEL = 2e-6

FIRST = ("ens5", "pets", "mix4")
"""Workloads in the order of what is wanted of a GPU."""

TF32 = {"highest": "", "high": ", TF32"}
"""What torch calls the precision of a matrix product, and what the table adds to a way."""


class Floors(NamedTuple):
    """What work takes at least: arithmetic, bytes (float32), and kernels, if these are known."""

    operations: float
    bytes: float


class Machine(NamedTuple):
    """What a device was measured to do."""

    device: str
    operations_per_second: float
    bytes_per_second: float

    @property
    def is_cpu(self) -> bool:
        return self.device == "cpu"


def ways_on(device: str) -> list[str]:
    return [name for name, way in WAYS.items() if device != "cpu" or not way.cudagraphs]


def make_learner(workload: Workload, device: str, way: Way) -> RewardPredictor:
    """A predictor that learns in one way."""
    if way.compile_loss is not None:
        predictor = make_predictor(workload, device, compile=True)
        predictor.update.compute._compiled = way.compile_loss(predictor.loss_module)
        return predictor
    options = {"compile": way.compile, "cudagraphs": way.cudagraphs}
    predictor = make_predictor(workload, device, **options)
    replay_by(way, predictor.update)
    return predictor


def make_env(predictor: RewardPredictor, device: str, way: Way, **options) -> PredictorEnv:
    """An env that imagines in one way."""
    options |= {"compile_imagine": way.compile, "cudagraphs": way.cudagraphs}
    env = predictor.env(action_spec(device), **options)
    replay_by(way, env)
    return env


def make_planner(env: PredictorEnv, way: Way) -> ICEMPlanner:
    """A planner that plans in one way."""
    planner = ICEMPlanner(
        env,
        planning_horizon=15,
        optim_steps=6,
        num_candidates=128,
        top_k=12,
        gamma=GAMMA,
        cudagraphs=way.cudagraphs and way.plans,
    ).to(env.device)
    if way.plans:
        replay_by(way, planner)
    return planner


def replay_by(way: Way, owner: DeviceUpdate | PredictorEnv | ICEMPlanner) -> None:
    """Let something that replays do it in another way, if that is asked for."""
    if way.replay is not None:
        owner._replay = way.replay(owner._replay.function)


def sync(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def least(work: Callable[[], object], device: str, rounds: int = 8, warm_up: int = 5) -> float:
    """Seconds of the fastest call, after some to warm up, compile and record."""
    times = []
    for _ in range(rounds + warm_up):
        sync(device)
        start = time.perf_counter()
        work()
        sync(device)
        times.append(time.perf_counter() - start)
    return min(times[warm_up:])


@contextmanager
def precision_of_products(precision: str) -> Iterator[None]:
    """Let torch multiply float32 matrices with a precision for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure(device: str) -> Machine:
    """Rate of a matrix product, and bandwidth of a copy."""
    n = 1024 if device == "cpu" else 8192
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    rate = 2 * n**3 / least(lambda: a @ b, device)
    bandwidth = 2 * a.nbytes / least(lambda: a.copy_(b), device)
    return Machine(device, rate, bandwidth)


def kernels(work: Callable[[], object], machine: Machine) -> int | None:
    """How many kernels a call launches; ``None`` where there are none."""
    if machine.is_cpu:
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        sync(machine.device)
    events = seen.events() or []
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events)


def weights_of(net: torch.nn.Module) -> int:
    """Multiplications of one row through all members of a network."""
    return sum(p.numel() for p in net.parameters() if p.ndim > 1)


def floors_of_learning(predictor, workload: Workload) -> Floors:
    """Of a step: networks forward, and twice as much backward; targets forward only.

    Weights, their gradients and moments are read and written by the optimiser.
    """
    model, value = weights_of(predictor.model), weights_of(predictor.val_func)
    heads = weights_of(predictor.rew_func) + value
    rows = BATCH_SIZE * workload.k_steps
    operations = 2 * (3 * BATCH_SIZE * model + rows * (3 * heads + value))
    read = 4 * (rows + BATCH_SIZE) * (3 * OBSERVATION_DIM + ACTION_DIM + N_STEPS)
    return Floors(operations, read + 4 * 8 * (model + heads))


def floors_of_rollout(predictor, workload: Workload, rows: int, particles: int) -> Floors:
    """Of ``rows`` steps of so many particles each: networks forward, and states are written."""
    member = weights_of(predictor.model) / workload.n_models
    operations = 2 * rows * particles * (member + weights_of(predictor.rew_func))
    return Floors(operations, 4 * rows * (ACTION_DIM + particles * (OBSERVATION_DIM + 3)))


class Jobs:
    """Do one thing after the other, until the time is over, whatever goes wrong.

    Args:
        minutes: after which nothing is begun.

    Attributes:
        failed: what went wrong.
        left_out: what was not begun.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.perf_counter() + 60 * minutes
        self.failed: list[str] = []
        self.left_out: list[str] = []

    def do(self, what: str, work: Callable[[], object]) -> None:
        """Do it, and say what went wrong if something did."""
        if time.perf_counter() > self._end:
            self.left_out.append(what)
            return
        try:
            work()
        except Exception:
            self.failed.append(what)
            print(f"FAILED: {what}\n{traceback.format_exc()}", flush=True)

    def finish(self) -> int:
        """Say how it went; 0 if all was done, and well."""
        for how, whats in (("failed", self.failed), ("left out", self.left_out)):
            print(f"\n{len(whats)} {how}" + "".join(f"\n- {what}" for what in whats))
        return int(bool(self.failed or self.left_out))


def check_device(workload: Workload, device: str) -> None:
    """Deterministic rollouts, and losses, are those of the CPU."""
    there, here = make_predictor(workload, device), make_predictor(workload)
    there.load_state_dict(here.state_dict())
    observation, actions = torch.randn(16, OBSERVATION_DIM), torch.rand(16, 5, ACTION_DIM)
    results = [
        p.rollout(observation.to(d), actions.to(d), deterministic=True)[0]["next", "reward"]
        for p, d in ((there, device), (here, "cpu"))
    ]
    torch.testing.assert_close(results[0].cpu(), results[1], rtol=1e-3, atol=1e-4)
    buffer = make_buffer(make_transitions(2000))
    batch = here.compute_targets(buffer, 64, workload.k_steps, N_STEPS)
    single = here.sample_model_batch(buffer, 64)
    for p in (there, here):
        p.eval()
    losses = [
        p.loss(batch.to(d), single.to(d))[0].detach().cpu()
        for p, d in ((there, device), (here, "cpu"))
    ]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def check_learning(workload: Workload, device: str, way: str) -> None:
    """Learning in one way gives what eager learning gives, over three calls of eight steps.

    Other rounding turns steps of Adam around where a gradient is next to nothing: up to the
    learning rate in each.
    """
    buffer, states = make_buffer(make_transitions(2000), device), []
    for name in (EAGER, way):
        predictor = make_learner(workload, device, WAYS[name])
        for seed in range(3):
            torch.manual_seed(seed)
            predictor.learn(buffer, 8, BATCH_SIZE, BATCH_SIZE, 0)
        states.append(dict(predictor.named_parameters()))
    for name, expected in states[0].items():
        difference = (states[1][name] - expected).abs()
        assert difference.max() < 24 * 1e-3, f"{name}: {difference.max()}"
        assert difference.mean() < 1e-4, f"{name}: {difference.mean()} in the mean"


@torch.no_grad()
def check_imagining(workload: Workload, device: str, way: str) -> None:
    """Rollouts and plans in one way are eager ones, and a seed repeats what they draw."""
    predictor, options = make_predictor(workload, device), {"num_particles": 1}
    eager = make_env(predictor, device, WAYS[EAGER], **options)
    env = make_env(predictor, device, WAYS[way], **options)
    for i in range(6):
        state = start(eager, torch.randn(8, OBSERVATION_DIM, device=device))
        actions, outs = torch.rand(8, 5, ACTION_DIM, device=device), []
        for one in (eager, env):
            torch.manual_seed(i)
            outs.append(one.imagine(state, actions)["next", "reward"])
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-3, atol=1e-3)
        drawn = [env.imagine(state, actions)["next", "reward"] for _ in range(2)]
        assert not torch.equal(*drawn), "two rollouts draw the same"
    works = [lambda: env.imagine(state, actions)["next", "reward"]]
    if WAYS[way].plans:
        planner = make_planner(env, WAYS[way])
        works.append(lambda: planner(state.copy())["plan_return"])
    for work in works:
        for _ in range(5):
            work()
        outs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outs.append(work())
        assert torch.equal(outs[0], outs[1]), "a seed does not repeat it"
        assert not torch.equal(outs[0], outs[2]), "another seed draws the same"


def start(env: PredictorEnv, observation: torch.Tensor) -> TensorDict:
    batch = observation.shape[:1]
    return env.initial_state(
        TensorDict(observation=observation, batch_size=batch, device=env.device)
    )


class Report:
    """Rows of a table, printed as they come.

    Args:
        machines: what the device does with each precision of products.
        jobs: rows are timed as some of them.
    """

    def __init__(self, machines: dict[str, Machine], jobs: Jobs) -> None:
        self.machines = machines
        self.jobs = jobs
        self._eager: dict[str, float] = {}

    def head(self) -> None:
        print("\n| work | way | ms | operations | bytes | kernels | x floor | x eager |")
        print("|---|---|---|---|---|---|---|---|", flush=True)

    def row(
        self, work: str, way: str, call: Callable[[], object], floors: Floors, *, repeats: int = 1
    ) -> None:
        """Time a call that does the work ``repeats`` times."""
        precision = torch.get_float32_matmul_precision()
        machine = self.machines[precision]

        def timed() -> None:
            seconds = least(call, machine.device) / repeats
            if way == EAGER:
                self._eager[work] = seconds
            own = [
                floors.operations / machine.operations_per_second,
                floors.bytes / machine.bytes_per_second,
            ]
            n = kernels(call, machine)
            launched = "" if n is None else f"{n / repeats:.0f}: "
            own.append(0.0 if n is None else SECONDS_PER_KERNEL * n / repeats)
            eager = self._eager.get(work, seconds)
            print(
                f"| {work} | {way}{TF32[precision]} | {1e3 * seconds:.3f} | {1e3 * own[0]:.3f} | "
                f"{1e3 * own[1]:.3f} | {launched}{1e3 * own[2]:.3f} | {seconds / max(own):.1f} | "
                f"{eager / seconds:.1f} |",
                flush=True,
            )

        self.jobs.do(f"{work}, {way}{TF32[precision]}", timed)


def time_learning(report: Report, workload: Workload, device: str, ways: list[str]) -> None:
    buffer = make_buffer(make_transitions(BUFFER_SIZE), device)
    for way in ways:
        predictor = make_learner(workload, device, WAYS[way])
        report.row(
            f"learn, {workload.name}",
            way,
            lambda p=predictor: p.learn(buffer, STEPS, BATCH_SIZE, BATCH_SIZE, 0),
            floors_of_learning(predictor, workload),
            repeats=STEPS,
        )


@torch.no_grad()
def time_imagining(report: Report, workload: Workload, device: str, ways: list[str]) -> None:
    predictor = make_predictor(workload, device)
    n_particles = workload.n_models * workload.n_particles
    for n_envs, horizon in ((1024, 15), (128, 10)):
        observation = torch.randn(n_envs, OBSERVATION_DIM, device=device)
        actions = torch.rand(n_envs, horizon, ACTION_DIM, device=device)
        floors = floors_of_rollout(predictor, workload, n_envs * horizon, n_particles)
        for way in ways:
            env = make_env(predictor, device, WAYS[way])
            state = start(env, observation)
            report.row(
                f"rollout, {workload.name}, {n_envs} x {horizon}",
                way,
                lambda e=env, s=state, a=actions: e.imagine(s, a),
                floors,
            )
    for n_envs in (8, 1):
        for way in (name for name in ways if WAYS[name].plans):
            env = make_env(predictor, device, WAYS[way], num_particles=1)
            state = start(env, torch.randn(n_envs, OBSERVATION_DIM, device=device))
            planner = make_planner(env, WAYS[way])
            rows = sum(planner.round_size(i) for i in range(6)) * 15 * n_envs
            report.row(
                f"plan, {workload.name}, {n_envs} envs, one particle",
                way,
                lambda p=planner, s=state: p(s.copy()),
                floors_of_rollout(predictor, workload, rows, 1),
            )


def check(jobs: Jobs, workload: Workload, device: str, ways: list[str]) -> None:
    """Hold each way to the eager one, and that to the CPU."""
    jobs.do(f"{workload.name}: as the CPU", lambda: check_device(workload, device))
    for way in ways:
        what = f"{workload.name}, {way}"
        jobs.do(f"{what}: learned", lambda x=way: check_learning(workload, device, x))
        jobs.do(f"{what}: imagined", lambda x=way: check_imagining(workload, device, x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=WORKLOADS, nargs="+", default=FIRST)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing is begun")
    args = parser.parse_args()
    device, jobs, ways = args.device, Jobs(args.minutes), ways_on(args.device)
    torchrl.logger.setLevel("WARNING")
    print(f"torch {torch.__version__}, {device}", end="")
    print("" if device == "cpu" else f", {torch.cuda.get_device_name()}")
    machines = {}
    for precision in ("highest",) if device == "cpu" else TF32:
        with precision_of_products(precision):
            machine = machines[precision] = measure(device)
        print(
            f"float32{TF32[precision]}: matrix product "
            f"{machine.operations_per_second / 1e12:.2f} TFLOP/s, copy "
            f"{machine.bytes_per_second / 1e9:.0f} GB/s. Floors in ms."
        )
    report = Report(machines, jobs)
    for name in args.only:
        workload, start_time = WORKLOADS[name], time.perf_counter()
        check(jobs, workload, device, ways[1:])
        print(f"\n{name}: checked in {time.perf_counter() - start_time:.0f} s")
        report.head()
        for precision in machines:
            # with TF32 in the best way only: all is compiled anew
            those = ways if precision == "highest" else [BEST]
            with precision_of_products(precision):
                time_learning(report, workload, device, those)
                time_imagining(report, workload, device, those)
    sys.exit(jobs.finish())


if __name__ == "__main__":
    main()
