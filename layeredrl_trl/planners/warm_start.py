"""The plan as an entry of the TensorDict: read, checked, moved on, and primed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, expand_as_right
from torch import Tensor
from torchrl.data import Unbounded
from torchrl.envs.transforms import TensorDictPrimer


class PlanPrimer(TensorDictPrimer):
    """Let an environment carry entries from step to step; at a reset they are NaN.

    TorchRL's own gives an env that is not locked to a batch size no batch dims, and ``None`` where
    a rollout starts without the entry; this one fills what the TensorDict asks for. The ``shapes``
    are without batch dims, and a ``device`` of ``None`` is that of the environment.
    """

    def __init__(
        self,
        shapes: Mapping[NestedKey, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device | None,
    ) -> None:
        super().__init__(
            {key: Unbounded(shape, dtype=dtype, device=device) for key, shape in shapes.items()},
            default_value=float("nan"),
            expand_specs=True,
        )
        self._shapes = dict(shapes)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Set all entries to NaN, as outside of an environment (in a replay buffer, say)."""
        for key in self._shapes:
            tensordict.set(key, self._nothing(key, tensordict))
        return tensordict

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        reset = tensordict.get(self.reset_key, None)
        for key in self._shapes:
            entry = self._nothing(key, tensordict_reset)
            before = None if reset is None else tensordict.get(key, None)
            if before is not None:
                entry = torch.where(expand_as_right(reset, entry), entry, before)
            tensordict_reset.set(key, entry)
        return tensordict_reset

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        for key in self._shapes:
            if next_tensordict.get(key, None) is None:
                before = tensordict.get(key, None)
                entry = self._nothing(key, next_tensordict) if before is None else before
                next_tensordict.set(key, entry)
        return next_tensordict

    def _nothing(self, key: NestedKey, tensordict: TensorDictBase) -> Tensor:
        spec, shape = self.primers[key], (*tensordict.batch_size, *self._shapes[key])
        device = tensordict.device if spec.device is None else spec.device
        return torch.full(shape, torch.nan, dtype=spec.dtype, device=device)


class PlanEntries(TensorDictModuleBase):
    """Base class of modules that find in the TensorDict what they wrote under ``"next"``.

    NaN stands for nothing carried over: at a reset, where ``is_init`` is True, and where there is
    no such entry. Nothing is read that was carried over unless ``warm_start`` is True.

    Attributes:
        cold_step: a step ``[W]`` of a plan that knows nothing; a buffer that the subclass gives.
    """

    cold_step: Tensor

    def __init__(self, warm_start: bool, plan_key: NestedKey, is_init_key: NestedKey) -> None:
        super().__init__()
        self.warm_start = warm_start
        self.plan_key = unravel_key(plan_key)
        self.is_init_key = unravel_key(is_init_key)
        self._carried_shapes: dict[NestedKey, tuple[int, ...]] = {}

    def forget(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Carry nothing to the next step, where something else than the planner has acted.

        It writes NaN under ``("next", "plan")`` and whatever else is carried, in place.
        """
        for key, nothing in self._nothing(tensordict.batch_size).items():
            tensordict.set(unravel_key(("next", key)), nothing)
        return tensordict

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Make the transform that lets an environment carry the plan from step to step.

        Append it to the real environment, whatever its batch size, or let ``Collector(...,
        auto_register_policy_transforms=True)`` do so. At a reset it fills ``plan`` with NaN, which
        stands for "no plan yet", so ``InitTracker`` is not needed besides.
        """
        device = self.cold_step.device
        # a collector asks a policy that is on no device while its workers get their weights
        device = None if device.type == "meta" else device
        return PlanPrimer(self._carried_shapes, self.cold_step.dtype, device)

    def register_carried(self, key: NestedKey, shape: tuple[int, ...]) -> None:
        """Make ``key`` an entry that is carried from step to step; call it in the constructor.

        It has the dtype of the plan and ``shape``, batch dims left out.
        """
        self._carried_shapes[key] = shape
        self.out_keys.append(unravel_key(("next", key)))
        if self.warm_start:
            self.in_keys.append(key)

    def _carried(self, tensordict: TensorDictBase) -> dict[NestedKey, Tensor]:
        """What the previous step carried over, NaN where there is nothing, checked."""
        carried = self._nothing(tensordict.batch_size)
        if not self.warm_start:
            return carried
        is_init = tensordict.get(self.is_init_key, None)
        if is_init is not None:
            self._check(f"entry {self.is_init_key!r}", is_init, (*tensordict.batch_size, 1))
        for key, nothing in carried.items():
            value = tensordict.get(key, None)
            if value is None:
                continue
            self._check(f"plan {key!r}", value, tuple(nothing.shape))
            carried[key] = value.to(nothing.dtype)
            if is_init is not None:
                is_first = expand_as_right(is_init.bool().squeeze(-1), value)
                carried[key] = torch.where(is_first, nothing, carried[key])
        return carried

    def _nothing(self, batch_size: torch.Size) -> dict[NestedKey, Tensor]:
        like = {"dtype": self.cold_step.dtype, "device": self.cold_step.device}
        return {
            key: torch.full((*batch_size, *shape), torch.nan, **like)
            for key, shape in self._carried_shapes.items()
        }

    def initial_plan(self, carried: dict[NestedKey, Tensor]) -> tuple[Tensor, Tensor]:
        """Make the initial plan of what was carried over.

        Returns:
            the previous plan moved on by one step, with :attr:`cold_step` as its last one, or
            where there is none that is finite, all cold steps, ``[*B, H, W]``; and a bool
            ``[*B, 1, 1]``, whether it is the previous one.
        """
        plan = carried[self.plan_key]
        is_warm = plan.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        cold = self.cold_step.expand_as(plan)
        warm = torch.cat([plan[..., 1:, :], cold[..., :1, :]], -2)
        return torch.where(is_warm, warm, cold), is_warm

    def _check(self, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if value.shape != torch.Size(shape):
            raise ValueError(f"The {name} must have shape {shape}, got {tuple(value.shape)}.")
        device = self.cold_step.device
        if value.device != device:
            raise ValueError(
                f"The {name} is on {value.device}, but {type(self).__name__} on {device}."
            )
