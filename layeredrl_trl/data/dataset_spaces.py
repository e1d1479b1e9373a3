"""What the files of a dataset say about its spaces, and the numbers that observations become.

A space is the dictionary that Minari and TorchRL write to JSON: ``{"type": "Box", "shape": [3],
...}``. Observations become vectors as Gymnasium's ``FlattenObservation`` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor
from torchrl.data import Bounded, Categorical, OneHot, TensorSpec, Unbounded

Space = Mapping[str, Any]
Path = tuple[str, ...]

_IMAGE = 32  # Minari takes arrays of bytes of this height and width on for images
_FIELDS = {
    "Box": {"shape": list, "low": (list, int, float), "high": (list, int, float)},
    "Discrete": {"n": int},
    "MultiDiscrete": {"nvec": list},
    "MultiBinary": {"n": (int, list)},
    "Dict": {"subspaces": Mapping},
    "Tuple": {"subspaces": list},
}
_NEARLY_ONE = 1 + 1e-6


class Source(NamedTuple):
    """Steps as they are stored, with TorchRL's names.

    Attributes:
        data: ``[N]`` steps, or ``[episodes, T]``; holds ``observation``, ``action`` and ``"next"``.
        name: of the dataset, for the text of errors.
        observation_space, action_space: ``None`` where nothing is known.
        env_id: of the Gymnasium env that the steps come from, if it is known.
        complete: whether what a step leads to is surely stored, for the last steps of episodes too.
    """

    data: TensorDictBase
    name: str
    observation_space: Space | None = None
    action_space: Space | None = None
    env_id: str | None = None
    complete: bool = False


def checked_space(space: Any, where: str) -> Space:
    """Return a space if it is one: a dictionary with a type, and with what that type needs.

    Raises:
        ValueError: if it is none, or a space inside of it is none.
    """
    kind = space.get("type") if isinstance(space, Mapping) else None
    fields = _FIELDS.get(kind, {}) if isinstance(kind, str) else None
    if fields is None or not all(isinstance(space.get(k), t) for k, t in fields.items()):
        needed = "a space" if not fields else f"a {kind} with {list(fields)}"
        raise ValueError(f"{where}: expected {needed}, got {str(space)[:80]!r}.")
    if "subspaces" in fields:
        inner = space["subspaces"]
        for i, subspace in inner.items() if isinstance(inner, Mapping) else enumerate(inner):
            checked_space(subspace, f"{where}, entry {i!r}")
    return space


def space_entries(space: Space, path: Path = ()) -> dict[Path, Space]:
    """List the spaces inside of a space by their paths, in the order in which they are stored.

    A space that is neither a ``Dict`` nor a ``Tuple`` has one entry, of the empty path.
    """
    subspaces = space.get("subspaces")
    if subspaces is None:
        return {path: space}
    if not isinstance(subspaces, Mapping):
        subspaces = {f"_index_{i}": inner for i, inner in enumerate(subspaces)}
    found: dict[Path, Space] = {}
    for key, inner in subspaces.items():
        found |= space_entries(inner, (*path, key))
    return found


def is_image(space: Space) -> bool:
    """Tell whether a space holds images, as Minari decides it."""
    shape = space.get("shape") or ()
    has_bytes = space["type"] == "Box" and space.get("dtype") == "uint8"
    return has_bytes and len(shape) in (2, 3) and min(shape[:2]) >= _IMAGE


def to_vector(values: Tensor, space: Space | None, name: str) -> Tensor:
    """Turn stored values ``[N, ...]`` into vectors ``[N, K]``, float32; choices become one-hot.

    Raises:
        ValueError: if the space is of a kind that has no vector, or a choice is out of its range.
    """
    n = len(values)
    kind = "Box" if space is None else space["type"]
    if kind in ("Box", "MultiBinary"):
        return values.reshape(n, -1).to(torch.float32)
    if kind == "Discrete":
        return _one_hot(values.reshape(n, 1), [space["n"]], space.get("start", 0), name)
    if kind == "MultiDiscrete":
        sizes = torch.as_tensor(space["nvec"]).flatten().tolist()
        start = torch.as_tensor(space.get("start", 0)).flatten()
        return _one_hot(values.reshape(n, -1), sizes, start, name)
    raise ValueError(f"{name}: a space of type {kind!r} has no vector.")


def action_and_spec(
    action: Tensor | TensorDictBase, space: Space | None, spec: TensorSpec | None, name: str
) -> tuple[Tensor, TensorSpec]:
    """Turn stored actions into what dynamics and planners take, and say what they are.

    Args:
        action: ``[N, ...]``, or entries of it.
        space: of the actions, if it is known.
        spec: of the actions as the caller knows it; goes before ``space`` and before any guess.
        name: of the dataset, for the text of errors.

    Returns:
        Vectors ``[N, A]`` in float32, or one-hot ``[N, A]`` in int64 as TorchRL's ``GymEnv`` has
        them, and their spec.

    Raises:
        ValueError: if the actions are of another kind than one vector or one choice.
    """
    if spec is not None:
        return _as_spec_says(action, spec, name), spec
    if space is not None:
        return _as_space_says(action, space, name)
    if is_tensor_collection(action):
        action = torch.cat([to_vector(x, None, name) for x in action.values(True, True)], -1)
    n = len(action)
    if action.ndim > 1 and action.shape[-1] > 1 and _is_one_hot(action):
        return action.to(torch.int64), OneHot(action.shape[-1], dtype=torch.int64)
    if not action.is_floating_point():
        if action.numel() != n:
            raise ValueError(
                f"{name}: actions {list(action.shape)} of {action.dtype} are several choices at "
                "once, which no dynamics model of this library takes."
            )
        size = int(action.max()) + 1
        one_hot = _one_hot(action.reshape(n, 1), [size], 0, f"{name}: action")
        return one_hot.to(torch.int64), OneHot(size, dtype=torch.int64)
    action = to_vector(action, None, name)
    low, high = action.amin(0), action.amax(0)
    if max(-low.min(), high.max()) <= _NEARLY_ONE:
        low, high = -torch.ones_like(low), torch.ones_like(high)
    return action, Bounded(low, high, low.shape, dtype=torch.float32)


def _as_space_says(
    action: Tensor | TensorDictBase, space: Space, name: str
) -> tuple[Tensor, TensorSpec]:
    entries = space_entries(space)
    kinds = [entry["type"] for entry in entries.values()]
    if kinds == ["Discrete"] and not is_tensor_collection(action):
        one_hot = to_vector(action, space, f"{name}: action").to(torch.int64)
        return one_hot, OneHot(one_hot.shape[-1], dtype=torch.int64)
    if set(kinds) != {"Box"}:
        raise ValueError(
            f"{name}: expected actions that are one choice (Discrete) or vectors (Box, or a Dict "
            f"or Tuple of these), got {kinds}."
        )
    columns = [action.get(path) if path else action for path in entries]
    vector = torch.cat([to_vector(x, None, name) for x in columns], -1)
    low, high = (
        torch.cat([_bound(entry, side) for entry in entries.values()]) for side in ("low", "high")
    )
    if not (low.isfinite() & high.isfinite()).all():
        return vector, Unbounded(low.shape, dtype=torch.float32)
    return vector, Bounded(low, high, low.shape, dtype=torch.float32)


def _as_spec_says(action: Tensor | TensorDictBase, spec: TensorSpec, name: str) -> Tensor:
    got = "several entries"
    if not is_tensor_collection(action):
        n, got = len(action), f"{list(action.shape)} of {action.dtype}"
        are_choices = action.numel() == n and not action.is_floating_point()
        if isinstance(spec, OneHot) and are_choices and spec.shape[-1] > 1:
            return _one_hot(action.reshape(n, 1), [spec.shape[-1]], 0, name).to(spec.dtype)
        if isinstance(spec, Categorical) and not isinstance(spec, OneHot) and are_choices:
            return action.reshape(n, *spec.shape).to(spec.dtype)
        if action.numel() == n * spec.shape.numel():
            return action.reshape(n, *spec.shape).to(spec.dtype)
    raise ValueError(
        f"{name}: action_spec is for actions of shape {list(spec.shape)}, stored are {got}."
    )


def _one_hot(values: Tensor, sizes: Sequence[int], start: int | Tensor, name: str) -> Tensor:
    """Encode choices ``[N, K]`` among ``sizes``, counted from ``start``; float32."""
    values = values.to(torch.int64) - start
    if bool(((values < 0) | (values >= torch.tensor(sizes))).any()):
        raise ValueError(f"{name}: expected choices among {list(sizes)}, got some out of range.")
    columns = zip(values.unbind(-1), sizes, strict=True)
    one_hot = [torch.nn.functional.one_hot(x, size) for x, size in columns]
    return torch.cat(one_hot, -1).to(torch.float32)


def _is_one_hot(action: Tensor) -> bool:
    is_binary = bool(((action == 0) | (action == 1)).all())
    return is_binary and bool((action.sum(-1) == 1).all())


def _bound(space: Space, side: str) -> Tensor:
    bound = torch.as_tensor(space[side], dtype=torch.float32)
    return bound.expand(tuple(space["shape"])).reshape(-1)
