"""Faster versions of the library's three loops, equal to the plain ones up to rounding.

The code outside this folder reads as if it did not exist. Each loop uses it as follows:

========== ============================= ===========================================================
loop       used in                       faster version
========== ============================= ===========================================================
learning   ``predictors.part_updates``   :class:`CompiledLoss`: the loss as generated code;
                                         :class:`DeviceUpdate`: the step as a CUDA graph
imagining  ``envs.imagination``          :class:`EnsembleRollout`: work shared by all steps is done
                                         once; :class:`CompiledStep`: a step as generated code
           ``envs.predictor_env``        :class:`GraphReplay`: a whole rollout as a CUDA graph
planning   ``SamplingPlanner.forward``   :class:`GraphReplay`: a whole plan as a CUDA graph
========== ============================= ===========================================================

They build on networks evaluated in pieces that fit the cache (:func:`run_layers`,
:func:`in_pieces`), particles sorted by member (:class:`MemberGroups`), and looks at values that
never wait for a GPU (:func:`check_values`, :func:`is_surely_none`, :func:`peek`). A class promises
a fast interface by defining the method itself; subclasses do not inherit the promise
(:func:`promised`).

Compiled code and CUDA graphs are off by default. CUDA graphs have not run on a GPU yet.
"""

from layeredrl_trl.acceleration.compiled import CompiledLoss, CompiledStep
from layeredrl_trl.acceleration.cuda_capture import can_record
from layeredrl_trl.acceleration.cuda_graphs import GraphReplay
from layeredrl_trl.acceleration.device_update import DeviceUpdate
from layeredrl_trl.acceleration.ensemble_rollout import EnsembleRollout
from layeredrl_trl.acceleration.fingerprint import fingerprint
from layeredrl_trl.acceleration.host_reads import check_values, is_surely_none, peek
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
    "is_surely_none",
    "peek",
    "promised",
    "run_layers",
]
