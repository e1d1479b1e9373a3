"""Runs on several ranks, in processes of their own, and the same runs on one rank.

A run is a function of the batches of a rank; with the joined batches it is its own reference.
"""

from __future__ import annotations

import inspect
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from layeredrl_trl.modules import (
    DeltaStandardizer,
    Encoder,
    IdentityEncoder,
    LinearEncoder,
    MLPEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    SelectEncoder,
    ValueNet,
)
from layeredrl_trl.objectives import ForeachSoftUpdate, RewardPredictorLoss, Update, total_loss
from layeredrl_trl.predictors.part_updates import make_update
from layeredrl_trl.ranks import check_same_on_ranks, gather_rows
from tests.oracles_predictors import filled_buffer
from tests.small_predictors import learn, small_predictor

N_STEPS = 4
SMALL = {"hidden_sizes": (8,)}

# --- what is run

ENCODERS: dict[str, Callable[[], Encoder]] = {
    "identity": lambda: IdentityEncoder(3),
    "select": lambda: SelectEncoder(3, [0, 1], [2]),
    "linear": lambda: LinearEncoder(3, 2, 1),
    "mlp": lambda: MLPEncoder(3, 2, 1, **SMALL),
}


def make_loss(
    encoder="identity",
    value="state",
    n_models=2,
    n_modes=1,
    bootstrap=False,
    dtype=torch.float64,
    n_steps=2,
    **options,
) -> RewardPredictorLoss:
    """A loss over everything that a predictor has; the same one on every rank."""
    torch.manual_seed(0)
    made = ENCODERS[encoder]()
    dims = made.latent_state_dim, made.context_dim
    kinds = {"n_models": n_models, "n_modes": n_modes, "bootstrap": bootstrap}
    dynamics = ProbabilisticEnsemble(*dims, 1, condition_on_context=True, **kinds, **SMALL)
    action_dim = {"action_dim": 1} if value == "q" else {}
    loss = RewardPredictorLoss(
        made,
        dynamics,
        RewardNet(*dims, 1, **SMALL),
        None if value is None else ValueNet(*dims, **action_dim, **SMALL),
        standardizer=DeltaStandardizer(dims[0]),
        k_steps=2,
        n_steps=n_steps,
        **options,
    )
    return loss.to(dtype)


def make_batches(sizes: list[int], n: int = N_STEPS, *, constant: bool = False) -> list[list]:
    """For each rank ``n`` batches of slices, padded each in its own way."""
    torch.manual_seed(1)
    return [[_slices(size, constant) for _ in range(n)] for size in sizes]


def _slices(size: int, constant: bool, length: int = 4) -> TensorDict:
    shape = size, length
    steps = torch.arange(length)
    real = torch.randint(1, length + 1, (size, 1))
    observation, following = torch.randn(2, *shape, 3)
    if constant:  # the last dim does not change in an episode: it is context
        following[..., 2] = observation[..., 2] = torch.randn(size, 1)
    return TensorDict(
        {
            "observation": observation,
            "action": torch.randn(*shape, 1),
            "next": {
                "observation": following,
                "reward": 5 + 3 * torch.randn(*shape, 1),
                "terminated": torch.rand(*shape, 1) < 0.2,
            },
            "collector": {"mask": (steps < real).unsqueeze(-1)},
            "planned": torch.rand(*shape, 1) < 0.7,
            "index": torch.randint(1000, shape),
        },
        batch_size=shape,
    )


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: x.detach().clone() for k, x in module.state_dict().items() if torch.is_tensor(x)}


