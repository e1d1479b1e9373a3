"""Planners: policies that search in a model-based environment.

A planner is a ``TensorDictModule`` that reads the state of an imagined environment and writes an
action. It is three things:

- the return of candidate action sequences in the model (:class:`CandidateReturn`);
- a *belief*, the distribution that candidates are drawn from: a Gaussian (:class:`GaussianPlanner`)
  or the probabilities of discrete actions;
- a rule that weighs candidates by their returns, to fit the belief to: the best few alike
  (cross-entropy method), or all by a softmax (path integrals).

The rounds of drawing, scoring, weighing and fitting, and the plan that the TensorDict carries from
step to step, are the same for all (:class:`SamplingPlanner`). A planner of your own takes a method
to weigh candidates (from :class:`GaussianPlanner`), or a few for another belief: see
``docs/extending.md``.

======================================= =============== =======================================
class                                   literature      when
======================================= =============== =======================================
:class:`CrossEntropyPlanner`            CEM             continuous actions; the plain one
:class:`ICEMPlanner`                    iCEM            few candidates, actions that change slowly
:class:`PathIntegralPlanner`            MPPI            smooth returns, many candidates
:class:`CategoricalCrossEntropyPlanner` categorical CEM one-hot or index actions
======================================= =============== =======================================

A planner plans for all environments of the batch at once, keeps no state of its own (the plan
travels in the TensorDict), and knows nothing of predictors: any TorchRL environment that accepts
any batch size will do. Every planner says what it thinks of its plan, for a logger:

=============== ===================================================================================
entry           meaning
=============== ===================================================================================
``plan_return`` return that the plan is expected to have, in the model
``plan_spread`` standard deviation of the returns of the last candidates: 0 if it does not matter
                what is done
``plan_std``    width of the belief in the end, 1 for that of a cold start: near 0 if it converged
=============== ===================================================================================
"""

from layeredrl_trl.planners.base import SamplingPlanner
from layeredrl_trl.planners.categorical import CategoricalCrossEntropyPlanner
from layeredrl_trl.planners.cem import CrossEntropyPlanner
from layeredrl_trl.planners.explorer import Explorer
from layeredrl_trl.planners.gaussian import GaussianBelief, GaussianPlanner
from layeredrl_trl.planners.icem import ICEMPlanner
from layeredrl_trl.planners.path_integral import PathIntegralPlanner
from layeredrl_trl.planners.scoring import CandidateReturn

__all__ = [
    "CandidateReturn",
    "CategoricalCrossEntropyPlanner",
    "CrossEntropyPlanner",
    "Explorer",
    "GaussianBelief",
    "GaussianPlanner",
    "ICEMPlanner",
    "PathIntegralPlanner",
    "SamplingPlanner",
]
