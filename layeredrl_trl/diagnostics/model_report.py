"""The report on a model: how it is measured, and the numbers that it holds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from layeredrl_trl.checks import check_counts
from layeredrl_trl.data import check_buffer
from layeredrl_trl.diagnostics.figure import draw_report
from layeredrl_trl.diagnostics.held_out import read_held_out
from layeredrl_trl.diagnostics.lost_observations import suspect_lost_observations
from layeredrl_trl.diagnostics.one_step import LEVELS, Dims, measure_one_step
from layeredrl_trl.diagnostics.open_loop import measure_open_loop
from layeredrl_trl.diagnostics.table import last_step, report_table
from layeredrl_trl.predictors import Predictor
from layeredrl_trl.predictors.modes import in_mode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW_VALUES = 10


@dataclass(frozen=True)
class ModelReport:
    """The numbers that :func:`model_report` measured.

    ``metrics`` is a nested TensorDict on the CPU, of batch size ``[]``. ``H`` is the horizon, ``D``
    the latent dims, ``S`` the segments whose return counts; coverages are of the 50, 80 and 95%
    intervals. A number that the data cannot tell is NaN, and :attr:`missing` says why.

    ======================================== ============ =========================================
    key                                      shape        meaning
    ======================================== ============ =========================================
    ``open_loop, segments``                  ``[H]``      number of segments that have this step
    ``open_loop, error``                     ``[H]``      root mean square error of the imagined
                                                          latent state (mean over particles), each
                                                          dim in units of its std in the data
    ``open_loop, persistence_error``         ``[H]``      error of the guess that nothing changes
    ``open_loop, error_ratio``               ``[H]``      ``error / persistence_error``; the model
                                                          is useful where this is below 1
    ``open_loop, useful_steps``              scalar       number of steps before the first at which
                                                          the ratio is not below 1
    ``open_loop, coverage``                  ``[H, 3]``   coverage of the particles' intervals
    ``one_step, nll``                        scalar       negative log-likelihood per latent dim, in
                                                          nats, of the even mixture of the members
    ``one_step, nll_guess``                  scalar       the same of a Gaussian that is fitted to
                                                          the changes in this data
    ``one_step, coverage``                   ``[3]``      coverage of the even mixture's intervals
    ``one_step, coverage_per_dim``           ``[3, D]``   the same, dim by dim
    ``one_step, pit_histogram``              ``[20]``     density of the PIT: flat if calibrated
    ``spread, total_std``                    ``[10]``     predicted std in ten bins of equally many
                                                          transitions, smallest std first
    ``spread, total_error``                  ``[10]``     error in each of these bins
    ``spread, epistemic_std``                ``[10]``     std of the member means, in ten bins
    ``spread, epistemic_error``              ``[10]``     error in each of these bins
    ``spread, spread_over_error``            scalar       predicted std / error; 1 if calibrated
    ``spread, total_correlation``            scalar       Spearman's, of predicted std and error
    ``spread, epistemic_correlation``        scalar       Spearman's, of disagreement and error
    ``termination, expected``                scalar       sum of the predicted probabilities
    ``termination, actual``                  scalar       terminations in the transitions
    ``termination, base_rate``               scalar       fraction of transitions that terminated
    ``termination, precision``               scalar       at a probability of 0.5
    ``termination, recall``                  scalar       at a probability of 0.5
    ``termination, auc``                     scalar       area under the ROC curve; 0.5 is chance
    ``termination, bin_prob``                ``[10]``     mean predicted probability in bins of 0.1
    ``termination, bin_rate``                ``[10]``     fraction that terminated in each bin
    ``termination, bin_count``               ``[10]``     transitions in each bin
    ``reward, explained_variance``           scalar       of the reward of one step
    ``reward, return_explained_variance``    scalar       of the undiscounted return of ``H`` steps
    ``reward, return_correlation``           scalar       Pearson's, of real and imagined returns
    ``reward, real_return``                  ``[S]``      of the segments
    ``reward, imagined_return``              ``[S]``      of the segments
    ``dims, scale``                          ``[D]``      std in the data
    ``dims, varies``                         ``[D]`` bool False where a dim is constant everywhere;
                                                          such a dim counts nowhere
    ``dims, moves``                          ``[D]`` bool False where a dim is constant in each
                                                          episode; such a dim counts only for the
                                                          open-loop error
    ``dims, n_values``                       ``[D]``      number of different values of the dim
    ======================================== ============ =========================================

    Attributes:
        metrics: see above.
        missing: the reason why an entry (``"section/name"``) or a whole section (``"section"``) is
            NaN.
        notes: what a reader should know about the data, in sentences.
    """

    metrics: TensorDict
    missing: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def horizon(self) -> int:
        """Steps that were imagined."""
        return self.metrics["open_loop", "error"].numel()

    def scalars(self) -> dict[str, float]:
        """Return the numbers that are worth plotting over training, by ``"section/name"``.

        Returns:
            All scalars of :attr:`metrics`, the coverages, and the open-loop errors at the first
            step and at the last step that any segment has. NaN where the data cannot tell.
        """
        open_loop, last = self.metrics["open_loop"], last_step(self.metrics)
        one_step = self.metrics["one_step"]
        out = {
            f"open_loop/{name}_{which}": open_loop[name][step].item()
            for name in ("error", "error_ratio")
            for which, step in (("first", 0), ("last", last))
        }
        for i, level in enumerate(LEVELS):
            percent = f"{100 * level:.0f}"
            out[f"open_loop/coverage_last_{percent}"] = open_loop["coverage"][last, i].item()
            out[f"one_step/coverage_{percent}"] = one_step["coverage"][i].item()
        for section, entries in self.metrics.items():
            for name, x in entries.items():
                if x.ndim == 0:
                    out[f"{section}/{name}"] = x.item()
        return out

    def markdown(self) -> str:
        """Return a table of the quantities, their values, and what a good value is."""
        return report_table(self.metrics, self.missing, self.notes)

    def figure(self) -> Figure:
        """Draw six panels.

        Returns:
            A ``matplotlib.figure.Figure`` that belongs to no pyplot window: ``savefig`` it, or
            leave it as the last value of a notebook's cell.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        return draw_report(self.metrics, self.missing)

    def __repr__(self) -> str:
        return self.markdown()

    def _repr_markdown_(self) -> str:
        return self.markdown()


