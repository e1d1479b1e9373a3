"""How good one predicted step is: density, intervals, spread, termination and reward."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from layeredrl_trl.functional import (
    aleatoric_variance,
    bin_mean,
    epistemic_variance,
    event_scores,
    exceeds_rounding,
    explained_variance,
    gaussian_mixture_cdf,
    gaussian_mixture_log_prob,
    gaussian_mixture_mean,
    interval_coverage,
    quantile_bin,
    rank_correlation,
    varies,
)
from layeredrl_trl.predictors import Predictor

LEVELS = (0.5, 0.8, 0.95)
N_BINS = 10
N_PIT_BINS = 20
_CHUNK = 1024
_LOG_2PI_E = math.log(2 * math.pi * math.e)


class Dims(NamedTuple):
    """What the latent dims are like in the data.

    Attributes:
        scale: standard deviation, ``[D]``, which is the unit of errors; 1 for a constant dim.
        varies: bool ``[D]``, False where the dim has the same value everywhere.
        moves: bool ``[D]``, False where the dim changes by the same amount in every step (by 0 if
            it is constant in an episode). The density of such a dim has no upper bound.
        n_values: number of different values, long ``[D]``.
    """

    scale: Tensor
    varies: Tensor
    moves: Tensor
    n_values: Tensor


def measure_dims(latent: Tensor, next_latent: Tensor) -> Dims:
    """Describe the dims of the latent states before and after transitions, both ``[N, D]``."""
    vary = varies(latent)
    size = latent.double().square().mean(0).sqrt()
    ordered = next_latent.sort(0).values
    return Dims(
        scale=torch.where(vary, latent.double().std(0, correction=0), 1.0),
        varies=vary,
        moves=exceeds_rounding(next_latent - latent, size),
        n_values=1 + (ordered[1:] != ordered[:-1]).sum(0),
    )


def measure_one_step(
    predictor: Predictor, transitions: TensorDict, missing: dict[str, str]
) -> tuple[dict[str, dict[str, Tensor]], Dims]:
    """Compare the model's one-step predictions with what really followed.

    Args:
        predictor: the predictor to measure.
        transitions: ``[N]``, from :func:`~layeredrl_trl.diagnostics.held_out.read_held_out`.
        missing: receives, under the path of each number that is NaN, the reason why it is.

    Returns:
        The sections ``one_step``, ``spread``, ``termination`` and ``reward`` of the metrics of a
        :class:`~layeredrl_trl.diagnostics.ModelReport`, and a description of the latent dims.
    """
    latent, _ = predictor.encode(transitions["observation"])
    next_latent, _ = predictor.encode(transitions["next_observation"])
    dims = measure_dims(latent, next_latent)
    if not dims.moves.any():
        missing["one_step"] = missing["spread"] = "no latent dim moves in this buffer"
    known = transitions.copy().set("next_latent", next_latent.double())
    predicted = torch.cat([_predict(predictor, x, dims.moves) for x in known.split(_CHUNK)])
    spread = _spread(predicted, dims)
    if predictor.model.n_models == 1:
        missing["spread/epistemic_correlation"] = "one member has nobody to disagree with"
    elif spread["epistemic_correlation"].isnan():
        missing["spread/epistemic_correlation"] = "the disagreement is the same everywhere"
    if spread["total_correlation"].isnan():
        missing["spread/total_correlation"] = "the predicted std is the same everywhere"
    metrics = {
        "one_step": _density(predicted, next_latent.double() - latent.double(), dims),
        "spread": spread,
        "termination": _termination(predicted["term_prob"].double(), transitions, missing),
        "reward": _reward(predictor, predicted["reward"], transitions, missing),
    }
    return metrics, dims


def _predict(predictor: Predictor, known: TensorDict, moves: Tensor) -> TensorDict:
    """Predict transitions ``[N]`` and score the predictions; the density is over dims that move.

    Entries that end in ``prob``, and the reward, are ``[N]``; the others are ``[N, D]``.
    """
    mean, weights, std, reward, term_prob = predictor.predict(known["observation"], known["action"])
    mean, weights, std = mean.double(), weights.double(), std.double()
    next_latent = known["next_latent"]
    flat_mean, flat_std = mean.flatten(-3, -2), std.flatten(-3, -2)
    flat_weights = weights.flatten(-2) / mean.shape[-3]
    log_weights = flat_weights.log()
    epistemic = epistemic_variance(mean, weights)
    moving = [x[..., moves] for x in (next_latent, flat_mean, flat_std)]
    scores = {
        "log_prob": gaussian_mixture_log_prob(*moving, log_weights),
        "pit": gaussian_mixture_cdf(next_latent, flat_mean, flat_std, log_weights),
        "error": next_latent - gaussian_mixture_mean(flat_mean, flat_weights),
        "epistemic_var": epistemic,
        "total_var": epistemic + aleatoric_variance(mean, std, weights),
        "term_prob": term_prob,
        "reward": reward,
    }
    return TensorDict(scores, batch_size=known.batch_size)


def _density(predicted: TensorDict, change: Tensor, dims: Dims) -> dict[str, Tensor]:
    moves = dims.moves
    per_dim = interval_coverage(predicted["pit"], LEVELS)
    guess_var = change.var(0, correction=0)[moves]
    pit = predicted["pit"][:, moves].flatten()
    share = torch.bincount(_bin_of(pit, N_PIT_BINS), minlength=N_PIT_BINS) / pit.numel()
    return {
        "nll": -predicted["log_prob"].mean() / moves.sum(),
        "nll_guess": 0.5 * (_LOG_2PI_E + guess_var.log()).mean(),
        "coverage": per_dim[:, moves].mean(1),
        "coverage_per_dim": torch.where(moves, per_dim, torch.nan),
        "pit_histogram": torch.where(pit.isnan().any(), torch.nan, N_PIT_BINS * share.double()),
    }


def _bin_of(x: Tensor, n_bins: int) -> Tensor:
    """Return the bin of each number in [0, 1], of ``n_bins`` bins of equal width."""
    return (x.nan_to_num() * n_bins).long().clamp(0, n_bins - 1)


def _spread(predicted: TensorDict, dims: Dims) -> dict[str, Tensor]:
    """Compare predicted spread and error of each transition, as mean squares over moving dims."""
    squares = (predicted["error"].square(), predicted["total_var"], predicted["epistemic_var"])
    error, total, epistemic = ((x / dims.scale.square())[:, dims.moves].mean(1) for x in squares)
    out = {"spread_over_error": (total.mean() / error.mean()).sqrt()}
    for name, spread in (("total", total), ("epistemic", epistemic)):
        bins = quantile_bin(spread, N_BINS)
        out[f"{name}_std"] = bin_mean(spread, bins, N_BINS).sqrt()
        out[f"{name}_error"] = bin_mean(error, bins, N_BINS).sqrt()
        out[f"{name}_correlation"] = rank_correlation(spread, error)
    return out


def _termination(
    prob: Tensor, transitions: TensorDict, missing: dict[str, str]
) -> dict[str, Tensor]:
    out = {"expected": prob.sum()}
    nan = torch.full_like(prob.sum(), torch.nan)
    happened = transitions.get("terminated", None)
    if happened is None:
        missing["termination"] = "no termination flags in this buffer"
        scalars = ("actual", "base_rate", "precision", "recall", "auc")
        bins = {name: nan.repeat(N_BINS) for name in ("bin_prob", "bin_rate", "bin_count")}
        return out | dict.fromkeys(scalars, nan) | bins
    out["actual"], out["base_rate"] = happened.sum().double(), happened.double().mean()
    scores = event_scores(prob, happened)
    if not happened.any():
        for name in ("precision", "recall", "auc"):
            missing[f"termination/{name}"] = "no terminations in this buffer"
        scores = scores._replace(precision=nan)
    elif scores.precision.isnan():
        missing["termination/precision"] = "no termination was predicted"
    if happened.all():
        missing["termination/auc"] = "every step in this buffer terminates"
    bins = _bin_of(prob, N_BINS)
    return out | {
        **scores._asdict(),
        "bin_prob": bin_mean(prob, bins, N_BINS),
        "bin_rate": bin_mean(happened.double(), bins, N_BINS),
        "bin_count": torch.bincount(bins, minlength=N_BINS).double(),
    }


def _reward(
    predictor: Predictor, predicted: Tensor, transitions: TensorDict, missing: dict[str, str]
) -> dict[str, Tensor]:
    reward = transitions.get("reward", None)
    if predictor.rew_func is None:
        missing["reward"] = "the predictor has no reward function"
    elif reward is None:
        missing["reward"] = "no rewards in this buffer"
    elif not reward.isfinite().all():
        missing["reward"] = "a reward in this buffer is not finite"
    elif not varies(reward):
        missing["reward/explained_variance"] = "the reward is constant in this buffer"
    if "reward" in missing:
        return {"explained_variance": predicted.new_full((), torch.nan, dtype=torch.float64)}
    return {"explained_variance": explained_variance(reward, predicted)}
