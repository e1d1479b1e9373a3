"""Imagined steps on tensors: reward, next latent state, and probability of being alive."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from tensordict import unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from layeredrl_trl.acceleration import CompiledStep, check_values, promised
from layeredrl_trl.checks import check_flag
from layeredrl_trl.envs.imagined_step import Chances, ImaginedState, ImaginedStep
from layeredrl_trl.envs.in_place import StaysInPlace
from layeredrl_trl.functional import (
    Draw,
    aleatoric_variance,
    draw_each,
    epistemic_variance,
    gaussian_mixture_mean,
    mixture_noise,
    survival,
    zero_if_dead,
)
from layeredrl_trl.modules import DynamicsModel, ParticlePrediction, evaluate

Termination = Literal["soft", "sample"]
Rollout = Callable[..., tuple[Tensor, Tensor | None]]
Propagation = Literal["fixed_model", "random_model", "expectation"]


class Imagination(StaysInPlace):
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
            to the mean of their means. There the rows of particles, one for each member, are taken
            to coincide, as they do from a real observation on: particle ``p`` of every row moves to
            the mean over members of what each predicts for particle ``p`` of its own row. With
            ``member``, every particle moves by what all members predict for its own state.
        uncertainty: also compute epistemic and aleatoric variance: of the predictions of all
            members for the state of every particle, averaged over particles. That takes the network
            evaluations of a step times the number of rows of particles, or with ``member`` times
            the number of members. What is not finite of a dead particle counts as 0.
        termination_fn: replaces the predicted termination; reads the entries of ``reward`` and
            returns the probability that the step terminates, or bools, ``[..., 1]``.
        compile: run the steps of a rollout in compiled code when gradients are disabled.

    Raises:
        ValueError: for an unknown option.
        TypeError: if ``uncertainty`` or ``compile`` is no bool.

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
        check_flag("uncertainty", uncertainty)
        check_flag("compile", compile)
        super().__init__()
        self.dynamics = dynamics
        self.reward = reward
        self.termination = termination
        self.propagation = propagation
        self.uncertainty = uncertainty
        self.termination_fn = termination_fn
        self.compile = compile
        self._move_once = CompiledStep(Imagination._move) if compile else Imagination._move

    def step(
        self,
        state: ImaginedState,
        action: Tensor,
        *,
        deterministic: bool,
        draw: Draw = draw_each,
    ) -> ImaginedStep:
        """Imagine one step.

        Args:
            state: of ``N`` envs.
            action: ``[N, A]``, or indices ``[N]``.
            deterministic: move particles to the mean of their mixture instead of drawing.
            draw: draws random numbers ``[N, ...]``; a
                :class:`~layeredrl_trl.functional.CommonDraws` lets envs share them.

        Raises:
            ValueError: if a shape does not fit.
        """
        chances = self._draw(state, deterministic, draw)
        after = self._move(state, action, chances, deterministic, self.uncertainty)
        particle_reward = self._particle_reward(state.latent, state.context, action, after.latent)
        reward = _mean_over_particles(state.alive, particle_reward)
        return after._replace(particle_reward=particle_reward, reward=reward)

    def rollout(
        self,
        state: ImaginedState,
        actions: Tensor,
        *,
        deterministic: bool,
        rollout: Rollout | None = None,
        draw: Draw = draw_each,
        uncertainty: bool | None = None,
    ) -> ImaginedStep:
        """Imagine ``H`` steps; the rewards of all steps are evaluated at once.

        Args:
            state: of ``N`` envs.
            actions: ``[N, H, A]``, or indices ``[N, H]``.
            deterministic: as in :meth:`step`.
            rollout: result of :meth:`fast_rollout`; ``None`` to call it here.
            draw: as in :meth:`step`.
            uncertainty: whether to compute variances; ``None``: as at construction.

        Returns:
            An :class:`ImaginedStep` of entries ``[N, H, ...]``.

        Raises:
            ValueError: as in :meth:`step`.
        """
        how = deterministic, self.uncertainty if uncertainty is None else uncertainty, draw
        rollout = rollout or self.fast_rollout()
        if rollout is not None and _knows_draws(rollout, deterministic, draw):
            after = self._move_by_own_member(state, actions, rollout, *how)
        else:
            after = self._move_step_by_step(state, actions, *how)
        n, horizon = actions.shape[:2]
        steps = _flat_steps(state, actions, after.latent)
        particle_reward = self._particle_reward(*steps, after.latent.flatten(0, 1))
        particle_reward = particle_reward.unflatten(0, (n, horizon))
        reward = _mean_over_particles(_before(state.alive, after.alive), particle_reward)
        return after._replace(particle_reward=particle_reward, reward=reward)

    def fast_rollout(self) -> Rollout | None:
        """Return the model's fast rollout, usable several times.

        ``None`` if it has none, and for options other than ``"fixed_model"`` and ``"soft"``. One
        that takes no ``draw`` is not used where envs share random numbers.
        """
        if self.propagation != "fixed_model" or self.termination != "soft":
            return None
        promise = promised(self.dynamics, "fast_rollout")
        return None if promise is None else promise(compile=self.compile)

    def _move_by_own_member(
        self,
        state: ImaginedState,
        actions: Tensor,
        rollout: Rollout,
        deterministic: bool,
        uncertainty: bool,
        draw: Draw,
    ) -> ImaginedStep:
        """Compute all but rewards by the model's fast rollout."""
        n, horizon = actions.shape[:2]
        options = {"draw": draw} if _are_shared(deterministic, draw) else {}
        latents, term_logit = rollout(
            state.latent,
            state.context,
            actions,
            state.member,
            deterministic=deterministic,
            terminations=self.termination_fn is None,
            **options,
        )
        latents = _checked("latent states", latents, (n, horizon, *state.latent.shape[1:]))
        if self.termination_fn is None:
            term_logit = _checked("termination logits", term_logit, (*latents.shape[:-1], 1))
            term_prob = term_logit.sigmoid()
        else:
            steps = _flat_steps(state, actions, latents)
            term_prob = self._given_termination(*steps, latents.flatten(0, 1))
            term_prob = term_prob.unflatten(0, (n, horizon))
        member = state.member
        after = ImaginedStep(
            latent=latents,
            alive=survival(state.alive, term_prob),
            term_prob=term_prob,
            terminated=torch.zeros_like(term_prob[:, :, 0, 0], dtype=torch.bool),
            member=None if member is None else member.unsqueeze(1).expand(-1, horizon, -1),
        )
        if not uncertainty:
            return after
        befores = _before(state.latent, latents), _before(state.alive, after.alive), actions
        variances = [  # one step after the other, to spare memory
            _variances(self._predict_by_all(latent, state.context, action), alive)
            for latent, alive, action in zip(*(x.unbind(1) for x in befores), strict=True)
        ]
        epistemic, aleatoric = (torch.stack(x, 1) for x in zip(*variances, strict=True))
        return after._replace(epistemic_var=epistemic, aleatoric_var=aleatoric)

    def _move_step_by_step(
        self,
        state: ImaginedState,
        actions: Tensor,
        deterministic: bool,
        uncertainty: bool,
        draw: Draw,
    ) -> ImaginedStep:
        steps = []
        for action in actions.unbind(1):
            chances = self._draw(state, deterministic, draw)
            after = self._move_once(self, state, action, chances, deterministic, uncertainty)
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

    def _draw(self, state: ImaginedState, deterministic: bool, draw: Draw) -> Chances:
        """Draw the random numbers of a step, outside of what may be compiled."""
        latent, member, model = state.latent, state.member, self.dynamics
        device, shape = latent.device, latent.shape[:-1]
        noise = order = ends = following = None
        uniform = partial(torch.rand, dtype=torch.float32, device=device)
        if member is None and self.propagation == "random_model":
            order = draw(uniform, shape).flatten(1).argsort(1)
        if not deterministic and self.propagation != "expectation":
            like = {"dtype": state.alive.dtype, "device": device, "draw": draw}
            noise = mixture_noise((*shape, model.n_modes), model.latent_state_dim, **like)
        if self.termination == "sample":
            ends = draw(uniform, (*shape, 1))
        if member is not None and self.propagation == "random_model":
            following = draw(partial(torch.randint, model.n_models, device=device), member.shape)
            if draw is not draw_each:
                # all move on by the same number, and so stay spread over members: a step of envs
                # of one member costs as much as that of all members
                following = (member + following) % model.n_models
        return Chances(noise, order, ends, following)

    def _move(
        self,
        state: ImaginedState,
        action: Tensor,
        chances: Chances,
        deterministic: bool,
        uncertainty: bool,
    ) -> ImaginedStep:
        """Compute everything of a step but its reward, on which no later step depends."""
        latent, context, alive, member = state
        moves, beliefs = self._predict(state, action, chances.order, uncertainty)
        if self.propagation == "expectation":
            mean = gaussian_mixture_mean(moves.mean, moves.log_weights.exp())
            next_latent = mean.mean(1, keepdim=True).expand_as(latent)
            term_prob = moves.term_logit.sigmoid().mean(1, keepdim=True).expand_as(alive)
        else:
            term_prob = moves.term_logit.sigmoid()
            next_latent = moves.next_latent(deterministic, chances.noise)
        if self.termination_fn is not None:
            term_prob = self._given_termination(latent, context, action, next_latent)
        if chances.ends is None:
            next_alive = alive * (1 - zero_if_dead(alive, term_prob))
            terminated = torch.zeros_like(term_prob[:, 0, 0], dtype=torch.bool)
        else:
            next_alive = alive * (chances.ends >= term_prob)
            terminated = next_alive.amax((1, 2)) == 0
        member = member if chances.member is None else chances.member
        epistemic, aleatoric = (None, None) if beliefs is None else _variances(beliefs, alive)
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
        self, state: ImaginedState, action: Tensor, order: Tensor | None, uncertainty: bool
    ) -> tuple[ParticlePrediction, ParticlePrediction | None]:
        """Predict by the members that move each particle and, for variances, by all members.

        The former is ``[N, R, P, ...]`` for ``R`` rows of particles, the row being the member that
        predicts; with ``"expectation"`` it is ``[N, E, P, ...]``. The latter is that of
        :meth:`_predict_by_all`, or ``None`` without ``uncertainty``.
        """
        latent, context, _, member = state
        rows, particles = latent.shape[1:3]
        model, everyone = self.dynamics, None
        if uncertainty:
            everyone = self._predict_by_all(latent, context, action)
        if member is not None and self.propagation == "expectation":
            if everyone is None:
                everyone = self._predict_by_all(latent, context, action)
            return everyone, everyone if uncertainty else None
        if member is not None:
            if everyone is None:
                return model.particles(latent, context, action, member), None
            return _of_movers(everyone, member.expand(-1, particles), rows), everyone
        if order is None:
            if everyone is None:
                return model.particles(latent, context, action), None
            mover = torch.arange(rows, device=latent.device).repeat_interleave(particles)
            return _of_movers(everyone, mover.expand(len(latent), -1), rows), everyone
        back = order.argsort(1)
        if everyone is not None:
            return _of_movers(everyone, back // particles, rows), everyone
        moves = model.particles(_permute(latent, order), context, action)
        return ParticlePrediction(*(_permute(x, back) for x in moves)), None

    def _predict_by_all(
        self, latent: Tensor, context: Tensor, action: Tensor
    ) -> ParticlePrediction:
        """Let all members predict each particle of ``[N, R, P, D]``; ``[N, E, R * P, ...]``."""
        states = latent.flatten(1, 2).unsqueeze(1).expand(-1, self.dynamics.n_models, -1, -1)
        return self.dynamics.particles(states, context, action)


def _checked(what: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if x.shape != shape:
        raise ValueError(f"fast_rollout: expected {what} {[*shape]}, got {list(x.shape)}.")
    return x.to(torch.float32)


def _are_shared(deterministic: bool, draw: Draw) -> bool:
    return draw is not draw_each and not deterministic


def _knows_draws(rollout: Rollout, deterministic: bool, draw: Draw) -> bool:
    """Return whether a fast rollout can draw as asked: a user's may not know of shared numbers."""
    if not _are_shared(deterministic, draw):
        return True
    parameters = inspect.signature(rollout).parameters
    return "draw" in parameters or any(x.kind is x.VAR_KEYWORD for x in parameters.values())


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


def _mean_over_particles(alive: Tensor, x: Tensor) -> Tensor:
    """Mean of ``alive * x``, both ``[..., E, P, 1]``, where dead particles add 0; ``[..., 1]``."""
    return (alive * zero_if_dead(alive, x)).mean((-3, -2))


def _permute(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the particles of ``x`` ``[N, E, P, ...]`` by ``order`` ``[N, E * P]``."""
    env = torch.arange(x.shape[0], device=x.device)[:, None]
    return x.flatten(1, 2)[env, order].unflatten(1, x.shape[1:3])


def _of_movers(everyone: ParticlePrediction, mover: Tensor, rows: int) -> ParticlePrediction:
    """Take the member ``mover`` ``[N, R * P]`` of each particle from predictions ``[N, E, R * P]``.

    Returns predictions ``[N, R, P]``.
    """
    env = torch.arange(mover.shape[0], device=mover.device)[:, None]
    particle = torch.arange(mover.shape[1], device=mover.device)
    return ParticlePrediction(*(x[env, mover, particle].unflatten(1, (rows, -1)) for x in everyone))


def _variances(everyone: ParticlePrediction, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Epistemic and aleatoric variance ``[N, D]``, means over the particles.

    ``everyone`` is the prediction of all members for each particle, ``[N, E, R * P, ...]``, and
    ``alive`` is from before the step, ``[N, R, P, 1]``.
    """
    mean, std, log_weights, _ = (x.transpose(1, 2) for x in everyone)
    weights, alive = log_weights.exp(), alive.flatten(1, 2)
    epistemic = zero_if_dead(alive, epistemic_variance(mean, weights))
    aleatoric = zero_if_dead(alive, aleatoric_variance(mean, std, weights))
    return epistemic.mean(1), aleatoric.mean(1)
