"""Random actions at first, and in phases later on, around the actions of a planner."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import TensorSpec

from layeredrl_trl import keys
from layeredrl_trl.checks import check_count
from layeredrl_trl.planners.base import SamplingPlanner


class Explorer(TensorDictModuleBase):
    """Act at random at first, then by a policy, with phases of random actions in between.

    The value learns only from steps that were ``planned``. The number of actions so far, ``steps``,
    is part of the ``state_dict``. A collector calls its policy once when it is made: set ``steps``
    to 0 then, or the first random phase is one action shorter.

    Args:
        policy: chooses the actions outside of random phases.
        action_spec: random actions are drawn from it.
        init_random_steps: number of actions in the first random phase, at least 1.
        planned_steps: number of the policy's actions between two later random phases; 0 means that
            there are no later random phases.
        random_steps: number of actions in each later random phase.
        planner: the planner in ``policy``. A random phase clears its plan and writes NaN for its
            statistics, because a collector keeps only the entries that the first step has.

    Reads:
        The entries that ``policy`` reads.

    Writes:
        ``action`` ``[..., A]`` and ``planned`` ``[..., 1]`` bool, which is False in a random phase;
        outside of random phases also the entries that ``policy`` writes.

    Raises:
        TypeError: if a number of actions is no integer.
        ValueError: if ``init_random_steps`` is below 1, or another number below 0.

    Example:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.data import Bounded
        >>> policy = TensorDictModule(lambda x: x[..., :1], ["observation"], ["action"])
        >>> explorer = Explorer(policy, Bounded(-1.0, 1.0, (1,)), init_random_steps=2)
        >>> steps = [TensorDict(observation=torch.zeros(3)) for _ in range(3)]
        >>> [explorer(step)["planned"].item() for step in steps]
        [False, False, True]
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        action_spec: TensorSpec,
        init_random_steps: int,
        planned_steps: int = 0,
        random_steps: int = 0,
        planner: SamplingPlanner | None = None,
    ) -> None:
        super().__init__()
        check_count("init_random_steps", init_random_steps)
        check_count("planned_steps", planned_steps, least=0)
        check_count("random_steps", random_steps, least=0)
        self.policy = policy
        self.planner = planner
        self.action_spec = action_spec
        self.init_random_steps = init_random_steps
        self.planned_steps = planned_steps
        self.random_steps = random_steps
        self.steps = 0
        self.in_keys = policy.in_keys
        self.out_keys = [*policy.out_keys, keys.PLANNED]

    def get_extra_state(self) -> dict[str, int]:
        """Return the number of actions so far, for ``state_dict``."""
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self.steps = state["steps"]

    def plans(self, step: int) -> bool:
        """Tell whether the policy chooses action number ``step``."""
        since_start = step - self.init_random_steps
        if since_start < 0:
            return False
        if not (self.planned_steps and self.random_steps):
            return True
        return since_start % (self.planned_steps + self.random_steps) < self.planned_steps

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Choose an action for every env of the batch."""
        planned = self.plans(self.steps)
        if planned:
            tensordict = self.policy(tensordict)
        else:
            tensordict.set(keys.ACTION, self.action_spec.rand(tensordict.batch_size))
            if self.planner is not None:
                self.planner.forget(tensordict)
                for key in self.planner.statistics_keys:
                    tensordict.set(key, _full(tensordict, torch.nan))
        self.steps += tensordict.numel()
        return tensordict.set(keys.PLANNED, _full(tensordict, planned))


def _full(tensordict: TensorDictBase, value: float) -> Tensor:
    return torch.full((*tensordict.batch_size, 1), value, device=tensordict.device)
