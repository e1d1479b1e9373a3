"""From a replay buffer to slices of transitions.

``check_buffer`` says whether a buffer can be learned from, ``TransitionSliceSampler`` which stored
steps make a batch; ``read_slices`` and ``read_transitions`` read the entries that are needed of
them. ``read_dataset`` makes a buffer of what others have left on disk. Nothing here changes what is
stored, but ``mark_break``.
"""

from layeredrl_trl.data.buffers import check_buffer, slice_sampler
from layeredrl_trl.data.dataset_form import Dataset
from layeredrl_trl.data.datasets import read_dataset
from layeredrl_trl.data.episodes import split_episodes
from layeredrl_trl.data.hindsight import HindsightGoals
from layeredrl_trl.data.marking import mark_break
from layeredrl_trl.data.positions import stack_index
from layeredrl_trl.data.reading import has_plain_columns, read_slices, read_transitions
from layeredrl_trl.data.slice_sampler import TransitionSliceSampler
from layeredrl_trl.data.succession import warn_of_gaps

__all__ = [
    "Dataset",
    "HindsightGoals",
    "TransitionSliceSampler",
    "check_buffer",
    "has_plain_columns",
    "mark_break",
    "read_dataset",
    "read_slices",
    "read_transitions",
    "slice_sampler",
    "split_episodes",
    "stack_index",
    "warn_of_gaps",
]
