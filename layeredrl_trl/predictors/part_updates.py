"""The optimisation step of a predictor, with one optimiser group for each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layeredrl_trl.acceleration import CompiledLoss, DeviceUpdate
from layeredrl_trl.checks import check_count
from layeredrl_trl.objectives import ForeachSoftUpdate, RewardPredictorLoss, Update
from layeredrl_trl.ranks import n_ranks


def make_update(
    loss: RewardPredictorLoss,
    *,
    tau: float,
    clip_grad_max_norm: float | None,
    encoder_warm_up: int,
    compile: bool,
    cudagraphs: bool,
) -> Update | DeviceUpdate:
    """Make the optimisation step of a loss; options as in :class:`RewardPredictor`.

    Raises:
        ValueError: if ``cudagraphs`` is set in a process group of several ranks.
    """
    if cudagraphs and n_ranks() > 1:
        raise ValueError(
            f"cudagraphs: expected one rank, got {n_ranks()}: how many rows the other ranks send "
            "is read on the host, which a recorded step does not do."
        )
    parts = {
        "model": loss.dynamics,
        "value": loss.value_network if loss.has_value else None,
        "reward": loss.reward,
        "encoder": loss.encoder if loss.learn_encoder else None,
        "delta_standardizer": loss.standardizer,
    }
    params = {name: list(part.parameters()) for name, part in parts.items() if part is not None}
    groups = [{"params": own, "name": name} for name, own in params.items() if own]
    # without a reward nothing would learn in the warm-up, without the encoder it has no use
    has_warm_up = loss.learn_encoder and loss.reward is not None
    update = Update(
        loss,
        torch.optim.Adam(groups, fused=True),
        target_updater=ForeachSoftUpdate(loss, tau) if params.get("value") else None,
        clip_grad_max_norm=clip_grad_max_norm,
        warm_up=encoder_warm_up if has_warm_up else 0,
        warm_up_params=[*params.get("encoder", ()), *params.get("reward", ())],
    )
    if compile:
        update.compute = CompiledLoss(loss)
    return DeviceUpdate(update) if cudagraphs else update


def update_state(update: Update | DeviceUpdate) -> dict[str, Any]:
    """Return the state of the optimiser, and counters."""
    update.skipped  # noqa: B018 - on a GPU, reading it counts what the device has skipped
    return _plain(update).state_dict()


def load_update_state(update: Update | DeviceUpdate, state: Mapping[str, Any]) -> None:
    """Restore the state from :func:`update_state`.

    Raises:
        TypeError, ValueError: as :meth:`Update.check_state_dict`; nothing is changed then.
    """
    _plain(update).load_state_dict(state)
    update.skipped = state["skipped"]  # on a GPU, forgets what the device has skipped


def check_update_state(update: Update | DeviceUpdate, state: Any, more: Sequence[str] = ()) -> None:
    """Check a state from :func:`update_state`, with ``more`` entries, before it is loaded.

    Raises:
        TypeError, ValueError: as :meth:`Update.check_state_dict`.
    """
    _plain(update).check_state_dict(state, more)
    if "n_learn_calls" in state:
        check_count("state_dict: n_learn_calls", state["n_learn_calls"], least=0)


def _plain(update: Update | DeviceUpdate) -> Update:
    return update.plain if isinstance(update, DeviceUpdate) else update
