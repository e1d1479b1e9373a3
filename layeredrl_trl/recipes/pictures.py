"""The two pictures of a run: the learning curve, and imagined compared with real episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer, Unbounded

from layeredrl_trl import keys
from layeredrl_trl.functional import epistemic_variance
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.config import TrainConfig

_REAL, _IMAGINED, _MUTED = "#222222", "#1f6fb4", "#9a9a9a"


@dataclass(frozen=True)
class ImaginationScore:
    """How well imagined returns follow real ones, on episodes that were not trained on.

    Attributes:
        real: returns of segments of real episodes, ``[N]``.
        imagined: returns that the model imagines for the same starts and actions, ``[N]``.
        horizon: number of steps of a segment.
    """

    real: Tensor
    imagined: Tensor
    horizon: int

    @property
    def segments(self) -> int:
        """Number of segments."""
        return self.real.numel()

    @property
    def correlation(self) -> float:
        """Pearson's correlation; NaN where all real or all imagined returns are equal."""
        return torch.corrcoef(torch.stack([self.real, self.imagined]))[0, 1].item()


@torch.no_grad()
def score_imagination(
    predictor: RewardPredictor, rollout: TensorDictBase, *, horizon: int
) -> ImaginationScore:
    """Cut real episodes into segments and imagine each from its first observation.

    Args:
        predictor: the predictor to imagine with.
        rollout: real episodes ``[B, T]`` with ``("collector", "mask")``.
        horizon: number of steps of a segment, cut to ``T`` if it is larger.

    Returns:
        An :class:`ImaginationScore` over the segments that lie within an episode.
    """
    horizon = min(horizon, rollout.shape[1])
    n_segments = rollout.shape[1] // horizon
    segments = rollout[:, : n_segments * horizon].reshape(-1, horizon)
    segments = segments[segments.get(keys.MASK).all(1).squeeze(-1)]
    imagined, _ = predictor.rollout(segments.get(keys.OBSERVATION)[:, 0], segments.get(keys.ACTION))
    return ImaginationScore(
        real=segments.get(keys.NEXT_REWARD).sum((1, 2)).cpu(),
        imagined=imagined.get(keys.NEXT_REWARD).sum((1, 2)).cpu(),
        horizon=horizon,
    )


def draw_learning_curve(
    path: Path, config: TrainConfig, episodes: list[tuple[int, float]], eval_returns: list[float]
) -> None:
    """Draw the return of every training episode and of the final evaluation."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if episodes:
        steps, returns = zip(*episodes, strict=True)
        style = {"color": _IMAGINED, "marker": "o", "markersize": 3.5, "linewidth": 1.2}
        axes.plot(steps, returns, label="training episodes", **style)
    axes.axvspan(0, config.init_random_frames, color=_MUTED, alpha=0.18, linewidth=0)
    style = {"ha": "center", "va": "center", "fontsize": 8, "color": "#555555"}
    middle, place = config.init_random_frames / 2, axes.get_xaxis_transform()
    axes.text(middle, 0.5, "random\nactions", transform=place, **style)
    mean = sum(eval_returns) / len(eval_returns)
    label = f"evaluation: mean {mean:.0f} of {len(eval_returns)} episodes"
    axes.axhline(mean, color=_REAL, linewidth=1, linestyle="--", label=label)
    axes.legend(frameon=False, loc="lower right")
    axes.set(
        xlabel="environment steps",
        ylabel="return of the episode",
        title=f"{config.env}, seed {config.seed}: planning in the learned model",
        xlim=(0, config.total_frames),
    )
    _save(figure, path)


@torch.no_grad()
def draw_imagination(
    path: Path,
    predictor: RewardPredictor,
    buffer: TensorDictReplayBuffer,
    rollout: TensorDictBase,
    score: ImaginationScore,
    *,
    horizon: int = 50,
) -> None:
    """Draw an episode imagined open-loop, returns of all segments, and members' disagreement."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    dims = min(4, predictor.latent_state_dim)
    _draw_rollout(top.subplots(1, dims, squeeze=False)[0], predictor, rollout, horizon)
    title = "One episode, imagined from its first observation: mean and 5-95% of the particles"
    top.suptitle(title)
    left, right = bottom.subplots(1, 2)
    _draw_returns(left, score)
    _draw_disagreement(right, predictor, buffer)
    _save(figure, path)


