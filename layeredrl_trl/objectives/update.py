"""One optimisation step: backward, guard, clip, optimiser, target network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import LossModule, SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater

from layeredrl_trl.checks import check_count, check_number
from layeredrl_trl.objectives.optimizer_state import check_optimizer_state, parameter_shapes
from layeredrl_trl.objectives.saved_buffers import SavedBuffers, statistics_of
from layeredrl_trl.ranks import mean_over_ranks, n_ranks, of_first_rank

LossTerms = Mapping[str, Tensor] | TensorDictBase
"""Outputs of a loss by name; those that begin with ``loss_`` are minimised."""


def total_loss(terms: LossTerms) -> Tensor:
    """Sum all loss terms of a loss module; they must have one shape."""
    summands = [x for key, x in terms.items() if key.startswith("loss_")]
    if len({x.shape for x in summands}) > 1:
        shapes = {key: list(x.shape) for key, x in terms.items()}
        raise RuntimeError(f"total_loss: expected loss terms of equal size, got {shapes}.")
    total = reduce(add, summands)
    return total.sum() if total.ndim else total


class Gradients(NamedTuple):
    """Loss terms and gradients of one step; the gradients are also in ``.grad`` of parameters.

    Attributes:
        terms: outputs of the loss.
        total: the sum of the loss terms.
        grads: gradients that the step uses, for each group of the optimiser.
        norms: norm of the gradients of each group, ``[n_groups]``.
        norm: global norm of ``grads``, a scalar.
        whole_norm: global norm of all gradients, including those dropped by the warm-up.
        before: the running statistics before the loss was computed.
    """

    terms: LossTerms
    total: Tensor
    grads: list[list[Tensor]]
    norms: Tensor
    norm: Tensor
    whole_norm: Tensor
    before: SavedBuffers


class Update:
    """Take optimisation steps on a loss; a failed step leaves everything unchanged.

    A batch with non-finite gradients changes no parameter, target or running statistic; it is
    counted in :attr:`skipped`. The first one causes a warning, and so does the 10th, 100th, ... in
    a row: then nothing is learned any more. A step that raises changes nothing either.

    In a process group of several ranks (:mod:`layeredrl_trl.ranks`), each passes batches of its own
    and all take the same step: that of the joined batch. Before the first one, all get parameters,
    statistics and the state of the update from rank 0. One rank's batch with non-finite gradients
    makes all skip it. All must take the same number of steps, with the same learning rates.

    Args:
        loss_module: every output whose key begins with ``loss_`` is minimised.
        optimizer: over (some of) the parameters of ``loss_module``.
        target_updater: moved after every step; ``None`` without target networks.
        clip_grad_max_norm: maximum norm of the gradients of each group of the optimiser; ``None``
            for no clipping. With a group for each part of the loss, none of them slows down the
            others.
        warm_up: number of first steps in which only ``warm_up_params`` learn.
        warm_up_params: parameters that learn from the start.

    Attributes:
        compute: computes the loss terms of a batch: ``loss_module`` or a compiled version of it.
        steps: steps taken, skipped ones included.
        skipped: steps skipped for non-finite gradients.
        explain: returns what a warning says of the data; ``None`` for nothing.

    Raises:
        TypeError: if ``warm_up`` is no integer.
        ValueError: if a number is out of its range.

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
        if clip_grad_max_norm is not None:
            check_number("clip_grad_max_norm", clip_grad_max_norm)
            if not clip_grad_max_norm > 0:
                raise ValueError(f"clip_grad_max_norm must be positive, got {clip_grad_max_norm}.")
        check_count("warm_up", warm_up, least=0)
        self.loss_module = loss_module
        self.compute: Callable[..., LossTerms] = loss_module
        self.optimizer = optimizer
        self.target_updater = target_updater
        self.clip_grad_max_norm = clip_grad_max_norm
        self.warm_up = warm_up
        self.steps = 0
        self.skipped = 0
        self.explain: Callable[[], str] | None = None
        self._skipped_in_a_row = 0
        self._has_joined = False  # whether it got the state of rank 0
        self._warm_up_params = {id(p) for p in warm_up_params or ()}
        self._statistics = statistics_of(loss_module)

    def __call__(self, *batches: Any) -> TensorDict:
        """Take one step.

        Args:
            *batches: arguments of the loss.

        Returns:
            The detached outputs of the loss, the sum of its loss terms as ``loss`` and the global
            norm of the gradients before clipping as ``grad_norm``, non-finite if the step was
            skipped.
        """
        if n_ranks() > 1 and not self._has_joined:
            self._join()
        step = self.compute_gradients(*batches)
        is_taken = math.isfinite(step.whole_norm.item())
        if is_taken:
            self._clip(step)
            self.optimizer.step()
            if self.target_updater is not None:
                self.target_updater.step()
        else:
            step.before.restore()
        self.steps += 1
        self.count_skipped(int(not is_taken), 1)
        return TensorDict(self.outcome(step), batch_size=[])

    def compute_gradients(self, *batches: Any) -> Gradients:
        """Compute the loss and its gradients; changes only running statistics."""
        before = SavedBuffers(self._statistics)
        groups = [group["params"] for group in self.optimizer.param_groups]
        params = [p for group in groups for p in group]
        for p in params:
            p.grad = None
        try:
            terms = self.compute(*batches)
            total = total_loss(terms)
            total.backward()
            if n_ranks() > 1:
                terms = _average_over_ranks(self.optimizer, terms)
                total = total_loss(terms)
        except BaseException:
            before.restore()
            raise
        grads, norms = _grads(groups), _norms(groups, total)
        whole_norm = norm = torch.linalg.vector_norm(norms)
        if self.steps < self.warm_up:
            for p in params:
                if id(p) not in self._warm_up_params:
                    p.grad = None
            grads, norms = _grads(groups), _norms(groups, total)
            norm = torch.linalg.vector_norm(norms)
        return Gradients(terms, total, grads, norms, norm, whole_norm, before)

    def outcome(self, step: Gradients) -> dict[str, Tensor]:
        """Return the outputs of a call as a dictionary."""
        out = {key: x.detach() for key, x in step.terms.items()}
        norm = step.norm
        if norm is not step.whole_norm:
            norm = torch.where(step.whole_norm.isfinite(), norm, step.whole_norm)
        return out | {"loss": step.total.detach(), "grad_norm": norm}

    def count_skipped(self, n_skipped: int, n_steps: int) -> None:
        """Count the skipped of the last ``n_steps``; warn of the first, and of many in a row."""
        is_first = n_skipped > 0 and self.skipped == 0
        self.skipped += n_skipped
        before = self._skipped_in_a_row
        self._skipped_in_a_row = before + n_skipped if n_skipped == n_steps else 0
        in_a_row = self._skipped_in_a_row
        if any(before < 10**k <= in_a_row for k in range(1, len(str(in_a_row)))):
            text = (
                f"Nothing is learned any more: the last {in_a_row} batches gave non-finite "
                "gradients and were skipped."
            )
        elif is_first:
            text = (
                "A batch gave non-finite gradients and was skipped: no parameter, target or "
                "running statistic changed. Further ones are only counted ('skipped')."
            )
        else:
            return
        look = "Look for non-finite observations or rewards."
        warnings.warn(f"{text} {self.explain() if self.explain else look}", stacklevel=4)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimiser, and counters."""
        optimizer = self.optimizer.state_dict()
        return {
            "optimizer": optimizer,
            "parameters": parameter_shapes(self.optimizer),
            "n_states": len(optimizer["state"]),
            "steps": self.steps,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from :meth:`state_dict`.

        Raises:
            TypeError, ValueError: as :meth:`check_state_dict`; nothing is changed then.
        """
        self.check_state_dict(state)
        # copied, because the optimiser would share the tensors of the state
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        self.steps, self.skipped = state["steps"], state["skipped"]
        self._skipped_in_a_row = state.get("skipped_in_a_row", 0)

    def check_state_dict(self, state: Any, more: Sequence[str] = ()) -> None:
        """Check that a state from :meth:`state_dict`, with ``more`` entries, can be loaded.

        Raises:
            TypeError: if a number is none.
            ValueError: if an entry is missing, the state is of other parts or layers, or a number
                is out of its range or not finite.
        """
        needed = ["optimizer", "steps", "skipped", *more]
        if not isinstance(state, Mapping) or {*needed} - state.keys():
            given = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"state_dict: expected the state of an optimiser with the entries {needed}, got "
                f"{given}."
            )
        _check_parameters(parameter_shapes(self.optimizer), state.get("parameters"))
        check_optimizer_state(self.optimizer, state["optimizer"])
        for name in ("steps", "skipped", "skipped_in_a_row", "n_states"):
            if name in state:
                check_count(f"state_dict: {name}", state[name], least=0)
        n_states = len(state["optimizer"]["state"])
        if state.get("n_states", n_states) != n_states:
            raise ValueError(
                f"state_dict: expected the optimiser's state of {state['n_states']} parameters, "
                f"got it of {n_states}."
            )

    def _join(self) -> None:
        """Start as rank 0, which ``DistributedDataParallel`` does for parameters and buffers."""
        state = of_first_rank({"loss": self.loss_module.state_dict(), "update": self.state_dict()})
        self.loss_module.load_state_dict(state["loss"])
        self.load_state_dict(state["update"])
        self._has_joined = True

    def _clip(self, step: Gradients) -> None:
        max_norm = self.clip_grad_max_norm
        if max_norm is None:
            return
        for grads, norm in zip(step.grads, step.norms.tolist(), strict=True):
            if norm > max_norm:
                torch._foreach_mul_(grads, max_norm / (norm + 1e-6))


