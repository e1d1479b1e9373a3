"""Pure tensor maths: every formula of the package lives here once and has an oracle in the tests.

Nothing in this folder knows about modules, TensorDicts or devices; it imports torch only.
"""

from layeredrl_trl.functional.bootstrap import bootstrap_weights, fold_index
from layeredrl_trl.functional.calibration import (
    bin_mean,
    gaussian_mixture_cdf,
    interval_coverage,
    quantile_bin,
    sample_pit,
)
from layeredrl_trl.functional.candidate_weights import (
    draw_by_weight,
    elite_weights,
    return_spread,
    softmax_weights,
    weighted_moments,
)
from layeredrl_trl.functional.clustering import spread_modes
from layeredrl_trl.functional.coloured_noise import colour, colouring_matrix
from layeredrl_trl.functional.common_noise import CommonDraws, Draw, draw_each
from layeredrl_trl.functional.masking import rows_with_data, zero_where_not
from layeredrl_trl.functional.mixtures import (
    MixtureNoise,
    gaussian_mixture_log_prob,
    gaussian_mixture_mean,
    gaussian_mixture_variance,
    mixture_noise,
    mixture_noise_of_steps,
    sample_gaussian_mixture,
)
from layeredrl_trl.functional.returns import (
    NStepWindow,
    add_bootstrap,
    discounted_window_sum,
    n_step_sums,
    n_step_window,
)
from layeredrl_trl.functional.robust import FAR, ROUNDING, robust_moments
from layeredrl_trl.functional.scores import (
    EventScores,
    correlation,
    event_scores,
    exceeds_rounding,
    explained_variance,
    rank_correlation,
    varies,
)
from layeredrl_trl.functional.survival import survival, zero_if_dead
from layeredrl_trl.functional.uncertainty import (
    aleatoric_variance,
    disagreement,
    epistemic_variance,
)
from layeredrl_trl.functional.whitening import covariance, whitening_residual

__all__ = [
    "FAR",
    "ROUNDING",
    "CommonDraws",
    "Draw",
    "EventScores",
    "MixtureNoise",
    "NStepWindow",
    "add_bootstrap",
    "aleatoric_variance",
    "bin_mean",
    "bootstrap_weights",
    "colour",
    "colouring_matrix",
    "correlation",
    "covariance",
    "disagreement",
    "discounted_window_sum",
    "draw_by_weight",
    "draw_each",
    "elite_weights",
    "epistemic_variance",
    "event_scores",
    "exceeds_rounding",
    "explained_variance",
    "fold_index",
    "gaussian_mixture_cdf",
    "gaussian_mixture_log_prob",
    "gaussian_mixture_mean",
    "gaussian_mixture_variance",
    "interval_coverage",
    "mixture_noise",
    "mixture_noise_of_steps",
    "n_step_sums",
    "n_step_window",
    "quantile_bin",
    "rank_correlation",
    "return_spread",
    "robust_moments",
    "rows_with_data",
    "sample_gaussian_mixture",
    "sample_pit",
    "softmax_weights",
    "spread_modes",
    "survival",
    "varies",
    "weighted_moments",
    "whitening_residual",
    "zero_if_dead",
    "zero_where_not",
]
