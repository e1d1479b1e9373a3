"""The state of a collector, so that a run goes on in mid-episode as if it had not stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import BaseCollector, Collector, MultiAsyncCollector

from layeredrl_trl.checkpoints.env_state import EnvState
from layeredrl_trl.checks import check_count


class CollectorState:
    """Save and restore a collector, for ``torchrl.checkpoint.Checkpoint``.

    A ``Collector`` whose env can be saved (:class:`EnvState`) goes on to the bit where it was: env,
    current observation, plans, counters, trajectory ids. With another env every checkpoint ends the
    episode (:meth:`break_off`) in the run that goes on as in the one that is resumed. A collector
    with workers keeps its counters and what its workers save; a resumed run begins new episodes.
    The weights of the policy are not saved here.

    Args:
        collector: of TorchRL.

    Attributes:
        began_anew: whether the collector has begun new episodes when it was loaded, so that no row
            follows the last stored one.
    """

    def __init__(self, collector: BaseCollector) -> None:
        self.collector = collector
        self.began_anew = False
        self._seed: int | None = None
        self._env = EnvState(collector.env) if isinstance(collector, Collector) else None
        self._env_can_be_saved = self._env is not None and self._env.can_be_saved

    @property
    def is_exact(self) -> bool:
        """Whether a resumed collector goes on in mid-episode."""
        return self._env_can_be_saved and self._is_plain

    @property
    def breaks_off(self) -> bool:
        """Whether a checkpoint has to end the episode."""
        return self._env is not None and not self.is_exact

    def break_off(self, *, live: bool = True) -> None:
        """Begin a new episode, here and wherever the next checkpoint is resumed.

        Args:
            live: also begin it here; not after an error of the env.
        """
        self._seed = int(torch.randint(2**31, ()))
        if live:
            self._restart(self._seed)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors: counters, the env and its current step."""
        collector = self.collector
        if isinstance(collector, MultiAsyncCollector):
            # Its workers would drop what they are collecting, and wait ever after.
            counters = {"frames": collector._frames, "iter": collector._iter}
            return {"workers": {**counters, "traj_pool": collector._traj_pool.state_dict()}}
        if self._env is None:
            return {"workers": collector.state_dict()}
        state: dict[str, Any] = {
            "frames": int(collector._frames),
            "iterations": int(collector._iter),
            "trajectories": int(collector._traj_pool.state_dict()["traj_id"]),
            "seed": self._seed,
        }
        if self._seed is None and self.is_exact:
            state["env"] = self._env.state_dict()
            state["step"] = collector._carrier.clone().to_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of a collector or env of another kind; nothing is changed then.
        """
        collector = self.collector
        is_local, was_local = self._env is not None, "workers" not in state
        if is_local != was_local:
            kinds = ("with workers", "in one process")
            raise ValueError(
                f"collector: the checkpoint is of one {kinds[was_local]}, here is one "
                f"{kinds[is_local]}."
            )
        if isinstance(collector, MultiAsyncCollector):
            self._load_asynchronous(collector, state["workers"])
            return
        if self._env is None:
            collector.load_state_dict(state["workers"])
            self.began_anew = isinstance(collector, BaseCollector)
            return
        for name in ("frames", "trajectories"):
            check_count(f"collector: {name}", state[name], least=0)
        seed = state["seed"]
        step = None if seed is not None or "env" not in state else self._read_step(state["step"])
        if step is not None:
            self._env.load_state_dict(state["env"])
        collector._frames, collector._iter = state["frames"], state["iterations"]
        collector._traj_pool.load_state_dict({"traj_id": torch.tensor(state["trajectories"])})
        self.began_anew = step is None
        if step is not None:
            collector._carrier = step
        elif seed is not None:
            # as break_off did, whose new episode has taken its trajectory ids already
            n_new = collector.n_env if collector.track_traj_ids else 0
            first = torch.tensor(state["trajectories"] - n_new)
            collector._traj_pool.load_state_dict({"traj_id": first})
            self._restart(seed)

    def _load_asynchronous(self, collector: MultiAsyncCollector, state: Mapping[str, Any]) -> None:
        for name in ("frames", "iter"):
            check_count(f"collector: {name}", state[name], least=0)
        collector._traj_pool.load_state_dict(state["traj_pool"])
        collector._frames, collector._iter = state["frames"], state["iter"]
        collector.reset()  # to episodes whose ids come after those that are stored
        self.began_anew = True

    @property
    def _is_plain(self) -> bool:
        """Whether the current step holds tensors only."""
        entries = self.collector._carrier.values(True, True, is_leaf=lambda _: True)
        return all(isinstance(x, torch.Tensor | TensorDictBase) for x in entries)

    def _restart(self, seed: int) -> None:
        collector = self.collector
        if not collector.env.is_closed:  # as it is when the collector has all its frames
            collector.env.set_seed(seed)
            collector._make_carrier()

    def _read_step(self, entries: Any) -> TensorDictBase:
        """Make the current step, and check that the entries of the env are as they are here."""
        fresh = self.collector._carrier
        try:
            step = TensorDict(entries, batch_size=fresh.batch_size, device=fresh.device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"collector: its current step is no TensorDict: {error}") from error
        for key, x in fresh.items(True, True):
            there = step.get(key, None)
            kinds = [None if y is None else (list(y.shape), str(y.dtype)) for y in (x, there)]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"collector: expected {key!r} of the current step to be {kinds[0]}, got "
                    f"{kinds[1]}: the checkpoint is of another env or policy."
                )
        return step
