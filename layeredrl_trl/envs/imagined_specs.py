"""The specs of an imagined env, and checks that encoder, dynamics, action and start fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded

from layeredrl_trl import keys
from layeredrl_trl.checks import check_finite, check_flag, check_integer
from layeredrl_trl.modules import DynamicsModel, Encoder, check_parts, space_dim


class Entry(NamedTuple):
    """Shape without batch dims, and dtype, of an entry of a spec."""

    shape: torch.Size
    dtype: torch.dtype


def entries_of(spec: Composite) -> dict[NestedKey, Entry]:
    """Read shapes and dtypes of all entries of a spec."""
    return {key: Entry(x.shape, x.dtype) for key, x in spec.items(True, True)}


class ImaginedSpecs(NamedTuple):
    """The specs of a ``PredictorEnv``, for one env without batch dims.

    Attributes:
        observation: all entries that a step writes, except reward and flags.
        state: those entries of ``observation`` from which a step or a reset starts.
        action: the action, under the key that the dynamics read.
        reward, done: the reward of one step; ``done``, ``terminated`` and ``truncated``.
    """

    observation: Composite
    state: Composite
    action: Composite
    reward: TensorSpec
    done: Composite


def imagined_specs(
    encoder: Encoder,
    dynamics: DynamicsModel,
    action_spec: TensorSpec,
    layout: tuple[int, int],
    *,
    uncertainty: bool,
    device: torch.device,
) -> ImaginedSpecs:
    """Make the specs of a ``PredictorEnv``, whose docstring describes the entries.

    The keys of ``encoder`` and ``dynamics`` name the entries; ``action_spec`` is that of one env,
    ``layout`` comes from :func:`particle_layout`, and with ``uncertainty`` a step writes variances.
    """
    rows, particles = layout
    latent_dim = dynamics.latent_state_dim
    latent_key, context_key = encoder.out_keys

    def free(*shape: int) -> Unbounded:
        return Unbounded(shape, dtype=torch.float32, device=device)

    probability = Bounded(0.0, 1.0, (rows, particles, 1), dtype=torch.float32, device=device)
    observation: dict[NestedKey, TensorSpec] = {
        latent_key: free(rows, particles, latent_dim),
        context_key: free(dynamics.context_dim),
        keys.ALIVE: probability,
        keys.PARTICLE_REWARD: free(rows, particles, 1),
        keys.TERM_PROB: probability.clone(),
    }
    if rows < dynamics.n_models:
        observation[keys.MEMBER] = Categorical(dynamics.n_models, (1,), device=device)
    if uncertainty:
        observation[keys.EPISTEMIC_VAR] = free(latent_dim)
        observation[keys.ALEATORIC_VAR] = free(latent_dim)
    if encoder.can_decode:
        observation[encoder.in_keys[0]] = free(*encoder.obs_shape)
    # No step starts from the observation, but `reset` may, and a TransformedEnv passes only the
    # entries of the state spec on to `reset`.
    state = (latent_key, context_key, keys.ALIVE, keys.MEMBER, encoder.in_keys[0])
    flag = Categorical(2, (1,), dtype=torch.bool, device=device)
    flags = (keys.DONE, keys.TERMINATED, keys.TRUNCATED)
    return ImaginedSpecs(
        observation=Composite(observation),
        state=Composite({key: spec.clone() for key, spec in observation.items() if key in state}),
        action=Composite({dynamics.in_keys[2]: action_spec.to(device)}),
        reward=free(1),
        done=Composite({key: flag.clone() for key in flags}),
    )


def check_sizes(
    encoder: Encoder,
    dynamics: DynamicsModel,
    action_spec: TensorSpec,
    start: Tensor | Callable[[torch.Size], Tensor] | None,
) -> None:
    """Check that encoder, dynamics, action and start of a ``PredictorEnv`` fit together.

    Raises:
        TypeError: if one is of an unknown kind; the error names it.
        ValueError: if one does not fit the others; the error names it.
    """
    check_parts("PredictorEnv", encoder, dynamics)
    action_dim = space_dim(action_spec, "action_spec")
    if not isinstance(action_spec, TensorSpec):
        raise TypeError(
            "PredictorEnv: action_spec: expected a torchrl TensorSpec, as env.action_spec of a "
            f"TorchRL env is, got {type(action_spec).__module__}.{type(action_spec).__name__}."
        )
    if action_dim != dynamics.action_dim:
        raise ValueError(
            f"PredictorEnv: action_spec has {action_dim} action dims, dynamics "
            f"{dynamics.action_dim}."
        )
    if not (start is None or isinstance(start, Tensor) or callable(start)):
        raise TypeError(
            "PredictorEnv: start: expected a tensor of observations or a function of a batch "
            f"shape, got {type(start).__module__}.{type(start).__name__}."
        )
    shape = action_spec.shape
    fits = shape in ((), (1,)) if isinstance(action_spec, Categorical) else len(shape) == 1
    if not fits:
        raise ValueError(
            f"PredictorEnv: action_spec must be of one env, without batch dims, got shape "
            f"{list(shape)}; see EnvBase.action_spec_unbatched."
        )
    if isinstance(start, Tensor) and (start.shape[1:] != encoder.obs_shape or not start.numel()):
        raise ValueError(
            f"PredictorEnv: start must hold observations [N, "
            f"{', '.join(map(str, encoder.obs_shape))}], at least one, got {list(start.shape)}."
        )


def check_options(gamma: float | None, deterministic: bool | None, **flags: bool) -> None:
    """Check the plain options of a ``PredictorEnv``; ``flags`` are given by name.

    Raises:
        TypeError: if one is of another kind; the error names it.
        ValueError: if ``gamma`` is not in [0, 1].
    """
    check_flag("PredictorEnv: deterministic", deterministic, optional=True)
    for name, value in flags.items():
        check_flag(f"PredictorEnv: {name}", value)
    if gamma is not None:
        check_finite("PredictorEnv: gamma", gamma)
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"PredictorEnv: gamma must be in [0, 1], got {gamma}.")


def check_actions(actions: Tensor, batch: torch.Size, shape: torch.Size) -> None:
    """Check that actions have the shape ``[*batch, H, *shape]``, with at least one step and env.

    Raises:
        ValueError: if they have not.
    """
    if actions.ndim != len(batch) + 1 + len(shape) or (
        actions.shape[: len(batch)] != batch or actions.shape[len(batch) + 1 :] != shape
    ):
        expected = ", ".join(map(str, [*batch, "H", *shape]))
        raise ValueError(f"actions: expected shape [{expected}], got {list(actions.shape)}.")
    if actions.shape[len(batch)] < 1 or batch.numel() < 1:
        raise ValueError(f"actions: expected at least one step and env, got {actions.shape}.")


def read_entries(
    flat: TensorDictBase, names: Sequence[NestedKey], observed: Mapping[NestedKey, Entry]
) -> list[Tensor]:
    """Read the entries ``names`` of ``[N]`` imagined states, of the shapes of ``observed``.

    Raises:
        KeyError: if an entry is missing.
        ValueError: if it has another shape.
    """
    state = {name: flat.get(name, None) for name in names}
    missing = sorted(str(name) for name, x in state.items() if x is None)
    if missing:
        raise KeyError(
            f"PredictorEnv: the imagined state has no entry {missing}; there is "
            f"{sorted(map(str, flat.keys(True, True)))}. "
            "Make one with env.initial_state or env.reset."
        )
    for name, x in state.items():
        expected = observed[name].shape
        if x.shape[1:] != expected:
            raise ValueError(
                f"{name}: expected trailing shape {list(expected)}, got {list(x.shape[1:])}."
            )
    return list(state.values())


def particle_layout(dynamics: DynamicsModel, num_particles: int | None) -> tuple[int, int]:
    """Return how many rows of particles an env carries, and how many particles each row has.

    Raises:
        ValueError: if ``num_particles`` is neither below the number of members nor a multiple of
            it, or below 1.
    """
    n_models = dynamics.n_models
    if num_particles is None:
        return n_models, dynamics.n_particles_per_model
    check_integer("PredictorEnv: num_particles", num_particles)
    if num_particles < 1 or (num_particles >= n_models and num_particles % n_models):
        raise ValueError(
            f"PredictorEnv: num_particles must be in 1..{n_models - 1} or a multiple of the "
            f"{n_models} members, got {num_particles}."
        )
    rows = n_models if num_particles >= n_models else 1
    return rows, num_particles // rows
