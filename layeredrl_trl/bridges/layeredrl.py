"""Predictors of LayeredRL, by their ``state_dict``.

Each function here makes one part, of the sizes that its entries have, and returns it with these
entries by the names that they have in this library. ``from_layeredrl`` puts the parts together and
loads all entries at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layeredrl_trl.bridges.entries import Entries
from layeredrl_trl.bridges.layeredrl_ensemble import LayeredRLEnsemble, perceptron
from layeredrl_trl.checks import check_count, check_flag
from layeredrl_trl.functional import ROUNDING
from layeredrl_trl.modules import (
    DeltaStandardizer,
    Encoder,
    LinearEncoder,
    RewardNet,
    ValueNet,
)
from layeredrl_trl.modules.mlp import make_activation
from layeredrl_trl.modules.parts import check_kinds
from layeredrl_trl.modules.spaces import space_dim
from layeredrl_trl.predictors import RewardPredictor

_EPS = 1e-5
"""What LayeredRL adds to a variance before it takes the root (so does ``nn.BatchNorm1d``)."""

_BATCHES = 1000.0
"""Batches that running moments count as seen, so that they go on at their slowest rate."""

State = dict[str, Tensor]


def from_layeredrl(
    state_dict: Mapping[str, Tensor],
    action_space: Any,
    encoder: Encoder | None = None,
    *,
    activation: type[nn.Module] = nn.ReLU,
    predict_delta: bool = True,
    n_particles_per_model: int = 1,
    sb_start_duration: int | None = None,
    **options: Any,
) -> RewardPredictor:
    """Make a predictor that predicts what one of LayeredRL in evaluation mode does.

    Sizes are read off the entries. What is no tensor in LayeredRL is not in its state, and has to
    be said: the dims that its ``FixedEncoderNet`` picks, the activation, ``predict_delta``.

    The model is a :class:`~layeredrl_trl.bridges.layeredrl_ensemble.LayeredRLEnsemble` of networks
    like ``ProbFCDynamics``. Batch normalisation of its inputs is folded into the first layer; where
    the encoder has no context, so are the dims that ``EncoderNet`` masks.

    Learning goes on from there with the semantics of this library: running moments, which LayeredRL
    does not have for most inputs, move slowly away from 0 and 1; the optimiser, whose state is not
    in a ``state_dict`` of LayeredRL, starts anew.

    Args:
        state_dict: of a ``RewardPredictor`` or ``StaticPredictor`` of LayeredRL.
        action_space: ``A``, or a space or spec of that many dims.
        encoder: ``IdentityEncoder`` or ``SelectEncoder`` in the place of LayeredRL's
            ``IdentityEncoder`` or ``FixedEncoderNet``; ``None`` for an ``EncoderNet``, which
            becomes a :class:`~layeredrl_trl.modules.LinearEncoder`.
        activation: class of the nonlinearity of all networks, one without parameters.
        predict_delta: whether the networks predict the change of the latent state.
        n_particles_per_model: particles per member in an imagined rollout.
        sb_start_duration: env steps of the symmetry-breaking start, where the model has one. It
            must be over: predictions of a start that is not over are not mapped.
        options: of :class:`~layeredrl_trl.predictors.RewardPredictor`, with ``encoder_warm_up`` of
            0 and a ``delta_standardizer`` where the state has one as defaults.

    Returns:
        The predictor, in training mode.

    Raises:
        KeyError: if an entry is missing; the text names it.
        TypeError: if ``state_dict`` is no mapping, an entry no tensor, or an argument of an unknown
            kind.
        ValueError: if an entry is of another shape, not finite, or has no counterpart; the text
            names it.

    Reference:
        LayeredRL, https://github.com/nicoguertler/layeredrl, commit 248fb87.

    Example:
        >>> from layeredrl_trl import IdentityEncoder
        >>> state = {"model.nets.0.net.0.weight": torch.zeros(8, 4)}  # 3 latent dims, 1 action
        >>> state |= {"model.nets.0.net.0.bias": torch.zeros(8)}
        >>> state |= {"model.nets.0.final_layer.weight": torch.zeros(8, 8)}  # 1 mode
        >>> state |= {"model.nets.0.final_layer.bias": torch.zeros(8)}
        >>> predictor = from_layeredrl(state, 1, IdentityEncoder(3))
        >>> predictor.predict(torch.zeros(5, 3), torch.zeros(5, 1))[0].shape
        torch.Size([5, 1, 1, 3])
    """
    check_flag("from_layeredrl: predict_delta", predict_delta)
    action_dim = space_dim(action_space, "from_layeredrl: action_space")
    check_count("from_layeredrl: number of dims of action_space", action_dim)
    make_activation("from_layeredrl: activation", activation)
    entries = Entries("from_layeredrl", state_dict)
    _drop_start(entries, sb_start_duration)
    encoder, of_encoder = _encoder(entries, encoder)
    dims = encoder.latent_state_dim, encoder.context_dim
    variance, of_moments = _target_variance(entries, dims[0])
    network, of_network = _network(entries, (*dims, action_dim), activation)
    model = LayeredRLEnsemble(
        *dims,
        action_space,
        n_particles_per_model=n_particles_per_model,
        predict_delta=predict_delta,
        **network,
    )
    value, of_value = _value(entries, (*dims, action_dim), activation)
    reward, of_reward = _reward(entries, (*dims, action_dim), activation)
    delta_variance = variance if predict_delta else torch.ones_like(variance)
    of_standardizer = _standardizer(entries, delta_variance)
    entries.drop("_learn_counter", "model._learn_counter", "model.n_total_env_steps")
    entries.drop("delta_stand_inverse")  # a copy of the inverse of the standardizer's matrix
    entries.check_empty()
    options = {"delta_standardizer": bool(of_standardizer), "encoder_warm_up": 0} | options
    predictor = RewardPredictor(model, value, reward, encoder, *dims, **options)
    state = of_encoder | of_moments | of_network | of_value | of_reward
    if predictor.standardizer is not None:
        state |= of_standardizer
    predictor.load_state_dict(predictor.state_dict() | state)
    return predictor


def _drop_start(entries: Entries, duration: int | None) -> None:
    """Leave out a symmetry-breaking start that is over."""
    name = "model.random_dynamics.A"
    if name not in entries:
        return
    if duration is None:
        entries.refuse(name, "the symmetry-breaking start: pass its length as sb_start_duration")
    check_count("from_layeredrl: sb_start_duration", duration, least=0)
    steps = int(entries.take("model.n_total_env_steps", ()))
    if steps < duration:
        entries.refuse(
            name,
            f"the symmetry-breaking start is not over, at {steps} of {duration} env steps, and its "
            "standard deviation is of another form than that of SymmetryBreakingStart; learn on in "
            "LayeredRL until it is",
        )
    entries.drop(name, "model.random_dynamics.transform")


def _encoder(entries: Entries, encoder: Encoder | None) -> tuple[Encoder, State]:
    """Return the given encoder, which learns nothing, or make one of an ``EncoderNet``."""
    if encoder is not None:
        check_kinds("from_layeredrl", encoder=(encoder, Encoder))
        if entries.has("encoder."):
            entries.refuse("encoder", "the state has a learned encoder, so leave encoder out")
        if any(True for _ in encoder.parameters()):
            raise ValueError(
                f"from_layeredrl: encoder: {type(encoder).__name__} has parameters, but the state "
                "has none for it."
            )
        return encoder, {}
    if not entries.has("encoder."):
        raise KeyError(
            "from_layeredrl: encoder.state_net.weight is missing. LayeredRL's IdentityEncoder and "
            "FixedEncoderNet have no entries: pass encoder=IdentityEncoder(...) or "
            "SelectEncoder(...)."
        )
    latent_dim, size = entries.shape("encoder.state_net.weight", 2)
    context_dim, _ = entries.shape("encoder.context_net.weight", 2)
    weight = entries.take("encoder.state_net.weight", (latent_dim, size))
    context = entries.take("encoder.context_net.weight", (context_dim, size))
    changes = entries.take("encoder.mask", (size,)).bool()
    state, standardize = State(), entries.has("encoder.input_bn.")
    if standardize:
        mean = entries.take("encoder.input_bn.mean", (size,))
        variance = entries.take("encoder.input_bn.var", (size,)) + _EPS
        if not (variance.sqrt() > ROUNDING * mean.abs()).all():
            entries.refuse("encoder.input_bn.var", "a dim varies by less than float32 resolves")
        entries.drop("encoder.input_bn._initialized", "encoder.input_bn._counter")
        state = _moments("encoder.moments", mean=mean, var=variance)
    made = LinearEncoder(size, latent_dim, context_dim, standardize=standardize)
    if context_dim:
        state["encoder.context_net.weight"] = context
    else:  # without a context all dims feed the latent state
        weight = weight * changes
    state["encoder.latent_net.weight"] = weight
    state["encoder.changes"] = changes
    state["encoder.seen"] = torch.tensor(True)
    return made, state


def _target_variance(entries: Entries, dim: int) -> tuple[Tensor, State]:
    """Return the running variance ``[D]`` of the targets of the networks, 1 if there is none."""
    variance, divisor = torch.ones(2, dim, dtype=torch.float32)
    if entries.has("model.output_bn."):
        entries.take("model.output_bn.mean", (dim,))  # LayeredRL leaves it at 0
        variance = entries.take("model.output_bn.var", (dim,))
        entries.drop("model.output_bn._initialized", "model.output_bn._counter")
        divisor = variance + _EPS
    state = _moments("model.target_moments", var=divisor) | _moments("model.input_moments")
    return variance, state


def _network(
    entries: Entries, dims: tuple[int, int, int], activation: type[nn.Module]
) -> tuple[dict[str, Any], State]:
    """Return the options of an ensemble of the networks ``model.nets``."""
    latent_dim, context_dim, action_dim = dims
    prefix, names = "model.nets.0.", ("net.0.weight", "final_layer.weight")
    (_, n_in), (n_out, _) = (entries.shape(prefix + name, 2) for name in names)
    n_modes, rest = divmod(n_out - 1, 2 * latent_dim + 1)
    if rest or not n_modes:
        entries.refuse(
            f"{prefix}final_layer.weight",
            f"{n_out} outputs are not M (2 D + 1) + 1 for D = {latent_dim} latent dims",
        )
    n_known = latent_dim + action_dim
    if n_in not in (n_known, n_known + context_dim):
        entries.refuse(
            f"{prefix}net.0.weight",
            f"it reads {n_in} numbers, but there are {latent_dim} latent, {context_dim} context "
            f"and {action_dim} action dims",
        )
    sizes = _hidden_sizes(entries, prefix)
    make = partial(perceptron, hidden_sizes=sizes, activation=activation)
    layers = make(n_in, n_out)
    members = [
        _member(entries, f"model.nets.{i}.", layers, latent_dim)
        for i in range(entries.count("model.nets."))
    ]
    state = {
        f"model.net.network.{name}": torch.stack([member[name] for member in members])
        for name in members[0]
    }
    options = {
        "n_models": len(members),
        "n_modes": n_modes,
        "network": make,
        "condition_on_context": n_in > n_known,
    }
    return options, state


def _member(entries: Entries, prefix: str, layers: nn.Sequential, latent_dim: int) -> State:
    """Take the entries of one network; a normalisation of its inputs goes into the first layer."""
    own = _layers(entries, prefix, layers)
    if entries.has(f"{prefix}input_bn."):
        names = ("weight", "bias", "running_mean", "running_var")
        gain, bias, mean, variance = (
            entries.take(f"{prefix}input_bn.{name}", (latent_dim,)) for name in names
        )
        entries.drop(f"{prefix}input_bn.num_batches_tracked")
        scale = gain / (variance + _EPS).sqrt()
        weight = own["0.weight"].clone()
        own["0.bias"] = own["0.bias"] + weight[:, :latent_dim] @ (bias - mean * scale)
        weight[:, :latent_dim] *= scale
        own["0.weight"] = weight
    return own


def _reward(
    entries: Entries, dims: tuple[int, int, int], activation: type[nn.Module]
) -> tuple[RewardNet | None, State]:
    if not entries.has("rew_func."):
        return None, {}
    sizes = _hidden_sizes(entries, "rew_func.")
    made = RewardNet(*dims, hidden_sizes=sizes, activation=activation)
    layers = _layers(entries, "rew_func.", made.module.layers)
    return made, _renamed("rew_func.", layers) | _moments("rew_func.module.moments")


def _value(
    entries: Entries, dims: tuple[int, int, int], activation: type[nn.Module]
) -> tuple[ValueNet | None, State]:
    """Make a state value, or a Q-function if it reads the action."""
    if not entries.has("val_func."):
        return None, {}
    latent_dim, context_dim, action_dim = dims
    reads_action = entries.shape("val_func.net.0.weight", 2)[1] == sum(dims)
    made = ValueNet(
        latent_dim,
        context_dim,
        action_dim=action_dim if reads_action else None,
        hidden_sizes=_hidden_sizes(entries, "val_func."),
        activation=activation,
    )
    layers = _layers(entries, "val_func.", made.module.layers)
    target = layers
    if entries.has("target_val_func."):
        target = _layers(entries, "target_val_func.", made.module.layers)
    state = _renamed("val_func.", layers) | _renamed("target_val_params.", target)
    return made, state | _moments("val_func.module.moments")


def _layers(entries: Entries, prefix: str, layers: nn.Sequential) -> State:
    """Take the entries of layers; LayeredRL calls the last one ``final_layer``."""
    last, state = f"{len(layers) - 1}.", {}
    for name, x in layers.state_dict().items():
        is_last = name.startswith(last)
        theirs = f"final_layer.{name.removeprefix(last)}" if is_last else f"net.{name}"
        state[name] = entries.take(prefix + theirs, x.shape)
    return state


def _renamed(prefix: str, layers: State) -> State:
    return {f"{prefix}module.layers.{name}": x for name, x in layers.items()}


def _hidden_sizes(entries: Entries, prefix: str) -> list[int]:
    """Return the width of each hidden layer; between two of them is a nonlinearity."""
    n_hidden = (entries.count(f"{prefix}net.") + 1) // 2
    return [entries.shape(f"{prefix}net.{2 * k}.weight", 2)[0] for k in range(n_hidden)]


def _standardizer(entries: Entries, variance: Tensor) -> State:
    """Map the matrix of the standardizer, if there is one.

    LayeredRL's is half the sum of the upper triangle and its transpose. Here the matrix is divided
    by standard deviations of changes, so ``variance`` ``[D]``, that of changes, is multiplied in.
    """
    name = "delta_standardizer.mat"
    if name not in entries:
        return {}
    upper = entries.take(name, (len(variance),) * 2).triu()
    made = DeltaStandardizer(len(variance))
    made.moments.var.copy_(variance)
    per_std = made.matrix.detach().diagonal()
    raw = 0.5 * (upper + upper.mT) / torch.minimum(per_std[:, None], per_std)
    return {"standardizer.raw": raw} | _moments("standardizer.moments", var=variance)


def _moments(name: str, *, mean: Tensor | None = None, var: Tensor | None = None) -> State:
    """Return the entries of running moments; those not given leave numbers as they are."""
    state = {f"{name}.mean": mean, f"{name}.var": var, f"{name}.count": torch.tensor(_BATCHES)}
    return {name: x for name, x in state.items() if x is not None}
