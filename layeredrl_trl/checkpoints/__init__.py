"""What a run saves, for ``torchrl.checkpoint``: verified, and at a cost that does not grow.

``WholeCheckpoint`` is TorchRL's ``Checkpoint`` that is verified before it is loaded, and loaded
wholly or not at all. ``StoredRows`` saves a replay buffer, each row once. ``EnvState`` saves an
environment in mid-episode.
"""

from layeredrl_trl.checkpoints.env_state import EnvState
from layeredrl_trl.checkpoints.publishing import remove_leftovers
from layeredrl_trl.checkpoints.stored_rows import StoredRows
from layeredrl_trl.checkpoints.whole_checkpoint import (
    WholeCheckpoint,
    latest_whole,
    set_damaged_aside,
)

__all__ = [
    "EnvState",
    "StoredRows",
    "WholeCheckpoint",
    "latest_whole",
    "remove_leftovers",
    "set_damaged_aside",
]
