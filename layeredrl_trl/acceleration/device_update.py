"""``Update`` on a GPU, without synchronising with the host.

The device decides whether to skip a batch and how much to clip gradients, so the whole step can be
replayed as a CUDA graph. Loss, optimiser and options are those of the plain ``Update``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives import SoftUpdate

from layeredrl_trl.acceleration.compiled import CompiledLoss
from layeredrl_trl.acceleration.cuda_capture import can_record
from layeredrl_trl.acceleration.cuda_graphs import GraphReplay

_N_FIRST_STEPS = CompiledLoss.n_plain_calls
"""Number of first steps, which initialise statistics and are not recorded."""


class DeviceUpdate:
    """Take the steps of an ``Update`` by replaying a CUDA graph, see :class:`GraphReplay`.

    Warnings of skipped batches come when :attr:`skipped` is next read.

    Args:
        update: the plain ``objectives.Update``, which keeps the counters.

    Raises:
        ValueError: if parameters are not on CUDA, the optimiser is not fused or has momentum, or
            the target updater is no ``SoftUpdate``.
    """

    # options belong to the plain update; slots make setting one here an error
    __slots__ = (
        "_last_rates",
        "_rates",
        "_replay",
        "_skipped_on_device",
        "_steps_at_read",
        "optimizer",
        "plain",
    )

    def __init__(self, update: Any) -> None:
        optimizer, updater = update.optimizer, update.target_updater
        if not _can_skip(optimizer) or not (updater is None or isinstance(updater, SoftUpdate)):
            raise ValueError(
                "cudagraphs: expected an optimiser with fused=True, without momentum, and a "
                f"SoftUpdate, got {type(optimizer).__name__} and {type(updater).__name__}."
            )
        groups = optimizer.param_groups
        device = next(p.device for group in groups for p in group["params"])
        if not can_record(device):
            raise ValueError(f"cudagraphs: they need CUDA, got parameters on {device}.")
        self.plain = update
        self.optimizer = optimizer
        self._skipped_on_device = torch.zeros((), dtype=torch.long, device=device)
        self._steps_at_read = update.steps
        self._rates = torch.full((len(groups),), torch.nan, dtype=torch.float32, device=device)
        self._last_rates: list[float] = []
        self._replay = GraphReplay(self._step, [update.loss_module], also=self._graph_key)

    @property
    def steps(self) -> int:
        """Steps taken, skipped ones included."""
        return self.plain.steps

    @steps.setter
    def steps(self, number: int) -> None:
        self.plain.steps = number

    @property
    def skipped(self) -> int:
        """Steps skipped for non-finite gradients; reading it synchronises with the device."""
        new, n_steps = int(self._skipped_on_device), self.plain.steps - self._steps_at_read
        self._skipped_on_device.zero_()
        self._steps_at_read = self.plain.steps
        if n_steps:
            self.plain.count_skipped(new, n_steps)
        return self.plain.skipped

    @skipped.setter
    def skipped(self, number: int) -> None:
        self._skipped_on_device.zero_()
        self._steps_at_read = self.plain.steps
        self.plain.skipped = number

    @property
    def explain(self) -> Callable[[], str] | None:
        """What a warning of skipped batches says of the data."""
        return self.plain.explain

    @explain.setter
    def explain(self, explain: Callable[[], str] | None) -> None:
        self.plain.explain = explain

    def __call__(self, *batches: Any) -> TensorDict:
        """Take one step, like ``Update``; batches are tensors or tuples of tensors."""
        with self._rates_on_device():
            info = self._replay(*batches)
        self.plain.steps += 1
        return TensorDict(info, batch_size=[])

    def _step(self, *batches: Any) -> dict[str, Tensor]:
        """Take a step without synchronising with the host."""
        step = self.plain.compute_gradients(*batches)
        is_finite = step.whole_norm.isfinite()
        max_norm = self.plain.clip_grad_max_norm
        if max_norm is not None:
            factors = (max_norm / (step.norms + 1e-6)).clamp_max(1.0)
            for grads, factor in zip(step.grads, factors.unbind(), strict=True):
                if grads:  # none in the warm-up
                    torch._foreach_mul_(grads, factor)
        # the kernel of a fused optimiser can skip steps, for mixed precision
        self.optimizer.grad_scale, self.optimizer.found_inf = None, 1.0 - is_finite.float()
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.grad_scale, self.optimizer.found_inf
        self._move_targets(is_finite)
        step.before.restore(~is_finite)
        self._skipped_on_device.add_(~is_finite)
        return self.plain.outcome(step)

    @torch.no_grad()
    def _move_targets(self, where: Tensor) -> None:
        """Do the work of ``SoftUpdate.step`` if ``where`` is True."""
        updater = self.plain.target_updater
        if updater is None:
            return
        targets = list(updater._targets.values(True, True))
        change = torch._foreach_sub(list(updater._sources.values(True, True)), targets)
        torch._foreach_mul_(change, (1 - updater.eps) * where)  # lerp takes no tensor as weight
        torch._foreach_add_(targets, change)

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Keep learning rates in device memory, so that replays see changes."""
        groups = self.optimizer.param_groups
        own = [(group, group["lr"], group.get("capturable", False)) for group in groups]
        rates = [float(rate) for _, rate, _ in own]
        if rates != self._last_rates:
            self._rates.copy_(torch.tensor(rates))
            self._last_rates = rates
        try:
            for group, rate in zip(groups, self._rates.unbind(), strict=True):
                group["lr"], group["capturable"] = rate, True
            yield
        finally:
            for group, rate, capturable in own:
                group["lr"], group["capturable"] = rate, capturable

    def _graph_key(self) -> Hashable:
        """Return everything that a step depends on besides its batch and the modules."""
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
        plain, updater = self.plain, self.plain.target_updater
        return (
            plain.steps < plain.warm_up,
            plain.steps < _N_FIRST_STEPS,
            plain.clip_grad_max_norm,
            id(plain.compute),
            None if updater is None else (id(updater), updater.eps),
            tuple(options),
            tuple(moments),
        )


def _can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimiser's kernel can skip a step.

    With momentum, a skipped first step would leave the momentum buffer uninitialised.
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False) and all(
        group.get("fused") and not group.get("momentum") for group in optimizer.param_groups
    )
