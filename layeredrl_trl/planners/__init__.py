"""Planners: policies that search in a model-based environment.

A planner is a ``TensorDictModule`` that reads the state of an imagined environment and writes an
action. It is three things: an initial plan (mid-range, or the previous plan moved on by one step;
:class:`SamplingPlanner`), the return of candidate action sequences in the model
(:class:`CandidateReturn`), and a rule that makes a better plan out of candidates and returns. Only
the rule is a planner's own, and its file holds nothing else.

A planner plans for all environments of the batch at once, keeps no state of its own (the plan
travels in the TensorDict), and knows nothing of predictors: any TorchRL environment that accepts
any batch size will do.
"""

from layeredrl_trl.planners.base import SamplingPlanner
from layeredrl_trl.planners.cem import CrossEntropyPlanner
from layeredrl_trl.planners.scoring import CandidateReturn

__all__ = ["CandidateReturn", "CrossEntropyPlanner", "SamplingPlanner"]
