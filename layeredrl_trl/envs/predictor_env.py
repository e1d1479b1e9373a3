"""The learned model as a TorchRL environment."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.envs.model_based import ModelBasedEnvBase
from torchrl.envs.utils import ExplorationType, exploration_type

from layeredrl_trl import keys
from layeredrl_trl.acceleration import GraphReplay
from layeredrl_trl.checks import check_flag
from layeredrl_trl.envs.common_random_numbers import CommonRandomNumbers
from layeredrl_trl.envs.decoding import decode_first_particle
from layeredrl_trl.envs.imagination import Imagination, Propagation, Rollout, Termination
from layeredrl_trl.envs.imagined_specs import (
    Entry,
    check_actions,
    check_options,
    check_sizes,
    entries_of,
    imagined_specs,
    particle_layout,
    read_entries,
)
from layeredrl_trl.envs.imagined_step import ImaginedState, ImaginedStep
from layeredrl_trl.envs.initial_state import (
    InitialState,
    blank_state,
    draw_start,
    spread_members,
    warn_of_blind_start,
)
from layeredrl_trl.envs.rollout_layout import as_rollout
from layeredrl_trl.functional import draw_each
from layeredrl_trl.modules import (
    DynamicsModel,
    Encoder,
    as_reward_module,
    as_termination_module,
    check_heads,
)
from layeredrl_trl.signatures import OwnSignature

_DETERMINISTIC = (ExplorationType.DETERMINISTIC, ExplorationType.MEAN, ExplorationType.MODE)
_VARIANCES = {keys.EPISTEMIC_VAR, keys.ALEATORIC_VAR}


class PredictorEnv(CommonRandomNumbers, ModelBasedEnvBase):
    """Imagine with a learned model: a TorchRL environment over latent states.

    Each env carries ``E x P`` particles. One step from ``(latent, context, alive, action)`` gives
    each particle the reward of its *current* latent state, draws its next latent state from its
    member's mixture, and multiplies ``alive`` by the probability that it did not terminate. The
    reward is the mean over particles of ``alive * particle_reward``.

    It takes TensorDicts of any leading batch shape, on the device of the model. Names of
    observation, latent state and context are those of ``encoder``, of the action of ``dynamics``.

    A ``Collector`` runs it in batches under TorchRL's ``BatchSizeTransform(batch_size=[N])``. To
    train a policy or critic that reads ``observation`` (Dyna, MBPO), use
    ``num_particles=1, propagation="random_model", termination="sample"``: with ``"soft"`` it would
    bootstrap past the end, because it does not read ``alive``.

    Args:
        encoder: turns observations into latent states and contexts.
        dynamics: the model.
        reward: reads ``latent``, ``context``, ``action``, writes ``[..., 1]``; a plain
            ``f(latent, context, action)`` is wrapped; ``None`` for a reward of 0. A TensorDict
            module may also read ``("next", "latent")``. Entries are per particle: ``latent``
            ``[..., E, P, D]``, ``context`` ``[..., E, P, C]``, ``action`` ``[..., E, P, A]``
            (``OneHot`` spec: ``[..., E, P, n]``; ``Categorical``: indices ``[..., E, P]``, or
            ``[..., E, P, 1]`` if the spec has shape ``(1,)``).
        action_spec: of one env, without batch dims.
        num_particles: particles of an env; ``None``: ``E * P`` of the model. A multiple of ``E``
            gives each member a row of particles. Below ``E``, all particles of an env are of one
            member, and envs are spread evenly over members: the state is
            ``[..., 1, num_particles, D]`` with a ``member`` entry, and the cost of a step does not
            grow with the ensemble.
        termination: ``"soft"`` never ends a rollout and weights rewards by ``alive``; ``"sample"``
            draws termination for each particle; an env is terminated when all its particles are.
        propagation: ``"fixed_model"`` (TS-inf), ``"random_model"`` (TS-1) or ``"expectation"``.
        deterministic: move particles to the mean of their mixture; ``None``: follow TorchRL's
            ``set_exploration_type``.
        uncertainty: also give ``epistemic_var`` (variance over members of the member means) and
            ``aleatoric_var`` (mean over members of the within-member variance), both ``[..., D]``:
            all members are asked at the same state, for every particle, and the variances averaged
            over particles. Members of equal weights have an epistemic variance of 0. It multiplies
            the network evaluations by ``E``: with it only what asks for the variances should be
            imagined. A planner in this env asks for them if its ``disagreement`` is not 0.
        termination_fn: replaces the predicted termination: a plain
            ``f(latent, context, action, next_latent)``, shaped as for ``reward``, or a TensorDict
            module that reads some of these (``("next", "latent")``). Returns the probability, or
            bools, ``[..., E, P, 1]``.
        start: start of a ``reset`` without observation: observations ``[N, O]`` to draw from, or a
            function of a batch shape that returns them. ``None``: latent states drawn from a
            standard normal, and a zero context; an automatic reset to these, after an episode,
            warns once, because the state after it is none of the real env.
        compile_imagine: use code from ``torch.compile`` in planners, and in :meth:`imagine` under
            ``torch.no_grad``; equal up to rounding. The first two numbers of envs each cost some
            seconds of compilation, for any horizon, which is logged once. On a CPU it gains little.
            (``compile`` of TorchRL's envs is for :meth:`step`.)
        cudagraphs: let :meth:`imagine` on CUDA, under ``torch.no_grad``, replay a CUDA graph, see
            :class:`~layeredrl_trl.acceleration.GraphReplay`. Not yet run on a GPU.
        gamma: discount for planners in this env, which take it where they are given none.

    Reads:
        ``latent`` ``[..., E, P, D]``, ``context`` ``[..., C]``, ``alive`` ``[..., E, P, 1]``,
        ``action`` ``[..., A]`` (``member`` ``[..., 1]``).

    Writes:
        Under ``"next"``: ``latent``, ``context``, ``alive``, ``particle_reward``
        ``[..., E, P, 1]``, ``term_prob`` ``[..., E, P, 1]``, ``reward`` ``[..., 1]``,
        ``terminated``, ``truncated``, ``done`` ``[..., 1]``; with ``uncertainty``
        ``epistemic_var`` and ``aleatoric_var`` ``[..., D]``; if the encoder can decode,
        ``observation`` ``[..., O]`` of the first particle.

    Raises:
        TypeError: at construction, if a part, ``action_spec`` or ``start`` is of an unknown kind,
            a flag no bool or ``gamma`` no number.
        ValueError: at construction, for an unknown option, sizes of the parts that differ, a
            ``num_particles`` that does not divide, or a ``gamma`` outside of [0, 1].

    Example:
        >>> from torchrl.data import Bounded
        >>> from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet
        >>> env = PredictorEnv(
        ...     IdentityEncoder(3),
        ...     ProbabilisticEnsemble(3, 0, 1, n_models=5),
        ...     RewardNet(3, 0, 1),
        ...     Bounded(-2.0, 2.0, (1,)),
        ... )
        >>> start = env.initial_state(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))
        >>> env.rollout(7, tensordict=start, auto_reset=False)["next", "reward"].shape
        torch.Size([4, 7, 1])
        >>> env.imagine(start, torch.zeros(4, 7, 1))["latent"].shape
        torch.Size([4, 7, 5, 1, 3])
    """

    __signature__ = OwnSignature()

    def __init__(
        self,
        encoder: Encoder,
        dynamics: DynamicsModel,
        reward: nn.Module | Callable[..., Tensor] | None,
        action_spec: TensorSpec,
        *,
        num_particles: int | None = None,
        termination: Termination = "soft",
        propagation: Propagation = "fixed_model",
        deterministic: bool | None = False,
        uncertainty: bool = False,
        termination_fn: nn.Module | Callable[..., Tensor] | None = None,
        start: Tensor | Callable[[torch.Size], Tensor] | None = None,
        compile_imagine: bool = False,
        cudagraphs: bool = False,
        gamma: float | None = None,
    ) -> None:
        check_options(
            gamma,
            deterministic,
            uncertainty=uncertainty,
            compile_imagine=compile_imagine,
            cudagraphs=cudagraphs,
        )
        check_sizes(encoder, dynamics, action_spec, start)
        reward = as_reward_module(reward, dynamics.in_keys)
        termination_fn = as_termination_module(termination_fn, dynamics.in_keys)
        check_heads("PredictorEnv", encoder, dynamics, reward=reward)
        layout = particle_layout(dynamics, num_particles)
        device = next((p.device for p in dynamics.parameters()), torch.device("cpu"))
        imagination = Imagination(
            dynamics,
            reward,
            termination=termination,
            propagation=propagation,
            uncertainty=uncertainty,
            termination_fn=termination_fn,
            compile=compile_imagine,
        )
        super().__init__(imagination, device=device)
        self.latent_key, self.context_key = encoder.out_keys
        self._state_keys = (self.latent_key, self.context_key, keys.ALIVE, keys.MEMBER)
        if layout[0] == dynamics.n_models:  # each member has its own particles
            self._state_keys = self._state_keys[:3]
        self.imagined_action_key = dynamics.in_keys[2]
        self.deterministic = deterministic
        self.gamma = gamma
        self.start = start
        self._draw, self._has_warned = draw_each, False
        specs = imagined_specs(
            encoder, dynamics, action_spec, layout, uncertainty=uncertainty, device=self.device
        )
        self.observation_spec = specs.observation
        self.state_spec = specs.state
        self.action_spec = specs.action
        self.reward_spec = specs.reward
        self.done_spec = specs.done
        self._action_shape = action_spec.shape
        self.initial_state = InitialState(encoder, self.observation_spec, dynamics.n_models)
        self._replay = None
        if cudagraphs:
            self._replay = GraphReplay(self._roll, [imagination], also=self._is_deterministic)

    @property
    def one_particle_keys(self) -> list[NestedKey]:
        """Entries that describe only the first particle, if an env carries several."""
        rows, particles, _ = self._observed[self.latent_key].shape
        several = rows * particles > 1
        return [unravel_key(self.initial_state.in_keys[0])] if self._decodes and several else []

    def imagine(
        self,
        tensordict: TensorDictBase,
        actions: Tensor,
        *,
        set_truncated: bool = False,
    ) -> TensorDictBase:
        """Roll out given actions, like ``rollout`` but faster.

        A terminated env (``termination="sample"``) continues to the last action with ``alive``, and
        so its reward, at 0.

        Args:
            tensordict: imagined state, batch ``[...]`` (see :attr:`initial_state`).
            actions: ``[..., H, A]``; indices ``[..., H]`` for a categorical spec.
            set_truncated: set ``truncated`` and ``done`` on the last step, as ``rollout`` does;
                needed in a replay buffer, where consecutive rollouts would otherwise look like one.

        Returns:
            TorchRL's rollout layout, batch ``[..., H]``. ``("next", key)`` and ``key`` are views
            of one tensor, one step apart.

        Raises:
            KeyError: if an entry of the state is missing.
            ValueError: if a shape does not fit.
        """
        check_flag("set_truncated", set_truncated)
        batch = tensordict.batch_size
        check_actions(actions, batch, self._action_shape)
        flat = tensordict.reshape(-1)
        state = self._read_state(flat)
        actions = actions.reshape(-1, *actions.shape[len(batch) :])
        is_plain = torch.is_grad_enabled() or self._draw is not draw_each
        roll = self._roll if is_plain else self._replay or self._roll
        outcome: ImaginedStep = roll(state, actions)
        context = state.context.unsqueeze(1).expand(-1, actions.shape[1], -1)
        return as_rollout(
            self._entries(outcome, context),
            self._by_key(state) | self._read_others(flat),
            (self.imagined_action_key, actions),
            batch,
            device=self.device,
            set_truncated=set_truncated,
        )

    def imaginer(
        self, tensordict: TensorDictBase, names: Iterable[NestedKey]
    ) -> Callable[[Tensor], dict[NestedKey, Tensor]]:
        """Prepare to imagine several rounds of actions, between which the model does not change.

        For planners: reading the state and preparing the layers happen once, and a round makes no
        TensorDict.

        Args:
            tensordict: imagined state, batch ``[...]``.
            names: entries to return, ``("next", ...)``.

        Returns:
            a function of actions ``[..., H, A]``; with fewer along the last batch dim, it uses the
            first states. It returns those entries of :meth:`imagine`, not to be written to, without
            unknown names and, for ``termination="soft"``, done flags.

        Raises:
            KeyError: if an entry of the state is missing.
            ValueError: if a shape of the state or, in the function, of the actions does not fit.
        """
        batch = tensordict.batch_size
        state = self._read_state(tensordict.reshape(-1))
        rollout = self.world_model.fast_rollout()
        asked = {name: unravel_key(name[1:]) for name in names if name[0] == "next"}
        if self.world_model.termination == "soft":
            never = (keys.DONE, keys.TERMINATED, keys.TRUNCATED)
            asked = {name: key for name, key in asked.items() if key not in never}

        uncertainty = self.world_model.uncertainty and not _VARIANCES.isdisjoint(asked.values())

        def imagine(actions: Tensor) -> dict[NestedKey, Tensor]:
            envs, some, last = batch, state, len(batch) - 1
            n = actions.shape[last] if batch and actions.ndim > last else None
            if n is not None and n < batch[last]:
                envs, some = torch.Size([*batch[:-1], n]), state.first(n, batch)
            check_actions(actions, envs, self._action_shape)
            actions = actions.reshape(-1, *actions.shape[len(envs) :])
            outcome = self._roll(some, actions, rollout, uncertainty)
            context = some.context.unsqueeze(1).expand(-1, actions.shape[1], -1)
            entries = self._entries(outcome, context)
            return {
                name: entries[key].reshape(*envs, *entries[key].shape[1:])
                for name, key in asked.items()
                if key in entries
            }

        return imagine

    def repeat_state(self, tensordict: TensorDictBase, n: int) -> TensorDictBase:
        """Copy imagined states, for several action sequences from each.

        Args:
            tensordict: imagined state, batch ``[...]``.
            n: number of copies.

        Returns:
            Batch ``[..., n]``. If all particles of an env are of one member, the copies are spread
            evenly over members.
        """
        out = tensordict.unsqueeze(-1).expand(*tensordict.batch_size, n).clone()
        if keys.MEMBER in out.keys():
            n_models = self.world_model.dynamics.n_models
            out.set(keys.MEMBER, spread_members(out.batch_size, n_models, self.device))
        return out

    def _roll(
        self,
        state: ImaginedState,
        actions: Tensor,
        rollout: Rollout | None = None,
        uncertainty: bool | None = None,
    ) -> ImaginedStep:
        return self.world_model.rollout(
            state,
            actions,
            deterministic=self._is_deterministic(),
            rollout=rollout,
            draw=self._draw,
            uncertainty=uncertainty,
        )

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        flat = tensordict.reshape(-1)
        state, action = self._read_state(flat), flat[self.imagined_action_key]
        outcome: ImaginedStep = self.world_model.step(
            state, action, deterministic=self._is_deterministic(), draw=self._draw
        )
        out = TensorDict(self._entries(outcome, state.context), flat.shape, device=self.device)
        return out.reshape(tensordict.batch_size)

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: object) -> TensorDictBase:
        batch = self.batch_size if tensordict is None else tensordict.batch_size
        observation_key = self.initial_state.in_keys[0]
        # "_reset" marks an automatic reset, where the TensorDict holds the episode's last state
        given = tensordict is not None and "_reset" not in tensordict.keys()
        if given and observation_key in tensordict.keys(True):
            return self._start_at(tensordict.get(observation_key), batch)
        if given and set(self._state_keys) <= set(tensordict.keys(True, True)):
            flat = tensordict.reshape(-1)
            known = self._by_key(self._read_state(flat)) | self._read_others(flat)
            state = {
                key: known[key].to(dtype)
                if key in known
                else torch.zeros((*flat.shape, *shape), dtype=dtype, device=self.device)
                for key, (shape, dtype) in self._observed.items()
            }
            return TensorDict(state, flat.shape, device=self.device).reshape(batch)
        if self.start is not None:
            obs_shape = self.initial_state.encoder.obs_shape
            return self._start_at(draw_start(self.start, batch, obs_shape).to(self.device), batch)
        if tensordict is not None and not given and not self._has_warned:
            self._has_warned = True
            warn_of_blind_start()
        shape = (*batch, *self._observed[self.latent_key].shape)
        like = {"dtype": torch.float32, "device": self.device}
        latent = torch.randn(*shape[:-3], 1, 1, shape[-1], **like).expand(shape)
        n_models = self.world_model.dynamics.n_models
        state = blank_state(self._observed, batch, n_models, self.device)
        state[self.latent_key] = latent.clone()
        if self._decodes:
            state[observation_key] = decode_first_particle(
                self.initial_state.encoder, latent, state[self.context_key]
            )
        return TensorDict(batch_size=batch, device=self.device).update(state)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            torch.manual_seed(seed)

    def _start_at(self, observation: Tensor, batch: torch.Size) -> TensorDictBase:
        out = TensorDict(batch_size=batch, device=self.device)
        out.set(self.initial_state.in_keys[0], observation.to(torch.float32))
        return self.initial_state(out).select(*self._observed)

    def set_spec_lock_(self, mode: bool = True) -> PredictorEnv:
        """Lock or unlock the specs, and cache their entries."""
        super().set_spec_lock_(mode)
        # looking up an entry in a spec takes as long as a small operation
        self._observed: dict[NestedKey, Entry] = entries_of(self.observation_spec)
        self._root_keys: set[NestedKey] = {*self._observed, *self.full_done_spec.keys(True, True)}
        return self

    @property
    def _decodes(self) -> bool:
        return self.initial_state.encoder.can_decode

    def _read_state(self, flat: TensorDictBase) -> ImaginedState:
        """Read and check the state of ``[N]`` envs."""
        return ImaginedState(*read_entries(flat, self._state_keys, self._observed))

    def _by_key(self, state: ImaginedState) -> dict[NestedKey, Tensor]:
        return {key: x for key, x in zip(self._state_keys, state, strict=False) if x is not None}

    def _read_others(self, flat: TensorDictBase) -> dict[NestedKey, Tensor]:
        """Read the existing entries of a rollout that are not part of the state."""
        found = {key: flat.get(key, None) for key in self._root_keys if key not in self._state_keys}
        return {key: x for key, x in found.items() if x is not None}

    def _is_deterministic(self) -> bool:
        if self.deterministic is None:
            return exploration_type() in _DETERMINISTIC
        return self.deterministic

    def _entries(self, outcome: ImaginedStep, context: Tensor) -> dict[NestedKey, Tensor]:
        """Name all entries under ``"next"``, for one or several steps."""
        out = {
            self.latent_key: outcome.latent,
            self.context_key: context,
            keys.ALIVE: outcome.alive,
            keys.PARTICLE_REWARD: outcome.particle_reward,
            keys.TERM_PROB: outcome.term_prob,
            keys.REWARD: outcome.reward,
            keys.TERMINATED: outcome.terminated,
            keys.TRUNCATED: torch.zeros_like(outcome.terminated),
            keys.DONE: outcome.terminated,
            keys.MEMBER: outcome.member,
            keys.EPISTEMIC_VAR: outcome.epistemic_var,
            keys.ALEATORIC_VAR: outcome.aleatoric_var,
        }
        if self._decodes:
            encoder = self.initial_state.encoder
            out[encoder.in_keys[0]] = decode_first_particle(encoder, outcome.latent, context)
        return {key: x for key, x in out.items() if x is not None}
