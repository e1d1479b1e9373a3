"""Everything that exists only to be fast, and changes no number but by rounding.

The floors above read as if this folder did not exist. Each of the three loops of the library asks
for it at one place, its door:

========== ==================================================== ====================================
loop       door                                                 what is behind it
========== ==================================================== ====================================
learning   ``RewardPredictor`` makes its ``Update``             :class:`CompiledLoss`: the loss as
                                                                generated code;
                                                                :class:`DeviceUpdate`: the step as a
                                                                CUDA graph
imagining  ``Imagination.rollout`` asks the dynamics for a      :class:`EnsembleRollout`: many steps
           ``fast_rollout``                                     with layers folded once;
                                                                :class:`CompiledStep`
planning   ``SamplingPlanner.forward``                          :class:`GraphReplay`: a whole plan
                                                                as a CUDA graph
========== ==================================================== ====================================

Beneath them: perceptrons in pieces that fit the cache (:func:`run_layers`, :func:`in_pieces`),
particles sorted by member (:class:`MemberGroups`), and checks of values where these can be read for
nothing (:func:`check_values`). A class promises a fast interface by defining it (:func:`promised`);
nothing here looks whether a subclass overrode something else.

Compiled code and CUDA graphs are off unless they are asked for. Nothing of the latter has run on a
GPU yet.
"""

from layeredrl_trl.acceleration.compiled import CompiledLoss, CompiledStep
from layeredrl_trl.acceleration.cuda_capture import can_record
from layeredrl_trl.acceleration.cuda_graphs import GraphReplay
from layeredrl_trl.acceleration.device_update import DeviceUpdate
from layeredrl_trl.acceleration.ensemble_rollout import EnsembleRollout
from layeredrl_trl.acceleration.fingerprint import fingerprint
from layeredrl_trl.acceleration.host_reads import check_values
from layeredrl_trl.acceleration.member_groups import MemberGroups
from layeredrl_trl.acceleration.pieces import in_pieces, run_layers
from layeredrl_trl.acceleration.promise import promised

__all__ = [
    "CompiledLoss",
    "CompiledStep",
    "DeviceUpdate",
    "EnsembleRollout",
    "GraphReplay",
    "MemberGroups",
    "can_record",
    "check_values",
    "fingerprint",
    "in_pieces",
    "promised",
    "run_layers",
]
