"""Sort the particles of many envs by ensemble member, so that each is one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from layeredrl_trl.acceleration.host_reads import can_read

_LEAST_ROWS = 64
"""Minimum rows of a block."""

_LEAST_SAVED_ROWS = 2**14
"""Rows that blocks must save over sending all envs through all members; computed, not measured."""


class MemberGroups:
    """Put the particles of ``N`` envs into groups of one member each, and back.

    If every env has a row of particles for each member, there is one group for each member. If all
    particles of an env belong to one member, groups are padded to the largest one, so evenly spread
    envs cost no more than a single network. Reading this size from a GPU would synchronise: there
    envs go into one-member blocks of a fixed size or, if blocks save little, through all members.

    Args:
        n_envs: ``N``.
        n_particles: ``P``, of a row.
        n_models: ``E``.
        member: long ``[N, 1]``, the member of all particles of an env; ``None`` if each env has a
            row of particles for each member.

    Attributes:
        group_member: long ``[G]``, the member of each group; ``None`` for all members in order.
    """

    def __init__(
        self,
        n_envs: int,
        n_particles: int,
        n_models: int,
        member: Tensor | None = None,
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
            self._assign_slots(order, slot, n_models * most)
        elif (size := block_size(n_envs, n_particles, n_models)) is not None:
            self._form_blocks(member[:, 0], size)

    def _form_blocks(self, member: Tensor, size: int) -> None:
        """Fill blocks of ``size`` envs, each with envs of one member; some only partly."""
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
        self.group_member = group.clamp(max=self.n_models - 1)  # unused blocks
        self._assign_slots(order, slot, self._n_groups * size)

    def _assign_slots(self, order: Tensor, slot: Tensor, n_slots: int) -> None:
        self._slot = torch.empty_like(slot).index_copy_(0, order, slot)
        self._env = torch.zeros(n_slots, dtype=torch.long, device=slot.device)
        self._env.index_copy_(0, slot, order)  # padding repeats env 0

    def gather(self, x: Tensor) -> Tensor:
        """Order ``[..., N, E, P, K]`` (with ``member`` ``[..., N, 1, P, K]``) by group.

        Returns ``[..., G, R, K]``, for ``G`` groups of ``R`` particles.
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
    """Choose the number of envs in a block, for any distribution of envs over members.

    Padding adds at most a quarter, or blocks have the minimum of 64 rows. ``None`` if blocks save
    at most ``2**14`` rows: a GPU computes these faster than it sorts.
    """
    size = max(-(-n_envs // (4 * n_models)), -(-_LEAST_ROWS // n_particles))
    in_blocks = _most_blocks(n_envs, n_models, size) * size
    saved = (n_envs * n_models - in_blocks) * n_particles
    return size if saved > _LEAST_SAVED_ROWS else None


def _most_blocks(n_envs: int, n_models: int, size: int) -> int:
    """Return a number of blocks that is enough for any distribution of envs over members."""
    return (n_envs + min(n_envs, n_models) * (size - 1)) // size
