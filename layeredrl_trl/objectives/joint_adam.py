"""Adam's fused kernel for all parameter groups of like options at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

_ONE = torch.ones((), dtype=torch.float32, device="cpu")


class _Columns(NamedTuple):
    """What the kernel moves, and what it moves it by; a tensor of each for every parameter."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


def step_jointly(optimizer: torch.optim.Optimizer) -> None:
    """Do what ``optimizer.step()`` does.

    ``torch.optim.Adam`` calls its kernel for each group of parameters, and looks through the
    tensors of each before: for small networks on a CPU as much work as the kernel's. Groups whose
    options are alike (all but their names) go through it together here, by the same numbers. First
    steps, other optimisers and those that somebody watches (hooks) take their own step.
    """
    joint = _joined(optimizer)
    if joint is None:
        optimizer.step()
        return
    for (lr, beta1, beta2, eps, weight_decay, maximize), columns in joint.items():
        # a number would be made a tensor, and brought to their dtype, for each of them
        torch._foreach_add_(columns.steps, [_ONE] * len(columns.steps))
        torch._fused_adam_(
            *columns[:4],
            [],
            columns.steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=maximize,
        )


def _joined(optimizer: torch.optim.Optimizer) -> dict[Any, _Columns] | None:
    """Groups by their options; ``None`` where the optimiser has to do it itself."""
    if type(optimizer) is not torch.optim.Adam or _is_watched(optimizer):
        return None
    joint: dict[Any, _Columns] = {}
    state = optimizer.state
    for group in optimizer.param_groups:
        if not _is_plain(group):
            return None
        own = (group["eps"], group["weight_decay"], group["maximize"])
        key = (group["lr"], *group["betas"], *own)
        params, grads, exp_avgs, exp_avg_sqs, steps = joint.setdefault(
            key, _Columns([], [], [], [], [])
        )
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            there = state.get(p)
            if not there or p.dtype is not torch.float32 or p.is_cuda or grad.is_sparse:
                return None
            params.append(p)
            grads.append(grad)
            exp_avgs.append(there["exp_avg"])
            exp_avg_sqs.append(there["exp_avg_sq"])
            steps.append(there["step"])
    return {key: columns for key, columns in joint.items() if columns.params}


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody looks at its steps, scales them, or has put another one in their place."""
    return bool(
        not {"step", "grad_scale", "found_inf"}.isdisjoint(vars(optimizer))
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


def _is_plain(group: dict[str, Any]) -> bool:
    others = group["amsgrad"], group["capturable"], group["decoupled_weight_decay"]
    return bool(group["fused"]) and type(group["lr"]) is float and not any(others)
