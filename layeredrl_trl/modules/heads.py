"""Reward and value: functions of the latent state, the context and, where read, the action."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from tensordict import NestedKey, TensorDict, unravel_key
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn

from layeredrl_trl import keys
from layeredrl_trl.checks import check_flag, check_keys
from layeredrl_trl.modules.head_mlp import HeadMLP
from layeredrl_trl.modules.loading import LoadsWhole
from layeredrl_trl.modules.mlp import ConcatMLP
from layeredrl_trl.modules.outputs import as_float32, in_dtype_of
from layeredrl_trl.modules.spaces import action_features

_IN_KEYS = (keys.LATENT, keys.CONTEXT, keys.ACTION)


class LatentFunction(LoadsWhole, TensorDictModule):
    """A plain ``f(latent, context)`` or ``f(latent, context, action)`` as a ``TensorDictModule``.

    What it reads is cast to the dtype of its parameters, and what it returns to float32.

    Args:
        module: returns ``[..., 1]``.
        in_keys, out_keys: names of its arguments, in order, and of its output.
        options: of ``TensorDictModule``.

    Raises:
        TypeError: if keys are no sequence of keys.

    Attributes:
        argument: what it was handed in as, for the text of an error; else the name of the class.
    """

    argument: str | None = None

    def __init__(
        self,
        module: nn.Module | Callable[..., Tensor],
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey],
        **options: Any,
    ) -> None:
        check_keys(f"{type(self).__name__}: in_keys", in_keys)
        check_keys(f"{type(self).__name__}: out_keys", out_keys, 1)
        super().__init__(module, in_keys=list(in_keys), out_keys=list(out_keys), **options)

    @property
    def dims(self) -> tuple[int, ...] | None:
        """Last dim of each entry that it reads; ``None`` if it does not know."""
        return self.module.in_dims if isinstance(self.module, ConcatMLP) else None

    def evaluate(self, entries: Mapping[NestedKey, Tensor]) -> Tensor:
        """Evaluate on tensors by name, without a TensorDict in between."""
        return self._call_module([entries[key] for key in self.in_keys])

    def _call_module(self, tensors: Sequence[Tensor], **kwargs: Any) -> Any:
        """Do what ``TensorDictModule`` does, with tensors of the dtype of the module."""
        out = super()._call_module(in_dtype_of(self.module, *tensors), **kwargs)
        return as_float32(out) if isinstance(out, Tensor) else out

    @property
    def has_statistics(self) -> bool:
        """Whether it standardises what it reads and predicts, by running moments."""
        return isinstance(self.module, HeadMLP)

    @property
    def target_scale(self) -> Tensor | None:
        """Unit in which its targets are learned, ``[1]``; ``None``: it has no statistics."""
        return self.module.target_scale if self.has_statistics else None

    def update_statistics(
        self, entries: Mapping[NestedKey, Tensor], reward: Tensor, mask: Tensor | None = None
    ) -> None:
        """Update the running moments, if there are any, with real steps.

        Args:
            entries: what it reads, by name, ``[..., *]``.
            reward: of the step, ``[..., 1]``; for a value, too.
            mask: bool ``[..., 1]``, False on steps to ignore.
        """
        if self.has_statistics:
            inputs = [entries[key].detach() for key in self.in_keys]
            self.module.update_statistics(inputs, reward.detach(), mask)


class RewardNet(LatentFunction):
    """Predict the reward of taking ``action`` in ``latent``.

    It standardises what it reads and what it learns by running moments, so units do not matter; see
    :class:`~layeredrl_trl.modules.HeadMLP`. The loss updates these; in a loop of your own call
    :meth:`update_statistics`, or it is a plain perceptron.

    Args:
        latent_state_dim, context_dim: ``D`` and ``C``.
        action_dim: ``A``; for discrete actions their number (one-hot).
        hidden_sizes, activation: width of each hidden layer, and class of the nonlinearity.
        in_keys, out_keys: of the latent state, the context and the action; of the reward.

    Raises:
        TypeError: if a number of dims or the width of a layer is no integer, or keys are no
            sequence of keys.
        ValueError: if a number is below 1 (``context_dim``: below 0), or there are too many or too
            few keys.

    Reads:
        ``latent`` ``[..., D]``, ``context`` ``[..., C]``, ``action`` ``[..., A]``.

    Writes:
        ``reward`` ``[..., 1]``.

    Example:
        >>> import torch
        >>> RewardNet(3, 0, 1)(torch.zeros(2, 3), torch.zeros(2, 0), torch.zeros(2, 1)).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        latent_state_dim: int,
        context_dim: int,
        action_dim: int,
        *,
        hidden_sizes: Sequence[int] = (128, 128),
        activation: type[nn.Module] = nn.SiLU,
        in_keys: Sequence[NestedKey] = _IN_KEYS,
        out_keys: Sequence[NestedKey] = (keys.REWARD,),
    ) -> None:
        net = HeadMLP(latent_state_dim, context_dim, action_dim, hidden_sizes, activation)
        check_keys("RewardNet: in_keys", in_keys, 3)
        super().__init__(net, in_keys, out_keys)