@torch.no_grad()
def model_report(
    predictor: Predictor,
    buffer: TensorDictReplayBuffer,
    horizon: int,
    *,
    n_segments: int = 512,
    n_transitions: int = 10_000,
    num_particles: int = 32,
    seed: int = 0,
) -> ModelReport:
    """Measure how good a predictor is on the real steps of a replay buffer.

    Pass a buffer of **held-out episodes**. On data that the predictor has learned from, the report
    is too good: errors are smaller than on new data, and intervals hold the truth more often.
    Holding out single steps of episodes is not enough, because neighbouring steps are too similar.

    *One step.* Up to ``n_transitions`` stored steps, drawn uniformly and each at most once, are
    compared with the even mixture of members and modes: density, intervals (exact, by the
    mixture's distribution function), spread, termination, reward.

    *Open loop.* Up to ``n_segments`` segments of ``horizon`` steps, whose starts are drawn in the
    same way, are imagined from their first observation with the actions that were taken. The
    context is that of the segment's first step. No segment crosses the end of an episode, the write
    cursor or another env's row; one that ends early counts for the steps it has. Returns are
    compared on segments that have ``horizon`` steps or end in a termination. After a termination
    the imagined reward goes on with the last action, weighted by the imagined probability to be
    still alive.

    A warning, and a note of the report, say so if the observations after the last steps of episodes
    seem to be lost: all zero or NaN, and only there.

    Neither the buffer nor the predictor is changed. The predictor predicts in evaluation mode and
    then returns to its previous mode. Torch's generators are restored as well, so the same call
    gives the same report, and training goes on as if there had been no report.

    Args:
        predictor: the predictor to measure; it may be in the middle of its training.
        buffer: held-out episodes, in a buffer that ``RewardPredictor.learn`` accepts, with a
            storage of one or two dims, full or not. It is read through its transforms. Its entries
            have the names that the predictor reads; reward and termination may be missing.
        horizon: number of steps of a segment; it may exceed the length of every episode.
        n_segments: largest number of segments.
        n_transitions: largest number of single steps.
        num_particles: least number of particles per segment, rounded up to a multiple of the number
            of members. The intervals of imagined steps are unbiased for a model that is right; with
            few particles they make an overconfident model look better than it is.
        seed: seed for the choice of steps and for the particles.

    Returns:
        A :class:`ModelReport`.

    Raises:
        TypeError: if ``buffer`` is not a replay buffer that can be learned from, or a number is not
            an integer.
        ValueError: if the buffer is empty or holds only padding, or a number is below 1.
        KeyError: if the buffer lacks the observation, the action or the next observation, or has
            no entry that tells where an episode ends.

    Example:
        >>> from torchrl.data import LazyTensorStorage
        >>> from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble
        >>> from layeredrl_trl.predictors import StaticPredictor
        >>> model = ProbabilisticEnsemble(2, 0, 1, n_models=3)
        >>> predictor = StaticPredictor(model, None, None, IdentityEncoder(2), 2, 0)
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(60))
        >>> path, done = torch.randn(61, 2).cumsum(0), torch.arange(60).eq(59).unsqueeze(-1)
        >>> steps = {"observation": path[:-1], "action": torch.randn(60, 1)}
        >>> steps["next"] = {"observation": path[1:], "done": done}
        >>> _ = buffer.extend(TensorDict(steps, batch_size=[60]))
        >>> report = model_report(predictor, buffer, horizon=5)
        >>> report.metrics["open_loop", "error"].shape
        torch.Size([5])
    """
    check_counts(horizon=horizon, n_segments=n_segments)
    check_counts(n_transitions=n_transitions, num_particles=num_particles)
    check_buffer(buffer)
    missing: dict[str, str] = {}
    with _undisturbed(predictor, seed):
        data = read_held_out(predictor, buffer, horizon, n_segments, n_transitions)
        one_step, dims = measure_one_step(predictor, data.transitions, missing)
        open_loop = measure_open_loop(predictor, data, dims, num_particles, missing)
    metrics = TensorDict({**one_step, "dims": dims._asdict()}).update(open_loop)
    notes = _notes(dims, len(data.transitions), data.segments.shape, predictor.model.n_models)
    if suspicion := suspect_lost_observations(data.transitions):
        # who only logs scalars reads no notes
        warnings.warn(f"model_report: {suspicion}", UserWarning, stacklevel=3)
        notes = (*notes, f"**Suspicious data:** {suspicion}")
    return ModelReport(metrics.cpu(), missing, notes)


