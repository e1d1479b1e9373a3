"""Putting a predictor together when the sizes of the spaces are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import nn

from layeredrl_trl.checks import check_count
from layeredrl_trl.envs import observation_layout
from layeredrl_trl.modules import (
    DynamicsModel,
    Encoder,
    ProbabilisticEnsemble,
    RewardNet,
    SelectEncoder,
    SymmetryBreakingStart,
    ValueNet,
    space_dim,
)
from layeredrl_trl.predictors.predictor import Predictor
from layeredrl_trl.predictors.reward_predictor import RewardPredictor

ACHIEVED_GOAL = "achieved_goal"
DESIRED_GOAL = "desired_goal"


class PredictorFactory:
    """Make predictors from parts that still lack the sizes of the spaces.

    Each argument is a callable, usually a ``functools.partial`` of a class with every option that
    does not depend on the environment. What it is completed with is positional, in this order; for
    ``partial_predictor`` it is by name. Nobody but the predictor gets the device: it moves its
    parts.

    Args:
        partial_model: ``f(latent_state_space, context_space, action_space)``, the first two
            unbounded Gymnasium boxes ``[D]`` and ``[C]``; returns a
            :class:`~layeredrl_trl.modules.DynamicsModel`.
        partial_val_func: ``f(latent_state_dim, context_dim)``; returns a state value or Q-function.
            ``None`` for a predictor without.
        partial_rew_func: ``f(latent_state_dim, context_dim, action_dim)``; returns a reward
            function. ``None`` for a predictor without.
        partial_encoder: ``f(obs_shape)``; returns an :class:`~layeredrl_trl.modules.Encoder`, which
            determines ``latent_state_dim`` and ``context_dim``.
        partial_predictor: ``f(model=, val_func=, rew_func=, encoder=, latent_state_dim=,
            context_dim=, device=, writer=)``; returns a :class:`Predictor`.

    Raises:
        TypeError: if one of them cannot be called.

    Example:
        >>> from layeredrl_trl.modules import IdentityEncoder
        >>> model, predictor = partial(ProbabilisticEnsemble, n_models=5), RewardPredictor
        >>> factory = PredictorFactory(model, ValueNet, RewardNet, IdentityEncoder, predictor)
        >>> predictor = factory((3,), Box(-1, 1, (1,)), "cpu", None)
        >>> predictor.value(torch.zeros(4, 3)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        partial_model: Callable[..., DynamicsModel],
        partial_val_func: Callable[..., nn.Module] | None,
        partial_rew_func: Callable[..., nn.Module] | None,
        partial_encoder: Callable[..., Encoder],
        partial_predictor: Callable[..., Predictor],
    ) -> None:
        self.partial_model = partial_model
        self.partial_val_func = partial_val_func
        self.partial_rew_func = partial_rew_func
        self.partial_encoder = partial_encoder
        self.partial_predictor = partial_predictor
        for name, part in vars(self).items():
            is_left_out = part is None and name in ("partial_val_func", "partial_rew_func")
            if not callable(part) and not is_left_out:
                raise TypeError(
                    f"PredictorFactory: {name} must be callable, got {type(part).__name__}."
                )

    def __call__(
        self,
        mapped_env_obs_shape: int | Sequence[int],
        action_space: Any,
        device: torch.device | str = torch.device("cpu"),
        writer: Any = None,
    ) -> Predictor:
        """Make a predictor; every call makes new parts.

        Args:
            mapped_env_obs_shape: shape of one observation as the predictor gets it, after whatever
                maps the env's observation.
            action_space: of one env: a number of dims, a Gymnasium space or a TorchRL spec.
            device: where the predictor is moved to.
            writer: a ``SummaryWriter`` or TorchRL ``Logger``; ``None`` to log nothing.

        Raises:
            TypeError: if ``action_space`` is of an unknown kind, or a part returns something of
                another kind than it should.
            ValueError: if the parts do not fit the shape or each other.
        """
        action_dim = space_dim(action_space, "action_space")
        encoder = self.partial_encoder(mapped_env_obs_shape)
        _check_part("partial_encoder", encoder, isinstance(encoder, Encoder), "an Encoder")
        dims = encoder.latent_state_dim, encoder.context_dim
        model = self.partial_model(*(Box(-np.inf, np.inf, (d,)) for d in dims), action_space)
        _check_part("partial_model", model, isinstance(model, DynamicsModel), "a DynamicsModel")
        predictor = self.partial_predictor(
            model=model,
            val_func=_make_head("partial_val_func", self.partial_val_func, *dims),
            rew_func=_make_head("partial_rew_func", self.partial_rew_func, *dims, action_dim),
            encoder=encoder,
            latent_state_dim=dims[0],
            context_dim=dims[1],
            device=device,
            writer=writer,
        )
        is_predictor = isinstance(predictor, Predictor)
        _check_part("partial_predictor", predictor, is_predictor, "a Predictor")
        return predictor


