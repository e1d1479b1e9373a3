"""From a replay buffer to slices of transitions.

``check_buffer`` says whether a buffer can be learned from, ``TransitionSliceSampler`` which stored
steps make a batch; ``read_slices`` and ``read_transitions`` read the entries that are needed of
them. Nothing here changes what is stored.
"""

from layeredrl_trl.data.buffers import check_buffer, slice_sampler
from layeredrl_trl.data.hindsight import HindsightGoals
from layeredrl_trl.data.positions import stack_index
from layeredrl_trl.data.reading import has_plain_columns, read_slices, read_transitions
from layeredrl_trl.data.slice_sampler import TransitionSliceSampler
from layeredrl_trl.data.succession import warn_of_gaps

__all__ = [
    "HindsightGoals",
    "TransitionSliceSampler",
    "check_buffer",
    "has_plain_columns",
    "read_slices",
    "read_transitions",
    "slice_sampler",
    "stack_index",
    "warn_of_gaps",
]