@contextmanager
def _undisturbed(predictor: Predictor, seed: int) -> Iterator[None]:
    """Seed torch's generators and enter evaluation mode; restore both at the end."""
    device = predictor.device
    cuda = device.type == "cuda"
    with in_mode(predictor, False), torch.random.fork_rng(devices=[device] if cuda else []):
        # torch.manual_seed would also seed devices whose generators are not restored.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _notes(dims: Dims, n_transitions: int, segments: torch.Size, n_models: int) -> tuple[str, ...]:
    members = "1 member" if n_models == 1 else f"{n_models} members"
    notes = [
        f"{n_transitions} transitions, {segments[0]} segments of {segments[1]} steps; {members}. "
        "On data that was learned from, every number here is too good."
    ]
    few_values = dims.n_values <= min(_FEW_VALUES, n_transitions // _FEW_VALUES)
    for mask, text in (
        (~dims.varies, "never varied: left out everywhere"),
        (
            dims.varies & ~dims.moves,
            "never changed within an episode: left out of likelihood, intervals and spread",
        ),
        (
            dims.moves & few_values,
            f"took at most {_FEW_VALUES} values: where a dim is discrete, likelihood and intervals "
            "mean little",
        ),
    ):
        if found := mask.nonzero().flatten().tolist():
            plural = "s" if len(found) > 1 else ""
            notes.append(f"Latent dim{plural} {', '.join(map(str, found))} {text}.")
    return tuple(notes)
