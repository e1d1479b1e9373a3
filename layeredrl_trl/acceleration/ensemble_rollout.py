"""Roll out a ``ProbabilisticEnsemble`` under given actions, faster than step by step.

All work that does not depend on the step is done once: particles stay sorted by member and in units
of the networks' inputs, output scales are multiplied into the last layer, the noise of all steps is
drawn first, and terminations, which move no particle, are evaluated last. The random numbers are
the same as step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from layeredrl_trl.acceleration.compiled import CompiledStep
from layeredrl_trl.acceleration.member_groups import MemberGroups
from layeredrl_trl.acceleration.pieces import run_layers, should_split
from layeredrl_trl.functional import (
    Draw,
    draw_each,
    gaussian_mixture_mean,
    mixture_noise_of_steps,
)

StepNoise = tuple[Tensor | None, Tensor | None]
"""Gumbel and normal noise of a step, see :func:`_step`."""


class FoldableEnsemble(Protocol):
    """The interface that :class:`EnsembleRollout` needs; see ``ProbabilisticEnsemble``."""

    n_models: int
    n_modes: int
    predict_delta: bool
    net: nn.Module
    termination_net: nn.Module
    input_moments: nn.Module
    target_moments: nn.Module
    target_scale: Tensor
    mode_start: Tensor
    log_std_bounds: Tensor

    def check_particles(self, latent: Tensor, context: Tensor, member: Tensor | None) -> None:
        """Raise a ValueError where a shape does not fit."""

    def split_output(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split outputs into Gaussians ``[..., 2, M, D]`` and logits of the modes ``[..., M]``."""
        ...

    def known_inputs(self, context: Tensor, action: Tensor, batch: torch.Size) -> Tensor:
        """Return the networks' inputs besides the latent state, ``[*batch, K]``."""
        ...


class EnsembleRollout:
    """Roll out particles, each moved by the member it belongs to.

    Construction prepares the layers; use one instance for several calls between which the model
    does not change (the rounds of a plan). Forward hooks of the networks are not called.

    Args:
        model: the ensemble.
        compile: run steps in compiled code when gradients are disabled.
    """

    def __init__(self, model: FoldableEnsemble, *, compile: bool = False) -> None:
        self.model = model
        self.compile = compile
        dim = model.target_scale.shape[0]
        self.centre, self.width = model.input_moments.mean, model.input_moments.divisor()
        unit = self.width[:dim]
        low, high = model.log_std_bounds.exp()
        shift, scale = model.target_moments.mean, model.target_scale / unit
        if not model.predict_delta:
            shift = shift - self.centre[:dim]
        self.std_low, self.std_high = scale * low, scale * high
        *hidden, last = model.net.layers
        (mean, log_std, *logit), (bias, log_std_bias, *logit_bias) = map(self._split_outputs, last)
        bias = scale * (bias + model.mode_start[0]) + shift / unit
        log_std_bias = log_std_bias + model.mode_start[1] - model.log_std_bounds[1]
        weight = torch.cat([scale * mean, log_std, *logit], -1).flatten(-2)
        bias = torch.cat([bias, log_std_bias, *logit_bias], -1).flatten(-2)
        self.layers = [*hidden, (weight, bias)]

    def __call__(
        self,
        latent: Tensor,
        context: Tensor,
        actions: Tensor,
        member: Tensor | None = None,
        *,
        deterministic: bool = False,
        terminations: bool = True,
        draw: Draw = draw_each,
    ) -> tuple[Tensor, Tensor | None]:
        """Move particles ``[N, E, P, D]`` (with ``member`` ``[N, 1, P, D]``) under actions.

        Args:
            latent: initial latent states.
            context: ``[N, C]``.
            actions: ``[N, H, A]``, or indices ``[N, H]``.
            member: of all particles of an env, long ``[N, 1]``.
            deterministic: move particles to the mean of their mixture instead of drawing.
            terminations: whether to return the logits of terminations.
            draw: draws numbers for ``N`` envs, see :class:`~layeredrl_trl.functional.CommonDraws`.

        Returns:
            latent states after each step ``[N, H, E, P, D]``, and termination logits
            ``[N, H, E, P, 1]``, or ``None``.
        """
        model, centre, width = self.model, self.centre, self.width
        model.check_particles(latent, context, member)
        n_envs, n_rows, n_particles, dim = latent.shape
        horizon = actions.shape[1]
        groups = MemberGroups(n_envs, n_particles, model.n_models, member)
        start = groups.gather((latent.to(centre.dtype) - centre[:dim]) / width[:dim])
        context = context.unsqueeze(1).expand(-1, horizon, -1)
        known = model.known_inputs(context, actions, actions.shape[:2])
        known = (known - centre[dim:]) / width[dim:]
        known = known.transpose(0, 1)[:, :, None, None]
        known = groups.gather(known.expand(-1, -1, n_rows, n_particles, -1))
        noise = [(None, None)] * horizon
        if not deterministic:
            noise = self._noise(start, groups, horizon, draw)
        inputs, after = self._move(start, known, groups, noise)
        after = torch.addcmul(centre[:dim], width[:dim], after)

        def by_env(x: Tensor) -> Tensor:
            return groups.scatter(x.flatten(2)).unflatten(-1, (horizon, -1)).movedim(-2, 1)

        if not terminations:
            return by_env(after), None
        logit = model.termination_net(inputs, groups.group_member)
        return by_env(after), by_env(logit.unflatten(1, (horizon, -1)).transpose(1, 2))

    def _move(
        self, latent: Tensor, known: Tensor, groups: MemberGroups, noise: list[StepNoise]
    ) -> tuple[Tensor, Tensor]:
        """Move particles ``[G, R, D]``, in units of the inputs, by ``known`` ``[H, G, R, K]``.

        Returns the inputs of all steps ``[G, H * R, D + K]``, and the latent states after each step
        ``[G, R, H, D]``.
        """
        model, layers, step = self.model, self.layers, _step
        if groups.group_member is not None:
            layers = [
                tuple(x.index_select(0, groups.group_member) for x in layer) for layer in layers
            ]
        first = torch.arange(latent.shape[:2].numel(), device=latent.device) * model.n_modes
        if self.compile and not should_split(latent):
            step = _COMPILED_STEP
            latent = latent.clone(memory_format=torch.contiguous_format)  # laid out as later ones
        constant = first, layers, model.net.activation, self.std_low, self.std_high
        constant = *constant, model.n_modes, model.predict_delta
        before = known.unbind(0)
        inputs, after = [torch.cat([latent, before[0]], -1)], []
        ahead = *before[1:], before[-1]  # the inputs after the last step are not used
        for following, own_noise in zip(ahead, noise, strict=True):
            latent, x = step(latent, inputs[-1], following, *own_noise, *constant)
            after.append(latent)
            inputs.append(x)
        return torch.cat(inputs[:-1], 1), torch.stack(after, 2)

    def _noise(
        self, latent: Tensor, groups: MemberGroups, horizon: int, draw: Draw
    ) -> list[StepNoise]:
        """Draw each step's Gumbel and normal noise in the order of envs, and sort it by group."""
        n_rows = groups.n_models if groups.member is None else 1
        shape = (groups.n_envs, n_rows, groups.n_particles, self.model.n_modes)
        like = {"dtype": latent.dtype, "device": latent.device, "draw": draw}
        gumbel, normal = (
            [None] * horizon if x is None else groups.gather(x).unbind(0)
            for x in mixture_noise_of_steps(horizon, shape, latent.shape[-1], **like)
        )
        return list(zip(gumbel, normal, strict=True))

    def _split_outputs(self, x: Tensor) -> list[Tensor]:
        """Split outputs: means, log stds ``[..., M, D]`` and, if M > 1, logits ``[..., M, 1]``."""
        gaussians, logits = self.model.split_output(x)
        mean, log_std = gaussians.unbind(-3)
        return [mean, log_std, logits.unsqueeze(-1)][: 3 if self.model.n_modes > 1 else 2]


