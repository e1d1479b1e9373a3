"""Imagined steps on tensors: reward, next latent state, and probability of being alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from tensordict import unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from layeredrl_trl.acceleration import CompiledStep, check_values, promised
from layeredrl_trl.functional import (
    aleatoric_variance,
    epistemic_variance,
    gaussian_mixture_mean,
)
from layeredrl_trl.modules import DynamicsModel, ParticlePrediction, evaluate

Termination = Literal["soft", "sample"]
Rollout = Callable[..., tuple[Tensor, Tensor | None]]
Propagation = Literal["fixed_model", "random_model", "expectation"]


class ImaginedState(NamedTuple):
    """State of ``N`` imagined envs before a step.

    Attributes:
        latent: ``[N, E, P, D]``; with ``member`` ``[N, 1, P, D]``.
        context: ``[N, C]``.
        alive: probability that the particle has not terminated yet, ``[N, E, P, 1]``.
        member: of all particles of an env, long ``[N, 1]``; ``None`` if row ``e`` of the particles
            belongs to member ``e``.
    """

    latent: Tensor
    context: Tensor
    alive: Tensor
    member: Tensor | None = None

    def first(self, n: int, batch: torch.Size) -> ImaginedState:
        """Keep the first ``n`` along the last dim of ``batch``, a shape of ``N`` elements."""
        dim = len(batch) - 1
        kept = (
            None if x is None else x.unflatten(0, batch).narrow(dim, 0, n).flatten(0, dim)
            for x in self
        )
        return ImaginedState(*kept)


class ImaginedStep(NamedTuple):
    """The outcome of one imagined step.

    Attributes:
        latent: next latent states, ``[..., E, P, D]``.
        alive: probability that the particle has not terminated yet, ``[..., E, P, 1]``.
        term_prob: probability that this step terminates, ``[..., E, P, 1]``.
        terminated: bool ``[..., 1]``.
        member: of the next step, long ``[..., 1]``; ``None`` if each member has its own particles.
        epistemic_var, aleatoric_var: ``[..., D]``; ``None`` if not computed.
        particle_reward: ``[..., E, P, 1]``.
        reward: mean over particles of the prior ``alive`` times ``particle_reward``, ``[..., 1]``.
    """

    latent: Tensor
    alive: Tensor
    term_prob: Tensor
    terminated: Tensor
    member: Tensor | None = None
    epistemic_var: Tensor | None = None
    aleatoric_var: Tensor | None = None
    particle_reward: Tensor | None = None
    reward: Tensor | None = None


class Imagination(nn.Module):
    """Propagate particles through a dynamics model.

    Args:
        dynamics: the model.
        reward: reads the entries of ``dynamics`` (``latent``, ``context``, ``action``, under its
            ``in_keys``), or also ``("next", "latent")``; ``None`` for a reward of 0.
        termination: ``"soft"`` keeps every particle and multiplies ``alive`` by the probability to
            continue; ``"sample"`` draws terminations, so that ``alive`` is 0 or 1.
        propagation: which member moves a particle. ``"fixed_model"`` (TS-inf): always its own.
            ``"random_model"`` (TS-1): a new one each step; if each member has a row of particles,
            a random permutation, so that each moves equally many. ``"expectation"``: all members,
            to the mean of their means; particles coincide.
        uncertainty: also compute epistemic and aleatoric variance.
        termination_fn: replaces the predicted termination; reads the entries of ``reward`` and
            returns the probability that the step terminates, or bools, ``[..., 1]``.
        compile: run the steps of a rollout in compiled code when gradients are disabled.

    Raises:
        ValueError: for an unknown option.

    Reference:
        Chua et al. 2018, arXiv:1805.12114, section 5 (TS-1, TS-inf, E).
    """

    def __init__(
        self,
        dynamics: DynamicsModel,
        reward: TensorDictModuleBase | None,
        *,
        termination: Termination,
        propagation: Propagation,
        uncertainty: bool,
        termination_fn: TensorDictModuleBase | None = None,
        compile: bool = False,
    ) -> None:
        for name, value, options in (
            ("termination", termination, get_args(Termination)),
            ("propagation", propagation, get_args(Propagation)),
        ):
            if value not in options:
                raise ValueError(f"{name} must be one of {options}, got {value!r}.")
        super().__init__()
        self.dynamics = dynamics
        self.reward = reward
        self.termination = termination
        self.propagation = propagation
        self.uncertainty = uncertainty
        self.termination_fn = termination_fn
        self.compile = compile
        self._move_once = CompiledStep(Imagination._move) if compile else Imagination._move

    def step(self, state: ImaginedState, action: Tensor, *, deterministic: bool) -> ImaginedStep:
        """Imagine one step.

        Args:
            state: of ``N`` envs.
            action: ``[N, A]``, or indices ``[N]``.
            deterministic: move particles to the mean of their mixture instead of drawing.
        """
        after = self._move(state, action, deterministic)
        particle_reward = self._particle_reward(state.latent, state.context, action, after.latent)
        reward = _mean_over_particles(state.alive * particle_reward)
        return after._replace(particle_reward=particle_reward, reward=reward)

    def rollout(
        self,
        state: ImaginedState,
        actions: Tensor,
        *,
        deterministic: bool,
        rollout: Rollout | None = None,
    ) -> ImaginedStep:
        """Imagine ``H`` steps; the rewards of all steps are evaluated at once.

        Args:
            state: of ``N`` envs.
            actions: ``[N, H, A]``, or indices ``[N, H]``.
            deterministic: as in :meth:`step`.
            rollout: result of :meth:`fast_rollout`; ``None`` to call it here.

        Returns:
            An :class:`ImaginedStep` of entries ``[N, H, ...]``.
        """
        rollout = rollout or self.fast_rollout()
        if rollout is not None:
            after = self._move_by_own_member(state, actions, deterministic, rollout)
        else:
            after = self._move_step_by_step(state, actions, deterministic)
        n, horizon = actions.shape[:2]
        steps = _flat_steps(state, actions, after.latent)
        particle_reward = self._particle_reward(*steps, after.latent.flatten(0, 1))
        particle_reward = particle_reward.unflatten(0, (n, horizon))
        reward = _mean_over_particles(_before(state.alive, after.alive) * particle_reward)
        after = after._replace(particle_reward=particle_reward, reward=reward)
        if after.epistemic_var is None and self.uncertainty:
            member = state.member
            if member is not None:
                member = member.repeat_interleave(horizon, 0)
            _, beliefs = self._predict(*steps, member)
            epistemic, aleatoric = (x.unflatten(0, (n, horizon)) for x in _variances(beliefs))
            after = after._replace(epistemic_var=epistemic, aleatoric_var=aleatoric)
        return after

    def fast_rollout(self) -> Rollout | None:
        """Return the model's fast rollout, usable several times.

        ``None`` if it has none, and for options other than ``"fixed_model"`` and ``"soft"``.
        """
        if self.propagation != "fixed_model" or self.termination != "soft":
            return None
        promise = promised(self.dynamics, "fast_rollout")
        return None if promise is None else promise(compile=self.compile)

    def _move_by_own_member(
        self, state: ImaginedState, actions: Tensor, deterministic: bool, rollout: Rollout
    ) -> ImaginedStep:
        """Compute all but rewards and variances by the model's fast rollout."""
        latents, term_logit = rollout(
            state.latent,
            state.context,
            actions,
            state.member,
            deterministic=deterministic,
            terminations=self.termination_fn is None,
        )
        n, horizon = actions.shape[:2]
        if self.termination_fn is None:
            term_prob = term_logit.sigmoid()
        else:
            steps = _flat_steps(state, actions, latents)
            term_prob = self._given_termination(*steps, latents.flatten(0, 1))
            term_prob = term_prob.unflatten(0, (n, horizon))
        member = state.member
        return ImaginedStep(
            latent=latents,
            alive=state.alive.unsqueeze(1) * (1 - term_prob).cumprod(1),
            term_prob=term_prob,
            terminated=torch.zeros_like(term_prob[:, :, 0, 0], dtype=torch.bool),
            member=None if member is None else member.unsqueeze(1).expand(-1, horizon, -1),
        )

    def _move_step_by_step(
        self, state: ImaginedState, actions: Tensor, deterministic: bool
    ) -> ImaginedStep:
        steps = []
        for action in actions.unbind(1):
            after = self._move_once(self, state, action, deterministic)
            state = state._replace(latent=after.latent, alive=after.alive, member=after.member)
            steps.append(after)
        after = ImaginedStep(
            *(None if x[0] is None else torch.stack(x, 1) for x in zip(*steps, strict=True))
        )
        if self.termination_fn is not None:  # compiled steps do not check values
            check_values(
                ~after.term_prob.isnan(),
                lambda: ValueError("termination_fn: expected probabilities or bools, got others."),
            )
        return after

    def _move(self, state: ImaginedState, action: Tensor, deterministic: bool) -> ImaginedStep:
        """Compute everything of a step but its reward, on which no later step depends."""
        latent, context, alive, member = state
        moves, beliefs = self._predict(latent, context, action, member)
        if self.propagation == "expectation":
            mean = gaussian_mixture_mean(beliefs.mean, beliefs.log_weights.exp())
            next_latent = mean.mean(1, keepdim=True).expand_as(latent)
            term_prob = beliefs.term_logit.sigmoid().mean(1, keepdim=True).expand_as(alive)
        else:
            term_prob = moves.term_logit.sigmoid()
            next_latent = moves.next_latent(deterministic)
        if self.termination_fn is not None:
            term_prob = self._given_termination(latent, context, action, next_latent)
        if self.termination == "soft":
            next_alive = alive * (1 - term_prob)
            terminated = torch.zeros_like(term_prob[:, 0, 0], dtype=torch.bool)
        else:
            next_alive = alive * (torch.rand_like(term_prob) >= term_prob)
            terminated = next_alive.amax((1, 2)) == 0
        if member is not None and self.propagation == "random_model":
            member = torch.randint_like(member, self.dynamics.n_models)
        epistemic, aleatoric = _variances(beliefs) if self.uncertainty else (None, None)
        return ImaginedStep(
            latent=next_latent,
            alive=next_alive,
            term_prob=term_prob,
            terminated=terminated,
            member=member,
            epistemic_var=epistemic,
            aleatoric_var=aleatoric,
        )

    def _particle_reward(
        self, latent: Tensor, context: Tensor, action: Tensor, next_latent: Tensor
    ) -> Tensor:
        if self.reward is None:
            return torch.zeros_like(latent[..., :1])
        return self._evaluate(self.reward, latent, context, action, next_latent)

    def _given_termination(
        self, latent: Tensor, context: Tensor, action: Tensor, next_latent: Tensor
    ) -> Tensor:
        prob = self._evaluate(self.termination_fn, latent, context, action, next_latent)
        possible = (prob >= 0) & (prob <= 1)
        check_values(
            possible,
            lambda: ValueError(
                "termination_fn: expected probabilities or bools, got values from "
                f"{prob.min().item()} to {prob.max().item()}."
            ),
        )
        return torch.where(possible, prob, torch.nan)

    def _evaluate(
        self,
        module: TensorDictModuleBase,
        latent: Tensor,
        context: Tensor,
        action: Tensor,
        next_latent: Tensor,
    ) -> Tensor:
        """Evaluate a module for every particle ``[N, E, P, D]``; ``[N, E, P, 1]``."""
        names = self.dynamics.in_keys
        context, action = (
            x[:, None, None].expand(*latent.shape[:3], *x.shape[1:]) for x in (context, action)
        )
        entries = dict(zip(names, (latent, context, action), strict=True))
        entries[unravel_key(("next", names[0]))] = next_latent
        return evaluate(module, entries).to(latent.dtype)

    def _predict(
        self, latent: Tensor, context: Tensor, action: Tensor, member: Tensor | None
    ) -> tuple[ParticlePrediction, ParticlePrediction]:
        """Predict particles by the member that moves each, and by all members (for variances)."""
        model = self.dynamics
        if member is not None:
            if not self.uncertainty and self.propagation != "expectation":
                moves = model.particles(latent, context, action, member)
                return moves, moves
            everyone = latent.expand(-1, model.n_models, -1, -1)
            beliefs = model.particles(everyone, context, action)
            env = torch.arange(latent.shape[0], device=latent.device)[:, None]
            return ParticlePrediction(*(x[env, member] for x in beliefs)), beliefs
        if self.propagation != "random_model":
            beliefs = model.particles(latent, context, action)
            return beliefs, beliefs
        order = torch.rand(latent.shape[:3], device=latent.device).flatten(1).argsort(1)
        beliefs = model.particles(_permute(latent, order), context, action)
        back = order.argsort(1)
        return ParticlePrediction(*(_permute(x, back) for x in beliefs)), beliefs


