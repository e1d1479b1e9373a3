"""From a replay buffer to slices of transitions.

``TransitionSliceSampler`` says *which* stored steps make a batch, ``read_transitions`` reads the
entries that are needed of them, and nothing here changes what is stored.
"""

from layeredrl_trl.data.reading import (
    check_buffer,
    has_plain_columns,
    read_transitions,
    stack_index,
)
from layeredrl_trl.data.slice_sampler import TransitionSliceSampler

__all__ = [
    "TransitionSliceSampler",
    "check_buffer",
    "has_plain_columns",
    "read_transitions",
    "stack_index",
]