def update_run(batches: list[TensorDict], *, warm_up=0, clip=0.5, **options) -> dict[str, Any]:
    """Steps of ``Update``; everything that ranks must have in common afterwards."""
    loss = make_loss(**options)
    parts = [loss.dynamics, loss.reward, loss.encoder, loss.standardizer]
    parts += [loss.value_network] if loss.has_value else []
    groups = [{"params": own} for part in parts if (own := [*part.parameters()])]
    update = Update(
        loss,
        torch.optim.Adam(groups, 1e-2),
        target_updater=ForeachSoftUpdate(loss, 0.1) if loss.has_value else None,
        clip_grad_max_norm=clip,
        warm_up=warm_up,
        warm_up_params=[*loss.encoder.parameters(), *loss.reward.parameters()],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        infos = [update(batch).to_dict() for batch in batches]
    return {
        "state": state_of(loss),
        "infos": infos,
        "counts": [update.steps, update.skipped, update.state_dict()["n_states"], len(caught)],
    }


def ddp_run(batches: list[TensorDict], *, sync=False, **options) -> dict[str, Any]:
    """A plain loop over ``DistributedDataParallel``; on one rank over the loss itself."""
    loss = make_loss(**options)
    updater = ForeachSoftUpdate(loss, 0.1)
    network = DistributedDataParallel(loss, **{_SYNC: sync}) if dist.is_initialized() else loss
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    for batch in batches:
        optimizer.zero_grad()
        total_loss(network(batch)).backward()
        grads = {key: p.grad.clone() for key, p in loss.named_parameters()}
        optimizer.step()
        updater.step()
    return {"state": state_of(loss), "grads": grads}


_SYNC = "forward_sync_buffers"  # as torch calls it from 2.13 on
if _SYNC not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC = "broadcast_buffers"


def one_sided_run(batches: list[Tensor]) -> dict[str, Any]:
    """Parameters of which only some ranks, or none, have a gradient."""
    module = nn.Module()
    module.a, module.b, module.c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    update = Update(module, torch.optim.Adam(module.parameters(), 0.1))

    def compute(x):
        used = module.a if x.sum() > 0 else module.a + module.b
        return {"loss_it": (x * used).sum()}

    update.compute = compute
    for x in batches:
        update(x)
    return {
        "state": state_of(module),
        "grads": {key: p.grad for key, p in module.named_parameters()},
        "counts": [len(update.optimizer.state)],
    }


def learn_run(rank: int) -> dict[str, Any]:
    """``RewardPredictor.learn`` from a buffer, and a start, that no other rank has."""
    torch.manual_seed(100 + rank)
    predictor = small_predictor(k_steps=2, n_steps=2, encoder_warm_up=2)
    toy = filled_buffer()
    _, info = learn(predictor, toy, n_steps=3)
    _, info = learn(predictor, toy, n_steps=3, env_steps=200)
    return {
        "info": info,
        "state": predictor.state_dict(),
        "loss": state_of(predictor.loss_module),
        "seen": toy.buffer[:]["observation"],
    }


def evaluation_run(rank: int, batches: list[TensorDict]) -> dict[str, Any]:
    """Evaluation on one rank only: any collective would wait for the others."""
    loss = make_loss("mlp")
    ForeachSoftUpdate(loss, 0.1)
    loss.eval()
    before = state_of(loss)
    with counted() as calls:
        terms = loss(batches[0]).detach().to_dict() if rank == 0 else {}
    return {"before": before, "state": state_of(loss), "terms": terms, "calls": calls}


def counting_run(batches: list[TensorDict], **options) -> dict[str, Any]:
    """Collectives of a step after the first."""
    loss = make_loss(**options)
    update = Update(loss, torch.optim.Adam(loss.parameters()))
    ForeachSoftUpdate(loss, 0.1)
    update(batches[0])
    with counted() as calls:
        update(batches[1])
    n_params = sum(p.numel() for p in loss.parameters())
    return {"calls": calls, "n_params": n_params, "n_tensors": len([*loss.parameters()])}


def failing_run(rank: int) -> dict[str, str]:
    """What is told where ranks do not fit together."""
    texts = {}
    tries = {
        "shape": lambda: gather_rows(torch.zeros(3, 1 + rank)),
        "dtype": lambda: gather_rows(torch.zeros(3, 1, dtype=(torch.int32, torch.float32)[rank])),
        "rates": lambda: _update_with_rate(0.1 * (1 + rank))(make_batches([4])[0][0]),
        "number": lambda: check_same_on_ranks(n_steps=3, n_total_env_steps=100 + rank),
        "cudagraphs": lambda: make_update(
            make_loss(),
            tau=0.1,
            clip_grad_max_norm=None,
            encoder_warm_up=0,
            compile=False,
            cudagraphs=True,
        ),
    }
    for name, attempt in tries.items():
        try:
            attempt()
        except ValueError as error:
            texts[name] = str(error)
    check_same_on_ranks(n_steps=3, n_total_env_steps=100)
    return texts


def _update_with_rate(rate: float) -> Update:
    loss = make_loss(value=None)
    update = Update(loss, torch.optim.Adam(loss.parameters(), 0.1))
    update(make_batches([4])[0][0])  # all start as rank 0
    update.optimizer.param_groups[0]["lr"] = rate
    return update


def gathering_run(rank: int) -> list[Tensor]:
    """Rows of several dtypes, numbers and sizes."""
    torch.manual_seed(rank)
    n = 2 + rank
    return gather_rows(
        torch.full((n, 2), float(rank), requires_grad=True),
        torch.full((3, 2, 1), rank, dtype=torch.float64),
        torch.tensor([rank == 0] * (n + 1)),
        torch.empty(n, 0),
        torch.arange(n),
        torch.empty(0 if rank else 1, 4),
    )


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """List the collectives that are called, each with the bytes that a rank passes."""
    calls, names = [], ("all_reduce", "all_gather", "broadcast")
    originals = {name: getattr(dist, name) for name in names}

    def count(name):
        def call(*args, **kwargs):
            x = args[-1]
            calls.append((name, x.numel() * x.element_size()))
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, count(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


# --- the runs by name: function, its options, and the batch sizes of the ranks


class Run(NamedTuple):
    function: Callable[..., dict[str, Any]]
    options: dict[str, Any] = {}
    change: Callable[[list[list[TensorDict]]], None] | None = None
    sizes: tuple[int, ...] | None = None
    constant: bool = False

    def batches(self, n_ranks: int) -> list[list[TensorDict]]:
        batches = make_batches(self.sizes or [6] * n_ranks, constant=self.constant)
        if self.change is not None:
            self.change(batches)
        return batches

    def on(self, rank: int, n_ranks: int) -> dict[str, Any]:
        return self.function(self.batches(n_ranks)[rank], **self.options)

    def joined(self, n_ranks: int) -> dict[str, Any]:
        batches = zip(*self.batches(n_ranks), strict=True)
        return self.function([_joined(batch) for batch in batches], **self.options)


def _joined(batches: tuple[TensorDict, ...]) -> TensorDict:
    """Join the batches of a step; what a rank does not say is that all its steps are planned."""
    for batch in batches:
        batch.setdefault("planned", torch.ones_like(batch["collector", "mask"]))
    return TensorDict.cat(batches)


def no_padding(batches):
    for batch in batches[0]:
        batch["collector", "mask"][:] = True
        del batch["planned"]


def nothing_valid(batches):
    for batch in batches[0][1:]:
        batch["collector", "mask"][:] = False


def nothing_valid_at_first(batches):
    batches[1][0]["collector", "mask"][:] = False


def nan_on_one(batches):
    batches[1][2]["next", "reward"][0, 0] = torch.nan


def nan_in_first_observation(batches):
    batches[0][0]["observation"][1, 0] = torch.nan


def large_on_one(batches):
    for i in range(1, N_STEPS):
        batches[1][i]["observation"][0, 0, 0] = 1e9


def weighted(batches):
    for of_rank in batches:
        for batch in of_rank:
            batch["weight"] = torch.rand(*batch.shape, 1)


RUNS = {
    "identity": Run(update_run),
    "float32": Run(update_run, {"dtype": torch.float32, "encoder": "mlp"}, constant=True),
    "select": Run(update_run, {"encoder": "select"}, constant=True),
    "linear": Run(update_run, {"encoder": "linear"}),
    "mlp": Run(update_run, {"encoder": "mlp"}, constant=True),
    "modes": Run(update_run, {"n_modes": 4}),
    "members": Run(update_run, {"n_models": 5}),
    "bootstrap": Run(update_run, {"n_models": 3, "bootstrap": True}),
    "weights": Run(update_run, {"encoder": "linear"}, weighted),
    "q": Run(update_run, {"value": "q"}),
    "no_value": Run(update_run, {"value": None}),
    "frozen": Run(update_run, {"encoder": "linear", "learn_encoder": False}),
    "warm_up": Run(update_run, {"encoder": "linear", "warm_up": 2}),
    "sum": Run(update_run, {"reduction": "sum"}),
    "no_padding_on_one": Run(update_run, {"encoder": "mlp"}, no_padding),
    "nothing_valid_on_one": Run(update_run, {"encoder": "mlp", "n_modes": 2}, nothing_valid),
    "nothing_valid_at_first": Run(update_run, {"n_modes": 2}, nothing_valid_at_first),
    "nan": Run(update_run, {"encoder": "linear"}, nan_on_one),
    "nan_at_first": Run(update_run, {"encoder": "linear", "n_modes": 2}, nan_in_first_observation),
    "far": Run(update_run, {"encoder": "linear"}, large_on_one),
    "ddp": Run(ddp_run),
    "ddp_mlp": Run(ddp_run, {"encoder": "mlp", "sync": True}, constant=True),
}
ON_THREE = {
    "uneven": Run(update_run, {"encoder": "mlp", "n_modes": 3}, sizes=(2, 5, 9), constant=True),
    "uneven_ddp": Run(ddp_run, {"encoder": "linear"}, no_padding, sizes=(3, 1, 7)),
    "uneven_q": Run(update_run, {"value": "q"}, nan_on_one, sizes=(4, 4, 1)),
}


# --- processes


def spawn(n_ranks: int, work: Callable[[int], dict[str, Any]], folder: Path) -> list[dict]:
    """Call ``work(rank)`` in a process for each rank of a group; return what each returns.

    The processes are copies of one that has imported this module, which takes seconds.
    """
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(
        _in_group, args=(n_ranks, work, folder), nprocs=n_ranks, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n_ranks)]


def _in_group(rank: int, n_ranks: int, work: Callable[[int], dict[str, Any]], folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=n_ranks,
        timeout=timedelta(seconds=60),
    )
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def on_two_ranks(rank: int) -> dict[str, Any]:
    """All runs on two ranks, in one go: processes take seconds to start."""
    batches = make_batches([6, 6])[rank]
    one_sided = [[torch.ones(2)] * 2, [torch.ones(2), -torch.ones(2)]][rank]
    return {
        **{name: run.on(rank, 2) for name, run in RUNS.items()},
        "evaluation": evaluation_run(rank, batches),
        "one_sided": one_sided_run(one_sided),
        "learn": learn_run(rank),
        "counting": counting_run(batches),
        "counting_mlp": counting_run(batches, encoder="mlp"),
        "failing": failing_run(rank),
        "gathering": gathering_run(rank),
    }


def on_three_ranks(rank: int) -> dict[str, Any]:
    return {name: run.on(rank, 3) for name, run in ON_THREE.items()}


def compiled(rank: int) -> dict[str, Any]:
    """Learning in compiled code, and in plain code."""
    out = {}
    for compile in (False, True):
        torch.manual_seed(0)
        predictor = small_predictor(compile=compile)
        toy = filled_buffer()
        warnings.simplefilter("ignore")  # torch's compiler warns of itself
        learn(predictor, toy, n_steps=5, seed=rank)
        out[f"compile={compile}"] = state_of(predictor.loss_module)
    return out