def _before(first: Tensor, after: Tensor) -> Tensor:
    """Turn states after each step ``[N, H, ...]`` into states before it."""
    return torch.cat([first.unsqueeze(1), after[:, :-1]], 1)


def _flat_steps(
    state: ImaginedState, actions: Tensor, latents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Flatten a rollout to ``N * H`` steps; returns each one's prior latent, context and action."""
    horizon = actions.shape[1]
    return (
        _before(state.latent, latents).flatten(0, 1),
        state.context.unsqueeze(1).expand(-1, horizon, -1).flatten(0, 1),
        actions.flatten(0, 1),
    )


def _mean_over_particles(x: Tensor) -> Tensor:
    """Mean of ``[..., E, P, 1]``; ``[..., 1]``."""
    return x.mean((-3, -2))


def _permute(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the particles of ``x`` ``[N, E, P, ...]`` by ``order`` ``[N, E * P]``."""
    env = torch.arange(x.shape[0], device=x.device)[:, None]
    return x.flatten(1, 2)[env, order].unflatten(1, x.shape[1:3])


def _variances(beliefs: ParticlePrediction) -> tuple[Tensor, Tensor]:
    """Epistemic and aleatoric variance ``[N, D]`` of predictions for ``[N, E, P]`` particles.

    A member predicts the even mixture of the ``P * M`` components of its particles.
    """
    mean, std, log_weights, _ = beliefs
    mean, std = mean.flatten(2, 3), std.flatten(2, 3)
    weights = log_weights.exp().flatten(2) / log_weights.shape[2]
    return epistemic_variance(mean, weights), aleatoric_variance(mean, std, weights)
