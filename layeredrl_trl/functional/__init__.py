"""Pure tensor maths: every formula of the package lives here once and has an oracle in the tests.

Nothing in this folder knows about modules, TensorDicts or devices; it imports torch only.
"""

from layeredrl_trl.functional.bootstrap import bootstrap_weights, fold_index
from layeredrl_trl.functional.clustering import spread_modes
from layeredrl_trl.functional.mixtures import (
    gaussian_mixture_log_prob,
    gaussian_mixture_mean,
    gaussian_mixture_variance,
    sample_gaussian_mixture,
)
from layeredrl_trl.functional.returns import (
    NStepWindow,
    discounted_window_sum,
    n_step_targets,
    n_step_window,
)
from layeredrl_trl.functional.uncertainty import aleatoric_variance, epistemic_variance
from layeredrl_trl.functional.whitening import covariance, whitening_residual

__all__ = [
    "NStepWindow",
    "aleatoric_variance",
    "bootstrap_weights",
    "covariance",
    "discounted_window_sum",
    "epistemic_variance",
    "fold_index",
    "gaussian_mixture_log_prob",
    "gaussian_mixture_mean",
    "gaussian_mixture_variance",
    "n_step_targets",
    "n_step_window",
    "sample_gaussian_mixture",
    "spread_modes",
    "whitening_residual",
]