def get_default_predictor_factory(env: Any, sb_start_duration: int) -> PredictorFactory:
    """Make a factory of a good :class:`RewardPredictor` to begin with in a goal-based environment.

    The achieved goal is the latent state, the desired goal the context; they are picked from the
    flattened observation by a :class:`~layeredrl_trl.modules.SelectEncoder`, which learns nothing.
    The dynamics are one network with 4 modes.

    What the achieved goal does not tell (velocities, the posture of a robot) the predictor does not
    see, so what it predicts best is the effect of actions, or skills, that last a while. For more,
    set ``factory.partial_encoder`` to one that picks more dims. ``benchmarks/goal_envs.py`` has
    numbers.

    Args:
        env: that the observations come from: a Gymnasium env or vector env, flattened by
            ``FlattenObservation`` or not, or a TorchRL env. Observations have to be flattened for
            the predictor in the order of :func:`~layeredrl_trl.envs.observation_layout`: in
            Gymnasium by ``FlattenObservation``, in TorchRL by the transform
            ``flatten_observation(env)``, see the example.
        sb_start_duration: env steps of the symmetry-breaking start; 0 for none.

    Raises:
        TypeError: if ``env`` is of an unknown kind, or ``sb_start_duration`` no integer.
        ValueError: if its observation has no entries ``achieved_goal`` and ``desired_goal``, or
            ``sb_start_duration`` is negative.

    Example:
        >>> import gymnasium
        >>> from torchrl.envs import GymWrapper, TransformedEnv
        >>> from layeredrl_trl.envs import flatten_observation
        >>> class Reach(gymnasium.Env):
        ...     action_space = Box(-1, 1, (2,))
        ...     observation_space = gymnasium.spaces.Dict(
        ...         observation=Box(-9, 9, (4,)),
        ...         achieved_goal=Box(-9, 9, (2,)),
        ...         desired_goal=Box(-9, 9, (2,)),
        ...     )
        ...
        ...     def reset(self, **options):
        ...         return self.observation_space.sample(), {}
        >>> env = GymWrapper(Reach())
        >>> env = TransformedEnv(env, flatten_observation(env))
        >>> factory = get_default_predictor_factory(env, sb_start_duration=1000)
        >>> predictor = factory(env.observation_spec["observation"].shape, env.action_spec)
        >>> latent, context = predictor.encode(env.reset()["observation"])
        >>> latent.shape, context.shape
        (torch.Size([2]), torch.Size([2]))
    """
    check_count("sb_start_duration", sb_start_duration, least=0)
    layout = observation_layout(env)
    if ACHIEVED_GOAL not in layout or DESIRED_GOAL not in layout:
        raise ValueError(
            f"env: expected a goal-based environment, with the observation entries "
            f"{ACHIEVED_GOAL!r} and {DESIRED_GOAL!r}, got one with {list(layout)}."
        )
    return PredictorFactory(
        partial_model=partial(_ensemble_with_start, sb_start_duration=sb_start_duration, n_modes=4),
        partial_val_func=ValueNet,
        partial_rew_func=RewardNet,
        partial_encoder=partial(
            SelectEncoder,
            latent_state_dims=layout[ACHIEVED_GOAL],
            context_dims=layout[DESIRED_GOAL],
        ),
        partial_predictor=partial(RewardPredictor, learn_encoder=False),
    )


def _make_head(name: str, make: Callable[..., Any] | None, *sizes: int) -> Any:
    """Make a reward or value of the given sizes; ``None`` makes none."""
    head = None if make is None else make(*sizes)
    is_head = head is None or (callable(head) and not isinstance(head, type))
    _check_part(name, head, is_head, "a module or function")
    return head


def _check_part(name: str, part: Any, legal: bool, expected: str) -> None:
    if not legal:
        kind = part.__name__ if isinstance(part, type) else type(part).__name__
        came = f"the class {kind} itself" if isinstance(part, type) else kind
        raise TypeError(f"PredictorFactory: {name} must return {expected}, got {came}.")


def _ensemble_with_start(*spaces: Any, sb_start_duration: int, **options: Any) -> DynamicsModel:
    model = ProbabilisticEnsemble(*spaces, **options)
    return SymmetryBreakingStart(model, sb_start_duration) if sb_start_duration else model
