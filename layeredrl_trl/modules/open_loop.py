"""Rolling an ensemble out under given actions: whatever does not depend on the step is done once.

A step of the loop holds only what the next one waits for. Particles stay in the order of their
members and in units of the networks' inputs from the first step to the last; scales are folded into
the last layer; terminations, which move no particle, are evaluated for all steps together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layeredrl_trl.functional import (
    can_read,
    gaussian_mixture_mean,
    mixture_noise_of_steps,
)
from layeredrl_trl.modules.generating import generated, is_generating
from layeredrl_trl.modules.mlp import in_place, layers_of, pays_in_pieces, run_layers

_LEAST_ROWS = 64
"""Of a block."""

_LEAST_SAVED_ROWS = 2**14
"""That blocks must save over all members for all envs; by arithmetic, not measured on a GPU."""


class MemberRows:
    """Particles of ``N`` envs in groups, each moved by one member.

    With a row of particles for each member in every env there is a group for each member. Envs of
    one member each are padded to the most that any member has, so that evenly spread ones cost what
    one network would. That number is data, which a GPU would stall for: there they go into blocks
    of a fixed size, of one member each, whatever the shares of the members are; or, where that
    saves little, through all members.

    Args:
        n_envs: ``N``.
        n_particles: ``P``, of a row.
        n_models: ``E``.
        member: long ``[N, 1]``, the member of all particles of an env; ``None`` if each env has a
            row of particles for each member.
        in_blocks: whether the networks can be asked for blocks, see :attr:`group_member`.

    Attributes:
        group_member: long ``[G]``, the member that moves each group; ``None`` if these are the
            members one after the other.
    """

    def __init__(
        self,
        n_envs: int,
        n_particles: int,
        n_models: int,
        member: Tensor | None = None,
        *,
        in_blocks: bool = True,
    ) -> None:
        self.n_envs, self.n_particles, self.n_models = n_envs, n_particles, n_models
        self.member = member
        self.group_member: Tensor | None = None
        self._n_groups = n_models
        self._slot = None
        if member is None:
            return
        if can_read(member):
            ordered, order = member[:, 0].sort(stable=True)
            counts = ordered.bincount(minlength=n_models)
            most = int(counts.max())
            padding = most - counts
            before = padding.cumsum(0) - padding
            slot = torch.arange(n_envs) + before.index_select(0, ordered)
            self._place(order, slot, n_models * most)
        elif in_blocks and (size := block_size(n_envs, n_particles, n_models)):
            self._form_blocks(member[:, 0], size)

    def _form_blocks(self, member: Tensor, size: int) -> None:
        """Fill blocks of ``size`` envs with those of one member; the last of each may have room."""
        self._n_groups = _most_blocks(self.n_envs, self.n_models, size)
        ordered, order = member.sort(stable=True)
        each = torch.arange(self.n_models, device=member.device)
        begin = torch.searchsorted(ordered, each)
        end = torch.searchsorted(ordered, each, right=True)
        blocks = (end - begin + size - 1) // size
        last = blocks.cumsum(0)
        before = (last - blocks) * size - begin
        slot = torch.arange(self.n_envs, device=member.device) + before.index_select(0, ordered)
        group = torch.arange(self._n_groups, device=member.device)
        group = torch.searchsorted(last, group, right=True)
        self.group_member = group.clamp(max=self.n_models - 1)  # blocks that nobody needs
        self._place(order, slot, self._n_groups * size)

    def _place(self, order: Tensor, slot: Tensor, n_slots: int) -> None:
        self._slot = torch.empty_like(slot).index_copy_(0, order, slot)
        self._env = torch.zeros(n_slots, dtype=torch.long, device=slot.device)
        self._env.index_copy_(0, slot, order)  # padding repeats env 0

    def gather(self, x: Tensor) -> Tensor:
        """Order ``[..., N, E, P, K]`` (with ``member`` ``[..., N, 1, P, K]``) by group.

        Returns:
            ``[..., G, R, K]``.
        """
        lead = x.shape[:-4]
        if self._slot is not None:
            x = x.squeeze(-3).index_select(-3, self._env)
        else:
            x = x.expand(*lead, -1, self.n_models, -1, -1).transpose(-4, -3)
        return x.reshape(*lead, self._n_groups, -1, x.shape[-1])

    def scatter(self, x: Tensor) -> Tensor:
        """Undo :meth:`gather`."""
        if self._slot is not None:
            x = x.reshape(-1, self.n_particles, x.shape[-1]).index_select(0, self._slot)
            return x.unsqueeze(1)
        x = x.unflatten(1, (self.n_envs, self.n_particles)).transpose(0, 1)
        if self.member is None:
            return x
        env = torch.arange(self.n_envs, device=x.device)
        return x[env, self.member[:, 0]].unsqueeze(1)


def block_size(n_envs: int, n_particles: int, n_models: int) -> int | None:
    """Say how many envs make a block, where members may have any share of them.

    So few that room in blocks adds no more than a quarter, but enough rows for a matrix product;
    ``None`` where all members can have all envs for no more than ``2**14`` rows on top of that,
    which a GPU is through with sooner than with sorting.

    Args:
        n_envs: ``N``.
        n_particles: ``P``, of an env.
        n_models: ``E``.
    """
    size = max(-(-n_envs // (4 * n_models)), -(-_LEAST_ROWS // n_particles))
    in_blocks = _most_blocks(n_envs, n_models, size) * size
    saved = (n_envs * n_models - in_blocks) * n_particles
    return size if saved > _LEAST_SAVED_ROWS else None


def _most_blocks(n_envs: int, n_models: int, size: int) -> int:
    """Blocks that are enough, whatever the shares of the members are."""
    return (n_envs + min(n_envs, n_models) * (size - 1)) // size


@dataclass(frozen=True)
class OpenLoop:
    """Networks that move particles in the units of their own inputs.

    Attributes:
        layers: weights ``[E, in, out]`` and biases ``[E, 1, out]``; the last gives mean and width
            of a mode and its logit, ``M (2 D + 1)`` numbers, or ``2 D`` if ``M`` is 1.
        activation: between them.
        centre: what inputs are shifted by, ``[D + K]``.
        width: what they are then divided by, ``[D + K]``.
        std_low: least standard deviation, broadcast to ``[..., D]``.
        std_high: what a sigmoid of the network's output adds to it at most, likewise.
        n_modes: ``M``.
        is_change: whether the networks predict the change of the latent state.
    """

    layers: list[tuple[Tensor, Tensor]]
    activation: nn.Module
    centre: Tensor
    width: Tensor
    std_low: Tensor
    std_high: Tensor
    n_modes: int
    is_change: bool

    def run(
        self, latent: Tensor, others: Tensor, rows: MemberRows, *, deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        """Move particles ``[G, R, D]`` through ``H`` steps.

        Args:
            latent: in units of the inputs, ``[G, R, D]``, in groups of one member each.
            others: context and actions as inputs, ``[H, G, R, K]``.
            rows: their order; noise is drawn in that of the envs, as single steps draw it.
            deterministic: move them to the mean of their mixture instead of drawing.

        Returns:
            inputs of all steps ``[G, H * R, D + K]``, and the latent states after them
            ``[G, R, H, D]``.
        """
        horizon = len(others)
        layers = layers_of(self.layers, rows.group_member)
        noise = [(None, None)] * horizon if deterministic else self._noise(latent, rows, horizon)
        first = torch.arange(latent.shape[:2].numel(), device=latent.device) * self.n_modes
        step, activation = _step, in_place(self.activation)
        if is_generating() and not pays_in_pieces(latent):
            step, activation = generated(_step), self.activation
            latent = latent.clone(memory_format=torch.contiguous_format)  # laid out as later ones
        constant = first, layers, activation, self.std_low, self.std_high, self.n_modes
        before = others.unbind(0)
        inputs, after = [torch.cat([latent, before[0]], -1)], []
        ahead = *before[1:], before[-1]  # behind the last step: any
        for other, own in zip(ahead, noise, strict=True):
            given = latent, inputs[-1], other, *own, *constant, self.is_change
            latent, following = step(*given)
            after.append(latent)
            inputs.append(following)
        return torch.cat(inputs[:-1], 1), torch.stack(after, 2)

    def _noise(
        self, latent: Tensor, rows: MemberRows, horizon: int
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Gumbel and normal noise of each step, in the order of the rows."""
        n_rows = rows.n_models if rows.member is None else 1
        shape = (rows.n_envs, n_rows, rows.n_particles, self.n_modes)
        like = {"dtype": latent.dtype, "device": latent.device}
        gumbel, normal = (
            [None] * horizon if x is None else rows.gather(x).unbind(0)
            for x in mixture_noise_of_steps(horizon, shape, latent.shape[-1], **like)
        )
        return list(zip(gumbel, normal, strict=True))


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
    """Latent states after a step ``[G, R, D]``, and inputs of the next ``[G, R, D + K]``.

    Args:
        latent: before the step, ``[G, R, D]``.
        inputs: of this step, ``[G, R, D + K]``.
        ahead: context and action of the next step, ``[G, R, K]``.
        gumbel: noise to draw a mode by, ``[G, R, M]``; ``None`` where there is but one.
        normal: noise to draw from it by, ``[G, R, D]``; ``None`` for the mean of the mixture.
        first: where the modes of each particle begin, ``[G * R]``.
        layers: of each group.
        activation: between them.
        std_low: least standard deviation.
        std_high: what is added to it at most.
        n_modes: ``M``.
        is_change: whether the networks predict the change of the latent state.
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

    ``first`` says where the modes of each begin, ``[E * R]``: on a CPU to select is several times
    faster than to gather.
    """
    index = first + (modes[..., -1] + gumbel).argmax(-1).flatten()
    return modes.flatten(0, 2).index_select(0, index).unflatten(0, modes.shape[:2])