def _draw_rollout(
    panels: Sequence[Axes], predictor: RewardPredictor, rollout: TensorDictBase, horizon: int
) -> None:
    """Draw the first latent dims of the first episode, one in each panel."""
    episode = rollout[:1, : min(horizon, int(rollout.get(keys.MASK)[0].sum()))]
    action_spec = Unbounded((predictor.model.action_dim,), device=predictor.device)
    env = predictor.env(action_spec, num_particles=20 * predictor.model.n_models)
    start = env.initial_state(episode[:, 0].select(keys.OBSERVATION).to(env.device))
    imagined = env.imagine(start, episode.get(keys.ACTION).to(env.device))
    particles = imagined.get(keys.LATENT)[0].flatten(1, 2).cpu()
    real = predictor.encode(episode.get(keys.OBSERVATION))[0][0].cpu()
    low, high = particles.quantile(torch.tensor([0.05, 0.95]), dim=1)
    time = range(len(real))
    for i, axes in enumerate(panels):
        axes.fill_between(time, low[:, i], high[:, i], color=_IMAGINED, alpha=0.25, linewidth=0)
        axes.plot(time, particles.mean(1)[:, i], color=_IMAGINED, label="imagined")
        axes.plot(time, real[:, i], color=_REAL, linewidth=1.2, linestyle="--", label="real")
        axes.set(title=f"latent dim {i}", xlabel="step")
    panels[0].legend(frameon=False, fontsize=9)


def _draw_returns(axes: Axes, score: ImaginationScore) -> None:
    ends = torch.stack([score.real, score.imagined]).aminmax()
    axes.plot(ends, ends, color=_MUTED, linewidth=1)
    axes.scatter(score.real, score.imagined, s=10, color=_IMAGINED, alpha=0.6, linewidths=0)
    axes.set(
        xlabel=f"real return of {score.horizon} steps",
        ylabel="imagined return",
        title=f"Imagined against real returns: correlation {score.correlation:.3f}",
    )


def _draw_disagreement(
    axes: Axes, predictor: RewardPredictor, buffer: TensorDictReplayBuffer
) -> None:
    """Draw how much the members disagree when stored states are moved away from their mean."""
    stored = buffer[:].reshape(-1)
    index = torch.randperm(len(stored))[:512]
    latent, context = predictor.encode(stored.get(keys.OBSERVATION)[index])
    action = stored.get(keys.ACTION)[index].to(latent.device)
    factors = torch.linspace(0, 4, 33)
    centre = latent.mean(0)
    spread = []
    for factor in factors:
        moved = centre + factor * (latent - centre)
        mean, weights, _, _ = predictor.model.predict(moved, context, action)
        deviation = epistemic_variance(mean, weights).sqrt()
        spread.append((deviation / predictor.model.target_scale).mean(-1))
    levels = torch.tensor([0.05, 0.5, 0.95], device=latent.device)
    low, median, high = torch.stack(spread).quantile(levels, dim=1).cpu()
    axes.fill_between(factors, low, high, color=_IMAGINED, alpha=0.25, linewidth=0)
    axes.plot(factors, median, color=_IMAGINED)
    axes.axvline(1, color=_REAL, linewidth=1, linestyle="--")
    axes.text(1.05, 0.02, "stored states", transform=axes.get_xaxis_transform(), fontsize=9)
    axes.set(
        xlabel="stored states moved to so many times their distance from the mean",
        ylabel="epistemic std / std of a step",
        title="The members agree on what they saw and part elsewhere",
        xlim=(0, 4),
        # one member, or a model whose parameters are not finite, has nothing to draw in a log scale
        yscale="log" if (median > 0).any() else "linear",
    )


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.findobj(Axes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
