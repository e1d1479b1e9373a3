"""One optimisation step: backward, guard, clip, optimiser, target network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import LossModule, SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater

from layeredrl_trl.functional import can_read
from layeredrl_trl.modules import Recorded, can_record
from layeredrl_trl.objectives.joint_adam import step_jointly
from layeredrl_trl.objectives.target_network import tensors_of

Losses = Mapping[str, Tensor] | TensorDictBase
"""Terms of a loss by name."""


def total_loss(losses: Losses) -> Tensor:
    """Add up all scalars of a loss module whose key begins with ``loss_``."""
    terms = [x for key, x in losses.items() if key.startswith("loss_")]
    if not terms or any(x.ndim for x in terms):
        return torch.stack(terms).sum()
    return reduce(add, terms)


class Statistics:
    """Buffers of modules, and copies of what is in them now.

    Args:
        slots: where they are kept: ``_buffers`` of a module, and a name in it.
    """

    def __init__(self, slots: list[tuple[dict[str, Tensor | None], str]]) -> None:
        there = [(buffers, name, buffers.get(name)) for buffers, name in slots]
        self._own = [(buffers, name, x) for buffers, name, x in there if x is not None]
        tensors = [x for _, _, x in self._own]
        self._copies = _cloned(tensors)

    def put_back(self, where: Tensor | None = None) -> None:
        """Make them what they were.

        A module that has put another tensor in the place of a buffer gets its own again.

        Args:
            where: bool ``[]``; where it is False they stay what they are. ``None``: make them.
        """
        there = [buffers[name] for buffers, name, _ in self._own]
        for buffers, name, own in self._own:
            buffers[name] = own
        for now, (_, _, own), copy in zip(there, self._own, self._copies, strict=True):
            own.copy_(copy if where is None else torch.where(where, copy, now))


class ForeachSoftUpdate(SoftUpdate):
    """TorchRL's ``SoftUpdate``, all targets moved by one call.

    Args:
        loss_module: with target parameters.
        tau: how far they move, in [0, 1].
    """

    def __init__(self, loss_module: LossModule, tau: float) -> None:
        super().__init__(loss_module, eps=1.0)
        self.eps = 1 - tau  # set later: the constructor warns of a tau above 0.5
        self._paths: dict[str, list[str]] = {}  # dotted, of what moves in each network
        for network, *path in map(_as_path, self._sources.keys(True, True)):
            self._paths.setdefault(network, []).append(".".join(path))

    @torch.no_grad()
    def step(self, where: Tensor | None = None) -> None:
        """Move every target by ``tau`` towards its parameter.

        Args:
            where: bool ``[]``; where it is False nothing moves. ``None``: they do.
        """
        sources, targets = [], []
        for network, paths in self._paths.items():
            for name, tensors in ((network, sources), (f"target_{network}", targets)):
                # asked anew each time: they may have been replaced
                there = tensors_of(getattr(self.loss_module, name))
                tensors += [there[path] for path in paths]
        tau = 1 - self.eps
        if where is None:
            torch._foreach_lerp_(targets, sources, tau)
        else:  # a weight that is a tensor would be read by the host
            change = torch._foreach_sub(sources, targets)
            torch._foreach_mul_(change, tau * where)
            torch._foreach_add_(targets, change)


class Update:
    """Take optimisation steps on a loss, and leave everything as it was where a step went wrong.

    A batch whose gradients are not finite changes no parameter, no target and no running
    statistic; it is counted in :attr:`skipped` and warned of once. Nor does a step that raises.

    Args:
        loss_module: every output whose key begins with ``loss_`` is minimised.
        optimizer: over (some of) the parameters of ``loss_module``.
        target_updater: moved after every step; ``None`` without target networks.
        clip_grad_max_norm: largest global norm of the gradients; ``None`` for no clipping.
        warm_up: for so many steps only ``warm_up_params`` learn.
        warm_up_params: parameters that learn from the start.
        wait: let the host read the norm of the gradients in every step, to decide what to do.
            Otherwise all of it is decided on the device: a GPU never waits, and a bad batch is
            warned of when :attr:`skipped` is next read. That takes a fused optimiser and a
            :class:`ForeachSoftUpdate`. ``None``: where these are there and the gradients are on
            CUDA, do not wait.
        compute: what computes the losses of a batch with ``loss_module``, itself by default.
        cudagraphs: carry steps on CUDA out by replaying one of them, which has been recorded: see
            :class:`~layeredrl_trl.modules.Recorded`. What each step does must not depend on more
            than its batch and what modules hold. ``None``: if all of them are known and it can
            be done; True: raise where it cannot. Where it is done ``wait`` is False.
        starting_steps: so many steps are not like those that follow, and not recorded.

    Attributes:
        steps: steps taken, skipped ones included.

    Raises:
        ValueError: if a number is out of its range, or ``wait=False`` or ``cudagraphs=True`` with
            an optimiser or a target updater that cannot do without, or the latter without CUDA.

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
        wait: bool | None = None,
        compute: Callable[..., Losses] | None = None,
        cudagraphs: bool | None = False,
        starting_steps: int = 0,
    ) -> None:
        if clip_grad_max_norm is not None and clip_grad_max_norm <= 0:
            raise ValueError(f"clip_grad_max_norm must be positive, got {clip_grad_max_norm}.")
        if warm_up < 0:
            raise ValueError(f"warm_up must be at least 0, got {warm_up}.")
        can_go_on = _can_skip(optimizer) and (
            target_updater is None or isinstance(target_updater, ForeachSoftUpdate)
        )
        if not can_go_on and (wait is False or cudagraphs):
            asked_for = "cudagraphs" if cudagraphs else "wait=False"
            raise ValueError(
                f"{asked_for}: expected an optimiser with fused=True, without momentum, and a "
                f"ForeachSoftUpdate, got {type(optimizer).__name__} and "
                f"{type(target_updater).__name__}."
            )
        first = next((p for group in optimizer.param_groups for p in group["params"]), None)
        device = torch.device("cpu") if first is None else first.device
        if cudagraphs and not can_record(device):
            raise ValueError(f"cudagraphs: they need CUDA, got parameters on {device}.")
        self.loss_module = loss_module
        self.optimizer = optimizer
        self.target_updater = target_updater
        self.clip_grad_max_norm = clip_grad_max_norm
        self.warm_up = warm_up
        self.wait = wait if can_go_on else True
        self.compute = loss_module if compute is None else compute
        self._warm_up_params = {id(p) for p in warm_up_params or ()}
        parameters = {name for name, _ in loss_module.named_parameters()}
        moved = {f"target_{name}" for name in parameters}  # not by the loss
        self._statistics = [
            (module._buffers, name)
            for path, module in loss_module.named_modules()
            for name in module._buffers
            if f"{path}.{name}".lstrip(".") not in moved
        ]
        self.starting_steps = starting_steps
        self.steps = 0
        self._skipped = 0
        self._skipped_on_device = torch.zeros((), dtype=torch.long, device=device)
        self._has_warned = False
        self._recorded = None
        if cudagraphs is not False and can_go_on and can_record(device):
            self.wait = False
            n_groups = len(optimizer.param_groups)
            self._rates = torch.full((n_groups,), torch.nan, dtype=torch.float32, device=device)
            self._rates_there: list[float] = []
            self._recorded = Recorded(
                self._step, [loss_module], cudagraphs=cudagraphs, also=self._circumstances
            )

    @property
    def skipped(self) -> int:
        """Steps skipped for non-finite gradients."""
        skipped = self._skipped + int(self._skipped_on_device)
        if skipped and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "A batch gave non-finite gradients and was skipped: no parameter, target or "
                "running statistic changed. Look for non-finite observations or rewards. Further "
                "ones are only counted ('skipped').",
                stacklevel=3,
            )
        return skipped

    @skipped.setter
    def skipped(self, number: int) -> None:
        self._skipped, self._has_warned = number, number > 0
        self._skipped_on_device.zero_()

    def __call__(self, *batch: Any, is_unchanged: bool = False) -> TensorDict:
        """Take one step on the losses of a batch.

        Args:
            *batch: what ``compute`` takes; with ``cudagraphs`` tensors, and tuples of them.
            is_unchanged: since the last step nothing was changed but by it, which with
                ``cudagraphs`` is then not looked for.

        Returns:
            The outputs of the loss, detached, with the sum of its terms under ``loss`` and the
            gradients' global norm before clipping under ``grad_norm``; where it is not finite the
            step was skipped.
        """
        if self._recorded is None:
            info = self._step(*batch)
        else:
            is_unchanged = is_unchanged and self.steps not in (self.warm_up, self.starting_steps)
            with self._rates_on_device():
                info = self._recorded(*batch, is_unchanged=is_unchanged)
        self.steps += 1
        return TensorDict(info, batch_size=[])

    def _step(self, *batch: Any) -> dict[str, Tensor]:
        """Take a step that is not counted."""
        before = Statistics(self._statistics)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        for p in params:
            p.grad = None
        try:
            losses = self.compute(*batch)
            total = total_loss(losses)
            total.backward()
        except BaseException:
            before.put_back()
            raise
        grads = [p.grad for p in params if p.grad is not None]
        whole_norm = norm = _norm(grads, total)
        if self.steps < self.warm_up:
            for p in params:
                if id(p) not in self._warm_up_params:
                    p.grad = None
            grads = [p.grad for p in params if p.grad is not None]
            norm = _norm(grads, total)
        if can_read(norm) if self.wait is None else self.wait:
            self._finish(grads, norm, whole_norm, before)
        else:
            self._finish_on_device(norm, whole_norm, before)
        info = {key: x.detach() for key, x in losses.items()}
        info["loss"] = total.detach()
        info["grad_norm"] = norm
        if norm is not whole_norm:
            info["grad_norm"] = torch.where(whole_norm.isfinite(), norm, whole_norm)
        return info

    def _finish(
        self, grads: list[Tensor], norm: Tensor, whole_norm: Tensor, before: Statistics
    ) -> None:
        if not math.isfinite(whole_norm.item()):
            before.put_back()
            self._skipped += 1
            _ = self.skipped  # warns
            return
        max_norm = self.clip_grad_max_norm
        if max_norm is not None and norm.item() > max_norm:
            torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
        step_jointly(self.optimizer)
        if self.target_updater is not None:
            self.target_updater.step()

    def _finish_on_device(self, norm: Tensor, whole_norm: Tensor, before: Statistics) -> None:
        """The same, without a word to the host."""
        is_finite = whole_norm.isfinite()
        scale = None
        if self.clip_grad_max_norm is not None:
            scale = ((norm + 1e-6) / self.clip_grad_max_norm).clamp_min(1.0).float()
        self._scaled_step(scale, 1.0 - is_finite.float())
        if self.target_updater is not None:
            self.target_updater.step(is_finite)
        before.put_back(~is_finite)
        self._skipped_on_device.add_(~is_finite)

    def _scaled_step(self, scale: Tensor | None, found_inf: Tensor | None = None) -> None:
        """Step by gradients divided by ``scale``, or not at all where ``found_inf`` is 1.

        The kernel of a fused optimiser does it on the way, as mixed precision needs it.
        """
        self.optimizer.grad_scale, self.optimizer.found_inf = scale, found_inf
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.grad_scale, self.optimizer.found_inf

    def forget_recordings(self) -> None:
        """Give the memory back that recorded steps hold."""
        if self._recorded is not None:
            self._recorded.forget()

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Let the optimiser read its learning rates from memory, where a replay finds new ones."""
        groups = self.optimizer.param_groups
        own = [(group, group["lr"], group.get("capturable", False)) for group in groups]
        rates = [float(rate) for _, rate, _ in own]
        if rates != self._rates_there:
            self._rates.copy_(torch.tensor(rates))
            self._rates_there = rates
        try:
            for group, rate in zip(groups, self._rates.unbind(), strict=True):
                group["lr"], group["capturable"] = rate, True
            yield
        finally:
            for group, rate, capturable in own:
                group["lr"], group["capturable"] = rate, capturable

    def _circumstances(self) -> Hashable:
        """All that a step depends on beside its batch and the modules."""
        in_memory = ("params", "lr", "capturable")
        options = [
            (name, str(x))
            for group in self.optimizer.param_groups
            for name, x in group.items()
            if name not in in_memory
        ]
        moments = [
            x.data_ptr()
            for state in self.optimizer.state.values()
            for x in state.values()
            if isinstance(x, Tensor)
        ]
        updater = self.target_updater
        return (
            self.steps < self.warm_up,
            self.steps < self.starting_steps,
            self.clip_grad_max_norm,
            self.compute,
            None if updater is None else (id(updater), getattr(updater, "eps", None)),
            tuple(options),
            tuple(moments),
        )


def _cloned(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of all of them, by one call where torch has such a one (2.11 has none)."""
    if tensors and hasattr(torch, "_foreach_clone"):
        return list(torch._foreach_clone(tensors))
    return [x.clone() for x in tensors]


def _as_path(key: NestedKey) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


def _can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the kernel of an optimiser scales gradients, and can leave everything as it is.

    With momentum it cannot in its first step: the buffer would be left as it was allocated.
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False) and all(
        group.get("fused") and not group.get("momentum") for group in optimizer.param_groups
    )


def _norm(grads: list[Tensor], total: Tensor) -> Tensor:
    """Global norm of the gradients of ``total``."""
    if not grads:
        return torch.zeros_like(total)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
