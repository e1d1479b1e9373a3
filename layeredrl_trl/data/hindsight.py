"""Hindsight experience replay for slices: one achieved goal takes the place of a slice's goal.

TorchRL's ``HERReplayBuffer`` relabels each row on its own, so that the rows of a slice would pursue
different goals: a context would change in mid-episode, and an n-step return would sum rewards of
several goals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NoReturn, get_args

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import TensorStorage
from torchrl.envs.transforms import Transform

from layeredrl_trl import keys
from layeredrl_trl.checks import check_count, check_finite, check_key
from layeredrl_trl.data.batch_positions import (
    batch_positions,
    buffer_of,
    put_lanes,
    slice_length,
)
from layeredrl_trl.data.buffers import slice_sampler
from layeredrl_trl.data.positions import gather, leaf_keys
from layeredrl_trl.data.slice_sampler import TransitionSliceSampler

Strategy = Literal["future", "final"]

# Steps that are followed at once to find an episode's end; each further look is twice as long.
_FIRST_LOOK = 64


class HindsightGoals(Transform):
    """Relabel whole slices of a replay buffer's batch, each with one goal that was achieved later.

    For each slice, independently with probability ``her_ratio``: with ``L`` the number of steps
    from the slice's first step ``t`` to the last stored step of its episode, the goal becomes the
    one that was achieved after step ``t + u``, with ``u`` uniform over ``0 .. L - 1`` for
    ``"future"`` and ``u = L - 1`` for ``"final"``. All rows of the slice get it, padding included,
    and their rewards become those of ``reward_fn``. Rows of other slices stay exactly as they are.

    Append it to a replay buffer before transforms that read goals (such as ``CatTensors``) or
    change their units, since achieved goals are taken as they are stored. Episodes end where the
    ``sampler`` says: at end flags, changes of the trajectory id, the write cursor and stored
    padding. What is stored never changes. A batch costs as much as following each relabelled slice
    to its episode's end, whatever the size of the buffer.

    The position of a row is read from ``index``, which the writer of ``TensorDictReplayBuffer``
    stores with it. In a storage of two dims that is only its time. So there the transform also
    stores which env a row is of, under ``("hindsight", "lane")``, when the buffer is extended:
    append it before.

    Args:
        storage: the storage of the replay buffer, of one or two dims.
        slice_len: steps ``T`` of a slice, that of the sampler. A batch must hold such slices; that
            ``T`` is only a divisor of what was drawn is noticed by ``RewardPredictor`` alone. None:
            the largest number that cuts a batch into pieces of consecutive steps;
            ``RewardPredictor`` and ``model_report`` need it where they read slices of several
            lengths, and also single steps (``T = 1``).
        reward_fn: computes rewards ``[R, T, 1]`` from the relabelled slices, a TensorDict
            ``[R, T]`` with all stored entries.
        her_ratio: probability that a slice is relabelled, in [0, 1].
        strategy: ``"future"`` or ``"final"``, see above.
        goal_key: the goal; ``("next", goal_key)`` is replaced as well, if it is stored.
        achieved_goal_key: the goal that a state achieves; it is read under ``"next"``.
        reward_key: the reward.
        terminated_fn: computes from the same slices, after their reward, whether a step terminates,
            bool ``[R, T, 1]``. ``done`` is then set where a step terminates. An episode's last step
            that terminates no longer is ``truncated``. None: flags stay.
        terminated_key: the flag of a termination; ``done`` and ``truncated`` lie next to it.
        sampler: says where episodes end. None: that of the buffer, if it is a ``SliceSampler``, or
            else a ``TransitionSliceSampler`` with its usual keys.
        generator: of the random numbers. None: torch's default generator of the storage's device.

    Reads:
        ``index`` ``[B * T]``, ``goal_key``, ``reward_key``, and with ``terminated_fn``
        ``terminated_key``; from the storage also ``("next", achieved_goal_key)``. A batch
        ``[B, T]`` does as well, and so does ``index`` as a sample from the buffer has it.

    Writes:
        ``goal_key``, ``("next", goal_key)``, ``reward_key``; with ``terminated_fn`` also
        ``terminated_key``, ``done`` and ``truncated``, where they are stored.

    Raises:
        TypeError: an argument is of a wrong type; ``reward_fn`` or ``terminated_fn`` returns no
            tensor; when it is appended to an env.
        ValueError: ``her_ratio`` or ``slice_len`` is out of range, ``strategy`` is unknown, or the
            storage has more than two dims; in a batch: a slice does not hold consecutive steps, a
            position is not in the storage, goal and achieved goal differ in shape, or ``reward_fn``
            or ``terminated_fn`` returns another shape or dtype.
        KeyError: in a batch: an entry is missing.

    Reference:
        Andrychowicz, Wolski, Ray, Schneider, Fong, Welinder, McGrew, Tobin, Abbeel, Zaremba (2017),
        arXiv:1707.01495, algorithm 1 and section 4.5. Deviations: one goal per slice, where the
        paper draws one per transition; drawn when a batch is, not when an episode is stored.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> def reward(slices):
        ...     goal = slices["next", "desired_goal"]
        ...     return -(slices["next", "achieved_goal"] - goal).norm(dim=-1, keepdim=True)
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(100),
        ...     sampler=TransitionSliceSampler(slice_len=4),
        ...     batch_size=32,
        ... )
        >>> hindsight = HindsightGoals(buffer.storage, 4, reward, her_ratio=1.0)
        >>> _ = buffer.append_transform(hindsight)
        >>> path, goal = torch.randn(51, 2).cumsum(0), torch.zeros(50, 2)
        >>> done = torch.arange(50).remainder(10).eq(9).unsqueeze(-1)
        >>> following = {"achieved_goal": path[1:], "desired_goal": goal, "done": done}
        >>> following["reward"] = torch.zeros(50, 1)
        >>> steps = {"achieved_goal": path[:-1], "desired_goal": goal, "next": following}
        >>> _ = buffer.extend(TensorDict(steps, batch_size=[50]))
        >>> goals = buffer.sample().reshape(8, 4)["desired_goal"]
        >>> goals.shape, (goals == goals[:, :1]).all().item()
        (torch.Size([8, 4, 2]), True)
    """

    def __init__(
        self,
        storage: TensorStorage,
        slice_len: int | None,
        reward_fn: Callable[[TensorDictBase], Tensor],
        *,
        her_ratio: float = 0.8,
        strategy: Strategy = "future",
        goal_key: NestedKey = "desired_goal",
        achieved_goal_key: NestedKey = "achieved_goal",
        reward_key: NestedKey = keys.NEXT_REWARD,
        terminated_fn: Callable[[TensorDictBase], Tensor] | None = None,
        terminated_key: NestedKey = keys.NEXT_TERMINATED,
        sampler: TransitionSliceSampler | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(storage, TensorStorage):
            raise TypeError(
                "HindsightGoals: storage: expected one that keeps TensorDicts as tensors "
                f"(LazyTensorStorage, LazyMemmapStorage), got {type(storage).__name__}."
            )
        if storage.ndim > 2:
            raise ValueError(
                "HindsightGoals: storage: expected one of one or two dims, got "
                f"ndim={storage.ndim}."
            )
        if slice_len is not None:
            check_count("HindsightGoals: slice_len", slice_len)
        check_finite("HindsightGoals: her_ratio", her_ratio)
        if not 0 <= her_ratio <= 1:
            raise ValueError(f"HindsightGoals: her_ratio must be in [0, 1], got {her_ratio}.")
        if strategy not in get_args(Strategy):
            raise ValueError(
                f"HindsightGoals: strategy must be one of {get_args(Strategy)}, got {strategy!r}."
            )
        for name, fn, optional in (
            ("reward_fn", reward_fn, False),
            ("terminated_fn", terminated_fn, True),
        ):
            if not (callable(fn) or (optional and fn is None)):
                raise TypeError(f"HindsightGoals: {name} must be a function, got {fn!r}.")
        keys_by_name = {
            "goal_key": goal_key,
            "achieved_goal_key": achieved_goal_key,
            "reward_key": reward_key,
            "terminated_key": terminated_key,
        }
        for name, key in keys_by_name.items():
            check_key(f"HindsightGoals: {name}", key)
        if not (sampler is None or isinstance(sampler, TransitionSliceSampler)):
            raise TypeError(
                "HindsightGoals: sampler: expected a TransitionSliceSampler, got "
                f"{type(sampler).__name__}."
            )
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise TypeError(
                f"HindsightGoals: generator: expected a torch.Generator, got {generator!r}."
            )
        super().__init__()
        self.storage = storage
        self.slice_len = slice_len
        self.reward_fn = reward_fn
        self.her_ratio = her_ratio
        self.strategy = strategy
        self.goal_key = unravel_key(goal_key)
        self.achieved_goal_key = unravel_key(achieved_goal_key)
        self.reward_key = unravel_key(reward_key)
        self.terminated_fn = terminated_fn
        self.terminated_key = unravel_key(terminated_key)
        self.sampler = sampler
        self.generator = generator

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(slice_len={self.slice_len}, her_ratio={self.her_ratio}, "
            f"strategy={self.strategy!r}, goal_key={self.goal_key!r})"
        )

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Relabel a batch ``[B * T]`` or ``[B, T]`` of slices; the argument is not changed."""
        if tensordict.ndim not in (1, 2):
            raise ValueError(
                "HindsightGoals: expected slices as a batch [B * T] or [B, T], got batch size "
                f"{list(tensordict.batch_size)}."
            )
        flat = tensordict.copy() if tensordict.ndim == 1 else tensordict.reshape(-1)
        if not len(flat):
            return tensordict
        self._check_entries(flat)
        achieved = self._achieved()
        position = batch_positions(flat, self.storage, achieved.device)
        row_len = tensordict.shape[1] if tensordict.ndim == 2 else None
        length = slice_length(position, self.storage, self.slice_len, row_len)
        slices, goal = self._draw(tuple(i.reshape(-1, length)[:, 0] for i in position), achieved)
        if not len(slices):
            return tensordict.copy()

        row = (slices.unsqueeze(-1) * length + torch.arange(length, device=slices.device)).to(
            flat.get(self.goal_key).device
        )
        self._put_goal(flat, row, goal)
        relabelled = flat[row]
        reward = self._computed("reward_fn", self.reward_fn, relabelled, self.reward_key)
        _put(flat, self.reward_key, row, reward)
        if self.terminated_fn is not None:
            relabelled.set(self.reward_key, reward)
            ends = self._computed(
                "terminated_fn", self.terminated_fn, relabelled, self.terminated_key
            )
            self._put_ends(flat, row, ends)
        return flat.reshape(tensordict.batch_size)

    def _call(self, next_tensordict: TensorDictBase) -> NoReturn:
        raise TypeError("HindsightGoals is a transform of replay buffers: an env has no future.")

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Note which env each row is of, where the writer does not, as a buffer is filled."""
        return tensordict if self.storage.ndim == 1 else put_lanes(tensordict, self.storage)

    # ---- which goal a slice gets

    def _achieved(self) -> Tensor:
        """Return the goal that was achieved after each stored step."""
        key, data = unravel_key(("next", self.achieved_goal_key)), self.storage._storage
        achieved = None if data is None else data.get(key, None)
        if achieved is None:
            stored = "nothing" if data is None else leaf_keys(data)
            raise KeyError(f"HindsightGoals: the storage has no {key!r}; it has {stored}.")
        return achieved

    def _draw(self, start: tuple[Tensor, ...], achieved: Tensor) -> tuple[Tensor, Tensor]:
        """Draw slices to relabel, and their goals.

        Args:
            start: storage positions of the first steps, one LongTensor ``[B]`` per storage dim.
            achieved: goals of the whole storage.

        Returns:
            The numbers of the slices, ``[R]``, and their goals, ``[R, *G]``.
        """
        generator = self.generator
        device = start[0].device if generator is None else generator.device
        # As many numbers are drawn whatever is relabelled. The goals' need float64: a buffer may
        # hold more steps than float32 can tell apart.
        options = {"generator": generator, "device": device, "dtype": torch.float64}
        draw = torch.rand(2, len(start[0]), **options).to(start[0].device)
        slices = (draw[0] < self.her_ratio).nonzero().flatten()
        left = self._steps_left(tuple(i[slices] for i in start))
        slices, left = slices[left > 0], left[left > 0]  # padding has no future
        ahead = left - 1
        if self.strategy == "future":
            ahead = (draw[1, slices] * left).long().minimum(ahead)
        time, *lane = (i[slices] for i in start)
        after = (time + ahead) % self.storage.shape[0]
        return slices, gather(achieved, (after, *lane))

    def _steps_left(self, start: tuple[Tensor, ...]) -> Tensor:
        """Count the stored steps from each start to its episode's end, both included: ``[R]``.

        The count is 0 where the start is stored padding.
        """
        buffer, sampler = buffer_of(self.storage), self.sampler
        if sampler is None:
            sampler = TransitionSliceSampler(slice_len=1)
            sampler = sampler if buffer is None else slice_sampler(buffer, sampler)
        left = torch.zeros_like(start[0])
        going = torch.arange(len(left), device=left.device)
        at, length = start, _FIRST_LOOK
        while len(going):
            index, real = sampler.slices_from(self.storage, at, length)
            n = real.sum(-1)
            left[going] += n
            goes_on = real[:, -1] & (left[going] <= self.storage.shape[0])
            # the last step is looked at again, with the one after it, and counts once
            going, at = going[goes_on], tuple(i[goes_on, -1] for i in index)
            left[going] -= 1
            length *= 2
        return left

    # ---- what is written

    def _check_entries(self, flat: TensorDictBase) -> None:
        needed = [self.goal_key, self.reward_key]
        needed += [] if self.terminated_fn is None else [self.terminated_key]
        if missing := [key for key in needed if flat.get(key, None) is None]:
            raise KeyError(
                f"HindsightGoals: the batch has no {', '.join(map(repr, missing))}; it has "
                f"{leaf_keys(flat)}."
            )

    def _put_goal(self, flat: TensorDictBase, row: Tensor, goal: Tensor) -> None:
        """Write goals ``[R, *G]`` to rows ``[R, T]``."""
        for key in (self.goal_key, unravel_key(("next", self.goal_key))):
            before = flat.get(key, None)
            if before is None:
                continue
            if before.shape[1:] != goal.shape[1:]:
                raise ValueError(
                    f"HindsightGoals: {key!r}: expected the shape of the achieved goal, "
                    f"{list(goal.shape[1:])}, got {list(before.shape[1:])}."
                )
            _put(flat, key, row, goal.unsqueeze(1).expand(*row.shape, *goal.shape[1:]))

    def _computed(
        self,
        name: str,
        fn: Callable[[TensorDictBase], Any],
        slices: TensorDictBase,
        key: NestedKey,
    ) -> Tensor:
        """Compute an entry of relabelled slices ``[R, T]``, and check it against the stored one."""
        stored = slices.get(key)
        value = fn(slices.copy())
        if not isinstance(value, Tensor):
            raise TypeError(f"HindsightGoals: {name} must return a tensor, got {value!r}.")
        if value.shape != stored.shape:
            raise ValueError(
                f"HindsightGoals: {name} must return one value per step, of the shape "
                f"{list(stored.shape)} that {key!r} has, got {list(value.shape)}."
            )
        if name == "terminated_fn" and value.dtype != torch.bool:
            raise ValueError(f"HindsightGoals: {name} must return bool, got {value.dtype}.")
        return value.to(stored.device, stored.dtype)

    def _put_ends(self, flat: TensorDictBase, row: Tensor, terminated: Tensor) -> None:
        """Write flags of terminations to rows ``[R, T]``, and those of ends that follow."""
        *group, _ = (
            (self.terminated_key,) if isinstance(self.terminated_key, str) else self.terminated_key
        )
        done_key, truncated_key = ((*group, name) for name in (keys.DONE, keys.TRUNCATED))
        before = flat.get(self.terminated_key)[row].bool()
        _put(flat, self.terminated_key, row, terminated)
        terminated = terminated.bool()
        done, truncated = flat.get(done_key, None), flat.get(truncated_key, None)
        if done is not None:
            _put(flat, done_key, row, done[row].bool() | terminated)
        if truncated is not None:  # the episode is stored no further, whatever the goal
            _put(flat, truncated_key, row, truncated[row].bool() | (before & ~terminated))


def _put(flat: TensorDictBase, key: NestedKey, row: Tensor, value: Tensor) -> None:
    """Set an entry to a copy of it with ``value`` at ``row``."""
    before = flat.get(key)
    flat.set(key, before.index_put((row,), value.to(before.device, before.dtype)))
