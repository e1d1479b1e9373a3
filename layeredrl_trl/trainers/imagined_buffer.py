"""Dyna: transitions that a policy would make in the learned model, mixed with real ones.

A refill imagines one short branch from each of many real states. A batch is drawn from what was
imagined and, for a small part, from what was recorded. Any off-policy loss learns from it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from torchrl.data import ReplayBuffer, TensorDictReplayBuffer
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import TrainerHookBase

from layeredrl_trl import keys
from layeredrl_trl.checks import check_count, check_counts, check_finite, check_fraction
from layeredrl_trl.data import check_buffer
from layeredrl_trl.data.positions import leaf_keys
from layeredrl_trl.predictors.modes import in_mode
from layeredrl_trl.trainers.imagined_rows import Policy, imagine_branches, model_of_rows
from layeredrl_trl.trainers.real_rows import RealRows
from layeredrl_trl.trainers.retained_rows import RetainedRows

# A schedule that should reach 3 may return 2.9999999.
_ROUNDING = 1e-6


class ImaginedBuffer(TrainerHookBase):
    """Keep imagined transitions that begin at real states, and give batches of both kinds.

    :meth:`refill` draws real states uniformly over the stored transitions (neither padding nor the
    end of an episode), lets ``policy`` act from each for ``length`` imagined steps, and stores the
    transitions, without gradient, in :attr:`buffer`. That holds the last ``retain`` refills.
    :meth:`sample` gives a flat batch of which the part ``real_ratio`` is real.

    A branch that terminates in imagination ends there with ``terminated``. One that is cut after
    ``length`` steps ends with ``truncated`` (and ``done``), so the value after it still counts. A
    step with numbers that are not finite is left out with all that follows it, and warned of once.

    A row has the entries that both an imagined step and a row of ``real_buffer`` have, in the
    shape and dtype of the latter, as its transforms leave it. So the entries that a policy writes
    are kept if the collector stored them, while ``latent`` and trajectory ids are not.

    In a loop of your own, call both methods. In a TorchRL ``Trainer``, :meth:`register` it after
    the trainer's own hooks. It then refills before the optimisation steps, every ``interval`` env
    steps, and replaces each batch drawn from the real buffer with a mixed one of the same size.

    Args:
        env: a :class:`~layeredrl_trl.envs.PredictorEnv` made with ``num_particles=1`` and
            ``termination="sample"``, best with ``propagation="random_model"``, whose encoder can
            decode; or a ``TransformedEnv`` of it, as with
            :class:`~layeredrl_trl.envs.PessimismPenalty`.
        policy: acts in ``env``, in the mode (training or evaluation) in which it is; ``None`` for
            random actions.
        real_buffer: the replay buffer of real steps, see
            :func:`~layeredrl_trl.data.check_buffer`. Nothing is written to it.
        num_starts: real states to imagine from in a refill.
        length: steps of a branch: a number, or a schedule of env steps, rounded down.
        retain: refills whose rows are kept.
        real_ratio: real part of a batch, in [0, 1]; the number of real rows is rounded.
        batch_size: of :meth:`sample`; ``None``: given with each call, in a ``Trainer`` that of the
            batch it has drawn.
        interval: least number of env steps between two refills in a ``Trainer``.
        exploration_type: TorchRL's, under which ``policy`` acts.

    Raises:
        TypeError: at construction, if ``env`` is no ``PredictorEnv``, ``real_buffer`` cannot be
            learned from, ``policy`` cannot be called, or a number is no number.
        ValueError: at construction, if a number is out of range or the options of ``env`` do not
            give single transitions.

    Reference:
        Janner, Fu, Zhang, Levine 2019 (MBPO), arXiv:1906.08253, algorithm 2. Deviations: one refill
        imagines all branches of an interval, as in the authors' code; which member of the ensemble
        moves a state is drawn from all of them, not from the best on held-out data.

    Example:
        >>> from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
        >>> from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet
        >>> from layeredrl_trl.envs import PredictorEnv
        >>> parts = IdentityEncoder(3), ProbabilisticEnsemble(3, 0, 1, n_models=5)
        >>> env = PredictorEnv(
        ...     *parts,
        ...     RewardNet(3, 0, 1),
        ...     Bounded(-1.0, 1.0, (1,)),
        ...     num_particles=1,
        ...     propagation="random_model",
        ...     termination="sample",
        ... )
        >>> flags = {key: torch.zeros(50, 1).bool() for key in ("done", "terminated", "truncated")}
        >>> steps = {"observation": torch.randn(50, 3), "action": torch.zeros(50, 1)}
        >>> steps["next"] = {
        ...     "observation": torch.randn(50, 3),
        ...     "reward": torch.zeros(50, 1),
        ...     **flags,
        ... }
        >>> real = TensorDictReplayBuffer(storage=LazyTensorStorage(50))
        >>> _ = real.extend(TensorDict(steps, batch_size=[50]))
        >>> imagined = ImaginedBuffer(env, None, real, num_starts=100, length=2)
        >>> 100 <= imagined.refill() <= 200
        True
        >>> imagined.sample(64)["next", "observation"].shape
        torch.Size([64, 3])
    """

    def __init__(
        self,
        env: EnvBase,
        policy: Policy | None,
        real_buffer: ReplayBuffer,
        *,
        num_starts: int = 10_000,
        length: float | Callable[[int], float] = 1,
        retain: int = 4,
        real_ratio: float = 0.05,
        batch_size: int | None = None,
        interval: int = 250,
        exploration_type: ExplorationType = ExplorationType.RANDOM,
    ) -> None:
        self._model = model_of_rows(env)
        try:
            check_buffer(real_buffer)
        except TypeError as error:
            raise TypeError(f"ImaginedBuffer: real_{error}") from None
        if policy is not None and not callable(policy):
            raise TypeError(
                "ImaginedBuffer: policy: expected a TensorDict module or a function of TensorDicts,"
                f" got {type(policy).__module__}.{type(policy).__name__}."
            )
        check_counts(num_starts=num_starts, retain=retain, interval=interval)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        check_fraction("real_ratio", real_ratio)
        if not callable(length):
            _whole(length)
        if not isinstance(exploration_type, ExplorationType):
            raise TypeError(
                f"exploration_type: expected an ExplorationType, got {exploration_type!r}."
            )
        self.env = env
        self.policy = policy
        self.real_buffer = real_buffer
        self.num_starts = num_starts
        self.length = length
        self.retain = retain
        self.real_ratio = real_ratio
        self.batch_size = batch_size
        self.interval = interval
        self.exploration_type = exploration_type
        self._real = RealRows(real_buffer)
        self._rows = RetainedRows(retain)
        self._last_refill_at: int | None = None
        self._has_warned = False
        self._trainer: Trainer | None = None
        observation, action = self._model.initial_state.in_keys[0], self._model.imagined_action_key
        self._needed = [
            *map(unravel_key, (observation, action, ("next", observation))),
            keys.NEXT_REWARD,
            keys.NEXT_TERMINATED,
            keys.NEXT_DONE,
        ]

    @property
    def buffer(self) -> TensorDictReplayBuffer:
        """TorchRL replay buffer of the imagined rows, branch after branch, the oldest first.

        It can be given to whatever draws batches of a given size. A refill replaces its rows, the
        buffer stays.
        """
        return self._rows.buffer

    def __len__(self) -> int:
        """Count the imagined rows."""
        return sum(self._rows.sizes)

    def branch_length(self, n_env_steps: int) -> int:
        """Return the steps of a branch after so many env steps.

        Raises:
            TypeError, ValueError: if ``length`` gives no number of at least 1.
        """
        return _whole(self.length(n_env_steps) if callable(self.length) else self.length)

    @torch.no_grad()
    def refill(self, n_env_steps: int = 0) -> int:
        """Imagine from real states, and drop the rows of the oldest refill.

        Args:
            n_env_steps: real env steps so far, for a schedule of ``length``.

        Returns:
            The number of rows that were added.

        Raises:
            ValueError: if ``real_buffer`` is empty, an entry differs in shape or kind from the
                imagined one, or no imagined step is finite.
            KeyError: if ``real_buffer`` lacks an entry that a transition needs.
        """
        length = self.branch_length(n_env_steps)
        key = self._model.initial_state.in_keys[0]
        observation = self._real.observations(self.num_starts, key).to(self._model.device)
        like = self._real.transitions(1)
        missing = [name for name in self._needed if like.get(name, None) is None]
        if missing and self.real_ratio > 0:
            raise KeyError(f"real_buffer: it has no {missing}, only {leaf_keys(like)}.")
        with set_exploration_type(self.exploration_type), in_mode(self._model, False):
            start = TensorDict(batch_size=[self.num_starts], device=self._model.device)
            rows, unsound = imagine_branches(
                self.env,
                self.policy,
                self.env.reset(start.set(key, observation)),
                length,
                like,
                self._needed,
            )
        self._report(unsound, len(rows))
        self._rows.add(rows)
        self._last_refill_at = n_env_steps
        return len(rows)

    def sample(self, batch_size: int | None = None) -> TensorDictBase:
        """Draw a batch, real rows first.

        Args:
            batch_size: ``B``; ``None``: that of the constructor.

        Returns:
            Transitions ``[B]`` in TorchRL's layout, on the device of ``env``.

        Raises:
            TypeError: if there is no ``batch_size``.
            ValueError: if nothing was imagined yet and, for real rows, what :meth:`refill` raises.
        """
        if batch_size is None:
            batch_size = self.batch_size
        if batch_size is None:
            raise TypeError("batch_size: give it here or to the constructor.")
        check_count("batch_size", batch_size)
        if self._rows.rows is None:
            raise ValueError("ImaginedBuffer: nothing was imagined yet, call refill first.")
        n_real = round(self.real_ratio * batch_size)
        parts = []
        if n_real:
            parts.append(self._real.transitions(n_real).to(self._model.device))
        if batch_size > n_real:
            parts.append(self.buffer.sample(batch_size - n_real))
        names = leaf_keys(self._rows.rows)
        parts = [part.select(*names) for part in parts]
        joined: Any = torch.cat(parts)  # it is typed as a tensor
        return joined

    def register(self, trainer: Trainer, name: str = "imagined_buffer") -> None:
        """Register in a trainer, at the stages ``"pre_epoch"`` and ``"process_optim_batch"``.

        Hooks of one stage run in the order in which they were registered. Those that store real
        steps, learn the model and draw a real batch come before this.
        """
        self._trainer = trainer
        trainer.register_module(name, self)
        trainer.register_op("pre_epoch", self._refill_if_due)
        trainer.register_op("process_optim_batch", self._mix)

    def state_dict(self) -> dict[str, Any]:
        """Return the imagined rows, as nested dictionaries of tensors, and the counters."""
        return {**self._rows.state_dict(), "last_refill_at": self._last_refill_at}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; an error changes nothing.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if there are more refills than ``retain``, or not as many rows as the sizes
                say.
        """
        last = state_dict["last_refill_at"]
        last = None if last is None else int(last)
        self._rows.load_state_dict(state_dict, self._needed, self._model.device)
        self._last_refill_at = last

    def _report(self, unsound: int, n_rows: int) -> None:
        if not n_rows:
            raise ValueError(
                "ImaginedBuffer: no imagined step has finite numbers; the model, or the policy, "
                "has diverged."
            )
        if unsound and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"ImaginedBuffer: {unsound} of {self.num_starts} branches were cut before a step "
                "with numbers that are not finite. More such branches are not warned of.",
                UserWarning,
                stacklevel=3,
            )

    def _refill_if_due(self, batch: TensorDictBase | None) -> TensorDictBase | None:
        frames, last = int(self._trainer.collected_frames), self._last_refill_at
        if last is None or frames - last >= self.interval:
            self.refill(frames)
        return batch

    def _mix(self, batch: TensorDictBase | None) -> TensorDictBase:
        """Replace a drawn batch with a mixed one."""
        size = batch.numel() if self.batch_size is None and batch is not None else self.batch_size
        mixed = self.sample(size)
        return mixed if batch is None or batch.device is None else mixed.to(batch.device)


def _whole(length: float) -> int:
    check_finite("ImaginedBuffer: length", length)
    whole = math.floor(length + _ROUNDING)
    if whole < 1:
        raise ValueError(f"ImaginedBuffer: length must be at least 1, got {length}.")
    return whole
