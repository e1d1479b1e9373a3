"""One optimisation step: backward, guard, clip, optimiser, target network."""

from __future__ import annotations

import warnings

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key_list
from torch import Tensor, nn
from torchrl.objectives import LossModule, SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater


def total_loss(losses: TensorDictBase) -> Tensor:
    """Add up all scalars of a loss module whose key begins with ``loss_``."""
    return torch.stack([x for key, x in losses.items() if key.startswith("loss_")]).sum()


class ForeachSoftUpdate(SoftUpdate):
    """TorchRL's ``SoftUpdate``, all targets moved by one call.

    Args:
        loss_module: with target parameters.
        tau: how far they move, in [0, 1].
    """

    def __init__(self, loss_module: LossModule, tau: float) -> None:
        super().__init__(loss_module, eps=1.0)
        self.eps = 1 - tau  # set later: the constructor warns of a tau above 0.5
        self._names: list[tuple[NestedKey, NestedKey]] | None = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every target by ``tau`` towards its parameter."""
        if self._names is None:
            paths = [unravel_key_list([key])[0] for key in self._sources.keys(True, True)]
            self._names = [(path, (f"target_{path[0]}", *path[1:])) for path in paths]
        # asked anew each time: a parameter may have been given another storage
        sources = [self._sources.get(name).data for name, _ in self._names]
        targets = [self._targets.get(name).data for _, name in self._names]
        torch._foreach_lerp_(targets, sources, 1 - self.eps)


class Update:
    """Take optimisation steps on a loss, and leave everything as it was where a step went wrong.

    A batch whose gradients are not finite changes no parameter, no target and no running
    statistic; it is counted in :attr:`skipped` and warned of once.

    Args:
        loss_module: every output whose key begins with ``loss_`` is minimised.
        optimizer: over (some of) the parameters of ``loss_module``.
        target_updater: moved after every step; ``None`` without target networks.
        clip_grad_max_norm: largest global norm of the gradients; ``None`` for no clipping.
        warm_up: for so many steps only ``warm_up_params`` learn.
        warm_up_params: parameters that learn from the start.

    Attributes:
        steps: steps taken, skipped ones included.
        skipped: steps skipped for non-finite gradients.

    Example:
        See :class:`~layeredrl_trl.predictors.RewardPredictor`, whose ``learn`` is a loop over it.
    """

    def __init__(
        self,
        loss_module: LossModule,
        optimizer: torch.optim.Optimizer,
        *,
        target_updater: TargetNetUpdater | None = None,
        clip_grad_max_norm: float | None = None,
        warm_up: int = 0,
        warm_up_params: list[nn.Parameter] | None = None,
    ) -> None:
        if clip_grad_max_norm is not None and clip_grad_max_norm <= 0:
            raise ValueError(f"clip_grad_max_norm must be positive, got {clip_grad_max_norm}.")
        if warm_up < 0:
            raise ValueError(f"warm_up must be at least 0, got {warm_up}.")
        self.loss_module = loss_module
        self.optimizer = optimizer
        self.target_updater = target_updater
        self.clip_grad_max_norm = clip_grad_max_norm
        self.warm_up = warm_up
        self._warm_up_params = {id(p) for p in warm_up_params or ()}
        self.steps = 0
        self.skipped = 0

    def __call__(self, *batch: TensorDictBase) -> TensorDict:
        """Take one step on ``loss_module(*batch)``.

        Returns:
            The outputs of the loss, detached, with the sum of its terms under ``loss`` and the
            gradients' global norm before clipping under ``grad_norm``.
        """
        before = [(buffer, buffer.clone()) for buffer in self.loss_module.buffers()]
        losses = self.loss_module(*batch)
        total = total_loss(losses)
        self.optimizer.zero_grad()
        total.backward()
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = _norm(params)
        is_finite = torch.isfinite(norm)
        if self.steps < self.warm_up:
            for p in params:
                if id(p) not in self._warm_up_params:
                    p.grad = None
            norm = _norm(params)
        self.steps += 1
        if is_finite:
            if self.clip_grad_max_norm is not None:
                nn.utils.clip_grads_with_norm_(params, self.clip_grad_max_norm, norm)
            self.optimizer.step()
            if self.target_updater is not None:
                self.target_updater.step()
        else:
            for buffer, old in before:
                buffer.copy_(old)
            self._report_skip()
        info = losses.detach()
        info.set("loss", total.detach())
        info.set("grad_norm", norm)
        return info

    def _report_skip(self) -> None:
        self.skipped += 1
        if self.skipped == 1:
            warnings.warn(
                "A batch gave non-finite gradients and was skipped: no parameter, target or "
                "running statistic changed. Look for non-finite observations or rewards. Further "
                "ones are only counted ('skipped').",
                stacklevel=3,
            )


def _norm(params: list[nn.Parameter]) -> Tensor:
    """Global norm of the gradients that there are."""
    return nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
