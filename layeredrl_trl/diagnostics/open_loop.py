"""How good many imagined steps are: growth of the error, coverage of the particles, returns."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Categorical, Unbounded

from layeredrl_trl import keys
from layeredrl_trl.diagnostics.held_out import HeldOut
from layeredrl_trl.diagnostics.one_step import LEVELS, Dims
from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.functional import (
    correlation,
    explained_variance,
    interval_coverage,
    sample_pit,
    varies,
)
from layeredrl_trl.predictors import Predictor

_PARTICLES_AT_ONCE = 16384


def measure_open_loop(
    predictor: Predictor,
    data: HeldOut,
    dims: Dims,
    num_particles: int,
    missing: dict[str, str],
) -> dict[str, dict[str, Tensor]]:
    """Imagine every segment from its first observation with the actions that were taken.

    The arguments are those of ``model_report`` and ``measure_one_step``.

    Returns:
        The section ``open_loop`` of the metrics of a
        :class:`~layeredrl_trl.diagnostics.ModelReport`, and further entries of ``reward``.
    """
    imagined = torch.cat(_imagine(predictor, data.segments, num_particles))
    if not dims.varies.any():
        missing["open_loop"] = "no latent dim varies in this buffer"
    error, persistence = (
        _rmse(imagined[name], data.mask, dims) for name in ("error", "persistence_error")
    )
    ratio = torch.where(persistence > 0, error / persistence, torch.nan)
    counts = data.mask.unsqueeze(-1) & dims.moves
    # Segments and dims count alike: both go into the first dim.
    pit, counts = (x.transpose(1, 2).flatten(0, 1) for x in (imagined["pit"], counts))
    coverage = interval_coverage(pit, LEVELS, counts)
    return {
        "open_loop": {
            "segments": data.mask.sum(0),
            "error": error,
            "persistence_error": persistence,
            "error_ratio": ratio,
            "useful_steps": (ratio < 1).cumprod(0).sum(),
            "coverage": coverage.mT,
        },
        "reward": _returns(imagined["reward"], data, missing),
    }


def _imagine(predictor: Predictor, segments: TensorDict, num_particles: int) -> list[TensorDict]:
    """Imagine segments ``[S, H]`` and compare them with what happened, in chunks."""
    n_models, action_dim = predictor.model.n_models, predictor.model.action_dim
    per_model = max(predictor.model.n_particles_per_model, -(-num_particles // n_models))
    action, spec = segments["action"], Unbounded((action_dim,))
    if not action.is_floating_point() and action.shape[2:] in {(), (1,)} - {(action_dim,)}:
        spec = Categorical(action_dim)  # the actions are indices
        segments = segments.copy().set("action", action.reshape(segments.batch_size))
    env = predictor.env(spec, num_particles=n_models * per_model)
    chunks = segments.split(max(1, _PARTICLES_AT_ONCE // (n_models * per_model)))
    return [_imagine_chunk(predictor, env, chunk) for chunk in chunks]


def _imagine_chunk(predictor: Predictor, env: PredictorEnv, segments: TensorDict) -> TensorDict:
    """Compute errors (``error`` is that of the mean over particles), PIT and imagined reward."""
    obs = segments["observation"][:, 0]
    start = TensorDict({predictor.encoder.in_keys[0]: obs}, batch_size=obs.shape[:1])
    imagined = env.imagine(env.initial_state(start), segments["action"])
    particles = imagined.get(("next", env.latent_key)).flatten(2, 3).transpose(2, 3)
    latent, _ = predictor.encode(obs)
    real, _ = predictor.encode(segments["next_observation"])
    scores = {
        "persistence_error": real - latent.unsqueeze(1),
        "error": real - particles.mean(-1),
        "pit": sample_pit(real, particles, torch.rand_like(real)).double(),
        "reward": imagined.get(keys.NEXT_REWARD).squeeze(-1),
    }
    return TensorDict(scores, batch_size=segments.batch_size)


def _rmse(error: Tensor, mask: Tensor, dims: Dims) -> Tensor:
    """Compute the root mean square ``[H]`` over real steps and varying dims, in units of `scale`.

    Errors of masked steps may hold anything, NaN included.
    """
    squared = (error.double() / dims.scale).square()[..., dims.varies].mean(-1)
    return (torch.where(mask, squared, 0.0).sum(0) / mask.sum(0)).sqrt()


def _returns(imagined: Tensor, data: HeldOut, missing: dict[str, str]) -> dict[str, Tensor]:
    """Compare the returns of segments that have all ``H`` steps or end in a termination.

    After a termination the real reward is 0. The imagined reward is weighted by the imagined
    probability to be still alive, so it is small where the model expected the termination.
    Segments that are cut short by anything else say nothing about the return of ``H`` steps.
    """
    paths = "reward/return_explained_variance", "reward/return_correlation"
    reward = data.segments.get("reward", None)
    terminated = data.segments.get("terminated", None)
    usable = data.mask[:, -1]
    if terminated is not None:
        usable = usable | terminated[:, -1]
    if "reward" in missing or reward is None:
        usable = torch.zeros_like(usable)
        reward = imagined
    elif not usable.any():
        reason = f"no segment in this buffer has {data.mask.shape[1]} steps"
        missing.update(dict.fromkeys(paths, reason))
    real = torch.where(data.mask, reward, 0.0).double().sum(1)[usable]
    imagined = imagined.double().sum(1)[usable]
    if usable.any() and not varies(real):
        missing.update(dict.fromkeys(paths, "all real returns are equal"))
    return {
        "return_explained_variance": explained_variance(real, imagined),
        "return_correlation": correlation(real, imagined),
        "real_return": real,
        "imagined_return": imagined,
    }