class ValueNet(LatentFunction):
    """Predict the value of a state, or with ``action_dim`` of a state and an action.

    It standardises what it reads, and learns in the unit of the rewards, see
    :class:`~layeredrl_trl.modules.HeadMLP`.

    Args:
        latent_state_dim, context_dim: ``D`` and ``C``.
        action_dim: ``A`` makes it a Q-function; ``None`` a state value.
        hidden_sizes, activation: width of each hidden layer, and class of the nonlinearity.
        in_keys, out_keys: of the latent state, the context and, for a Q-function, the action; of
            the value, by default ``state_value``, for a Q-function ``state_action_value``.

    Raises:
        TypeError: if a number of dims or the width of a layer is no integer, or keys are no
            sequence of keys.
        ValueError: if a number is below 1 (``context_dim``: below 0), or there are too many or too
            few keys.

    Reads:
        ``latent`` ``[..., D]``, ``context`` ``[..., C]`` (and ``action`` ``[..., A]``).

    Writes:
        ``state_value`` (or ``state_action_value``) ``[..., 1]``.

    Example:
        >>> import torch
        >>> ValueNet(3, 2)(torch.zeros(4, 3), torch.zeros(4, 2)).shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        latent_state_dim: int,
        context_dim: int,
        *,
        action_dim: int | None = None,
        hidden_sizes: Sequence[int] = (128, 128),
        activation: type[nn.Module] = nn.SiLU,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        sizes = latent_state_dim, context_dim, action_dim, hidden_sizes
        net = HeadMLP(*sizes, activation, is_sum=True)
        in_keys = _IN_KEYS[: len(net.in_dims)] if in_keys is None else in_keys
        out_key = keys.STATE_VALUE if action_dim is None else keys.STATE_ACTION_VALUE
        out_keys = [out_key] if out_keys is None else out_keys
        check_keys("ValueNet: in_keys", in_keys, len(net.in_dims))
        super().__init__(net, in_keys, out_keys)


def as_reward_module(
    module: nn.Module | Callable[..., Tensor] | None,
    in_keys: Sequence[NestedKey] = _IN_KEYS,
    *,
    argument: str = "reward",
) -> TensorDictModuleBase | None:
    """Wrap a plain ``f(latent, context, action) -> [..., 1]``; pass a TensorDict module through.

    ``in_keys`` are those of the latent state, the context and the action; ``argument`` is what the
    module was handed in as, for the text of an error.

    Raises:
        TypeError: if it cannot be called, or is a :class:`ValueNet`.
    """
    if isinstance(module, ValueNet):
        raise TypeError(
            f"{argument}: expected a reward, got a ValueNet. Swap it with the argument for the "
            "value."
        )
    if _needs_no_wrapping(module, argument, "f(latent, context, action)"):
        return module
    return _wrap(module, argument, in_keys, keys.REWARD)


def as_value_module(
    module: nn.Module | Callable[..., Tensor] | None,
    in_keys: Sequence[NestedKey] = _IN_KEYS,
    *,
    argument: str = "val_func",
    reads_action: bool | None = None,
) -> TensorDictModuleBase | None:
    """Wrap a plain ``f(latent, context)`` or ``f(latent, context, action)`` ``-> [..., 1]``.

    The number of its arguments (of a module: of its ``forward``) that have no default tells a state
    value from a Q-function. One of three arguments that ignores the action can be declared a state
    value: by ``reads_action=False`` here, or by an attribute of that name of the module or its
    class. It is then called with ``None`` for the action. A TensorDict module passes through: its
    ``in_keys`` tell.

    Args:
        module: the value.
        in_keys: of the latent state, the context and the action.
        argument: what the module was handed in as, for the text of an error.
        reads_action: whether it is a Q-function; ``None``: see above.

    Raises:
        TypeError: if it does not take two or three arguments, cannot be called, or is a
            :class:`RewardNet`; or if ``reads_action`` is no bool.
        ValueError: if ``reads_action`` is True for a module of two arguments.

    Example:
        >>> import torch
        >>> def of_all(latent, context, action):
        ...     return latent.sum(-1, keepdim=True)
        >>> value = as_value_module(of_all, reads_action=False)
        >>> value.in_keys, value(torch.ones(4, 3), torch.zeros(4, 0)).shape
        (['latent', 'context'], torch.Size([4, 1]))
    """
    if isinstance(module, RewardNet):
        raise TypeError(
            f"{argument}: expected a value, got a RewardNet. Swap it with the argument for the "
            "reward."
        )
    signature = "f(latent, context) or f(latent, context, action)"
    if _needs_no_wrapping(module, argument, signature):
        return module
    n_args = _count_required_arguments(module)
    if n_args not in (2, 3):
        name = getattr(module, "__name__", type(module).__name__)
        name += ".forward" if isinstance(module, nn.Module) else ""
        raise TypeError(
            f"{argument}: a plain module must be {signature}, but {name} takes {n_args} arguments. "
            "Wrap it in a tensordict.nn.TensorDictModule to name what it reads."
        )
    if reads_action is None:
        reads_action = getattr(module, "reads_action", n_args == 3)
    check_flag(f"{argument}: reads_action", reads_action)
    if reads_action and n_args == 2:
        raise ValueError(f"{argument}: reads_action is True, but it takes no action.")
    if n_args == 3 and not reads_action:
        module = _WithoutAction(module)
    out_key = keys.STATE_ACTION_VALUE if reads_action else keys.STATE_VALUE
    return _wrap(module, argument, in_keys[: 3 if reads_action else 2], out_key)


def as_termination_module(
    module: nn.Module | Callable[..., Tensor] | None, in_keys: Sequence[NestedKey] = _IN_KEYS
) -> TensorDictModuleBase | None:
    """Wrap a plain ``f(latent, context, action, next_latent) -> [..., 1]``.

    It returns the probability that the step terminates, or bools. A TensorDict module, which reads
    any of these by its ``in_keys``, passes through.

    Raises:
        TypeError: if it cannot be called.
    """
    argument = "termination_fn"
    if _needs_no_wrapping(module, argument, "f(latent, context, action, next_latent)"):
        return module
    names = [*in_keys, unravel_key(("next", in_keys[0]))]
    return _wrap(module, argument, names, keys.TERM_PROB)


def reads_action(module: TensorDictModuleBase, action_key: NestedKey = keys.ACTION) -> bool:
    """Tell a Q-function from a state value by what it reads."""
    return action_key in module.in_keys


def head_entries(
    names: Sequence[NestedKey],
    latent: Tensor,
    context: Tensor,
    action: Tensor | None,
    action_dim: int,
    *,
    indices: bool = True,
) -> dict[NestedKey, Tensor]:
    """Name what a reward or value module reads, for :func:`evaluate`.

    ``names`` are those of the latent state, the context and the action ``[..., A]``, with
    ``indices`` also ``[...]``; ``None`` is no entry. ``action_dim`` is ``A``.

    Raises:
        ValueError: if the shape of ``action`` does not fit: a plain module might broadcast it.
    """
    entries = dict(zip(names[:2], (latent, context), strict=True))
    if action is not None:
        action_features(action, latent.shape[:-1], action_dim, indices=indices)
        entries[names[2]] = action
    return entries


def evaluate(module: TensorDictModuleBase, entries: Mapping[NestedKey, Tensor]) -> Tensor:
    """Evaluate a reward or value module, or any that reads a subset of ``entries``.

    These are tensors of one leading shape, the latent state first. They are cast to the dtype of
    the module's parameters. Returns the module's first output ``[..., 1]``, cast to float32 unless
    it holds integers or bools.

    Raises:
        KeyError: if the module reads an entry that is not there.
        TypeError: if the output is no tensor.
        ValueError: if the output is not ``[..., 1]``.
    """
    missing = [key for key in module.in_keys if key not in entries]
    name = getattr(module, "argument", None) or type(module).__name__
    if missing:
        raise KeyError(f"{name} reads {missing}, but there is only {[*entries]}.")
    shape = next(iter(entries.values())).shape[:-1]
    if isinstance(module, LatentFunction):
        out = module.evaluate(entries)
    else:
        own = dict(zip(entries, in_dtype_of(module, *entries.values()), strict=True))
        out = module(TensorDict(own, batch_size=shape)).get(module.out_keys[0])
    if not isinstance(out, Tensor):
        raise TypeError(
            f"{name} must return a tensor [..., 1], here {[*shape, 1]}, got {out!r} "
            f"({type(out).__name__})."
        )
    if out.shape != (*shape, 1):
        raise ValueError(
            f"{name} must return [..., 1], here {[*shape, 1]}, got shape {list(out.shape)}."
        )
    return as_float32(out)


class _WithoutAction(nn.Module):
    """Call ``f(latent, context, action)``, which ignores the action, with ``None`` for it."""

    def __init__(self, function: nn.Module | Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, latent: Tensor, context: Tensor) -> Tensor:
        return self.function(latent, context, None)


def _needs_no_wrapping(
    module: Any, argument: str, signature: str
) -> TypeGuard[TensorDictModuleBase | None]:
    if module is None or isinstance(module, TensorDictModuleBase):
        return True
    if not callable(module):
        raise TypeError(
            f"{argument}: expected a module or a function {signature}, got {module!r} "
            f"({type(module).__name__})."
        )
    return False


def _wrap(
    module: nn.Module | Callable[..., Tensor],
    argument: str,
    in_keys: Sequence[NestedKey],
    out_key: NestedKey,
) -> LatentFunction:
    wrapped = LatentFunction(module, in_keys=list(in_keys), out_keys=[out_key])
    wrapped.argument = argument
    return wrapped


def _count_required_arguments(module: nn.Module | Callable[..., Tensor]) -> int:
    function = module.forward if isinstance(module, nn.Module) else module
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(x.kind in kinds and x.default is x.empty for x in parameters)