class ForeachSoftUpdate(SoftUpdate):
    """TorchRL's ``SoftUpdate`` in a fifth of the time, by moving all targets in one call.

    Args:
        loss_module: loss with target parameters.
        tau: how far targets move to their parameters in a step, in [0, 1].
    """

    def __init__(self, loss_module: LossModule, tau: float) -> None:
        super().__init__(loss_module, eps=1.0)
        self.eps = 1 - tau  # set here, because the constructor warns of a tau above 0.5

    @torch.no_grad()
    def step(self) -> None:
        """Move every target by ``tau`` towards its parameter."""
        targets, sources = [], []
        for name in self._source_names:
            moved = getattr(self.loss_module, f"target_{name}")._buffers
            for path, source in getattr(self.loss_module, name)._parameters.items():
                targets.append(moved[path])
                sources.append(source)
        torch._foreach_lerp_(targets, sources, 1 - self.eps)


def _average_over_ranks(optimizer: torch.optim.Optimizer, terms: LossTerms) -> dict[str, Tensor]:
    """Average gradients, and outputs that are numbers, over all ranks; return the outputs.

    One collective of all numbers, here and not inside of the backward pass as by
    ``DistributedDataParallel``: the loss stays the module that it is, compiled or not, and the
    parameters without gradient need not be known before.

    Raises:
        ValueError: if the learning rates differ between ranks, which would part their parameters.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    rates = torch.tensor([float(group["lr"]) for group in optimizer.param_groups])
    has_grad = torch.tensor([float(p.grad is not None) for p in params])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    numbers = {key: x.detach() for key, x in terms.items() if not x.ndim}
    on_host = (x.to(grads[0].device) for x in (rates, has_grad))
    means = mean_over_ranks([*grads, *on_host, *numbers.values()])
    (*grads, mean_rates, share), outputs = means[: len(params) + 2], means[len(params) + 2 :]
    if not torch.allclose(mean_rates.cpu(), rates, rtol=1e-5, atol=0.0):
        raise ValueError(
            f"ranks: expected the same learning rates on all ranks, got {rates.tolist()} here and "
            f"{mean_rates.tolist()} in the mean. Pass all the same number of env steps."
        )
    for p, grad, n in zip(params, grads, share.tolist(), strict=True):
        p.grad = grad if n else None
    return dict(terms.items()) | dict(zip(numbers, outputs, strict=True))


def _check_parameters(own: dict[str, Any], given: dict[str, Any] | None) -> None:
    if given is None or given == own:  # None: saved by an earlier version
        return
    parts = [*given] if isinstance(given, Mapping) else given
    if parts != [*own]:
        raise ValueError(
            f"state_dict: it is of a predictor whose parts {parts} learn; here {[*own]} do."
        )
    name = next(name for name, shapes in own.items() if shapes != given[name])
    raise ValueError(
        f"state_dict: expected parameters of {name!r} of the shapes {own[name]}, got "
        f"{given[name]}: it is of a predictor of another architecture."
    )


def _grads(groups: list[list[nn.Parameter]]) -> list[list[Tensor]]:
    """Gradients of each group, without parameters that have none."""
    return [[p.grad for p in group if p.grad is not None] for group in groups]


def _norms(groups: list[list[nn.Parameter]], total: Tensor) -> Tensor:
    """Norm of the gradients of each group ``[n_groups]``, of the dtype of ``total``."""
    grads = _grads(groups)
    if not any(grads):
        return torch.zeros_like(total).expand(len(groups))
    each = torch.stack(torch._foreach_norm([grad for group in grads for grad in group]))
    sizes = [len(group) for group in grads]
    return torch.stack([torch.linalg.vector_norm(x) for x in each.split(sizes)])