def _step(
    latent: Tensor,
    inputs: Tensor,
    ahead: Tensor,
    gumbel: Tensor | None,
    normal: Tensor | None,
    first: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    activation: Callable[[Tensor], Tensor],
    std_low: Tensor,
    std_high: Tensor,
    n_modes: int,
    is_change: bool,
) -> tuple[Tensor, Tensor]:
    """Return latent states after a step ``[G, R, D]``, and inputs of the next ``[G, R, D + K]``.

    ``ahead`` ``[G, R, K]`` holds context and action of the next step. ``gumbel`` ``[G, R, M]``
    (``None`` for a single mode) draws modes, ``normal`` ``[G, R, D]`` (``None`` for the mean of the
    mixture) draws from them. ``first`` ``[G * R]`` is the index of each particle's first mode.
    """
    dim = latent.shape[-1]
    raw = run_layers(inputs, layers, activation)
    if n_modes > 1:
        raw = raw.unflatten(-1, (n_modes, 2 * dim + 1))
        raw = _draw_mode(raw, gumbel, first) if gumbel is not None else _mean_mode(raw)
    mean, width, *_ = raw.split_with_sizes([dim, dim, 1] if n_modes > 1 else [dim, dim], -1)
    latent = mean + latent if is_change else mean
    if normal is not None:
        std = torch.addcmul(std_low, std_high, width.sigmoid())
        latent = torch.addcmul(latent, std, normal)
    return latent, torch.cat([latent, ahead], -1)


def _mean_mode(modes: Tensor) -> Tensor:
    """Average the modes ``[E, R, M, 2 D + 1]`` by their weights; ``[E, R, 2 D + 1]``."""
    return gaussian_mixture_mean(modes, modes[..., -1].softmax(-1))


def _draw_mode(modes: Tensor, gumbel: Tensor, first: Tensor) -> Tensor:
    """Draw a mode of each of ``[E, R, M, 2 D + 1]`` by its weight; ``[E, R, 2 D + 1]``.

    Selecting rows, from ``first`` ``[E * R]`` on, is several times faster than ``gather`` on a CPU.
    """
    index = first + (modes[..., -1] + gumbel).argmax(-1).flatten()
    return modes.flatten(0, 2).index_select(0, index).unflatten(0, modes.shape[:2])


_COMPILED_STEP = CompiledStep(_step)
