"""Mark the end of what a replay buffer holds, where an episode breaks off."""

from __future__ import annotations

import torch
from torchrl.data import ReplayBuffer

from layeredrl_trl.data.reading import locked
from layeredrl_trl.keys import NEXT_DONE, NEXT_TRUNCATED


def mark_break(buffer: ReplayBuffer) -> None:
    """Mark the newest row of each env as truncated and done, in the storage itself.

    For episodes that are not continued, because an env starts anew: otherwise slices would join the
    rows before and after. Episodes that have ended there keep their flags. Does nothing to an empty
    buffer, and to flags that are not stored.

    Args:
        buffer: with a storage of tensors of one dim, or of two (time first).
    """
    storage = buffer.storage
    with locked(buffer), torch.no_grad():
        if not len(storage):
            return
        data, n_rows = storage._storage, storage.shape[0]
        newest = (int(buffer.writer._cursor) - 1) % n_rows
        done = data.get(NEXT_DONE, None)
        for key in (NEXT_TRUNCATED, NEXT_DONE):
            flag = data.get(key, None)
            if flag is not None:
                goes_on = torch.ones_like(flag[newest]) if done is None else ~done[newest]
                flag[newest] = flag[newest] | goes_on
