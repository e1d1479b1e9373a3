"""Checkpoints: everything that a run needs to go on, in a file that is always complete."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.config import TrainConfig
from layeredrl_trl.recipes.errors import RecipeError, describe, quote
from layeredrl_trl.recipes.files import replacing

_FORMAT = "layeredrl_trl.recipe/1"
_KINDS = {"config": dict, "frames": int, "episodes": list, "predictor": dict, "transitions": dict}


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to act and to go on.

    Attributes:
        config: options of the run.
        frames: number of env steps taken.
        episodes: ``(env steps at its end, return)`` of every finished episode.
        predictor: the predictor's ``state_dict``.
        transitions: the content of the replay buffer, as a nested dictionary of entries.
    """

    config: TrainConfig
    frames: int
    episodes: list[tuple[int, float]]
    predictor: dict[str, Any]
    transitions: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the file ``path``; an older file is replaced only when the new one is complete.

        Raises:
            OSError: if the disk is full or the folder is not writable; an older file stays.
        """
        config = {name: _plain(value) for name, value in vars(self.config).items()}
        try:
            with replacing(path, "wb") as file:
                torch.save({"format": _FORMAT, **vars(self), "config": config}, file)
        except RuntimeError as error:  # torch.save reports a full disk in this way
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise OSError(f"cannot write {str(path)!r}: {reason}") from error

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> Checkpoint:
        """Read a file that :meth:`save` wrote; ``device`` replaces the device in the config.

        Raises:
            RecipeError: if the file does not exist or is not a checkpoint of this recipe.
        """
        shown = quote(path)
        try:
            if path.is_dir():
                raise RecipeError(f"checkpoint: {shown} is a folder; give the file checkpoint.pt.")
            if not path.is_file():
                raise RecipeError(f"checkpoint: there is no file {shown}.")
            with warnings.catch_warnings():  # that this is a file of another kind is an error
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
        except RecipeError:
            raise
        except Exception as error:  # a damaged file makes torch raise errors of many kinds
            raise RecipeError(
                f"checkpoint: {shown} cannot be read ({type(error).__name__}); is it a whole "
                "checkpoint.pt of `layeredrl_trl train`?"
            ) from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise RecipeError(f"checkpoint: {shown} was not written by `layeredrl_trl train`.")
        if not _is_whole(content):
            raise RecipeError(f"checkpoint: {shown} is damaged: it has not the entries it needs.")
        options = content["config"]
        if unknown := sorted(options.keys() - {field.name for field in fields(TrainConfig)}):
            raise RecipeError(
                f"checkpoint: {shown} is of another version, with the unknown options {unknown}."
            )
        try:
            options |= {"logdir": Path(options.get("logdir", "runs")), "device": device}
            config = TrainConfig(**options)
        except (RecipeError, TypeError) as error:
            raise RecipeError(f"checkpoint: an option in {shown} is wrong: {error}") from error
        return cls(**content | {"config": config})


def _is_whole(content: dict[str, Any]) -> bool:
    """Tell whether the content of a file has all its parts, each of its kind."""
    return (
        content.keys() == _KINDS.keys()
        and all(isinstance(content[name], kind) for name, kind in _KINDS.items())
        and content["frames"] >= 0
        and all(isinstance(episode, tuple) and len(episode) == 2 for episode in content["episodes"])
    )


def _plain(value: Any) -> Any:
    """Convert an option to what a checkpoint may hold: no paths, no numbers of NumPy."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, Integral) else value


def restore(predictor: RewardPredictor, state: dict[str, Any], path: Path) -> None:
    """Load the ``state`` that the checkpoint ``path`` holds into ``predictor``.

    Raises:
        RecipeError: if the state belongs to another architecture, ``predictor`` is not changed
            then; or if the state is damaged.
    """
    here, there = (
        {key: list(x.shape) for key, x in entries.items() if isinstance(x, torch.Tensor)}
        for entries in (predictor.state_dict(), state)
    )
    differing = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
    if differing:
        key = differing[0]
        raise RecipeError(
            f"checkpoint: {quote(path)} is of another architecture: {len(differing)} entries "
            f"differ, the first is {key!r} (here {here.get(key, 'missing')}, in the file "
            f"{there.get(key, 'missing')})."
        )
    try:
        predictor.load_state_dict(state)
    except Exception as error:  # it has all tensors, so it is what comes with them
        raise RecipeError(f"checkpoint: {quote(path)} is damaged: {describe(error)}.") from error
