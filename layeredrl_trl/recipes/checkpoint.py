"""Checkpoints: everything needed to act again, in one file that is never half written."""

from __future__ import annotations

import dataclasses
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.config import RecipeError, TrainConfig

_FORMAT = "layeredrl_trl.recipe/1"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to act again, and to go on.

    Attributes:
        config: of the run.
        frames: env steps taken.
        episodes: ``(env steps at its end, return)`` of every finished episode.
        predictor: its ``state_dict``.
        transitions: all that the replay buffer held, by entry.
    """

    config: TrainConfig
    frames: int
    episodes: list[tuple[int, float]]
    predictor: dict[str, Any]
    transitions: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write to ``path``; an older file there is replaced only once the new one is whole.

        Raises:
            OSError: if the disk is full or the folder not writable; the older file stays.
        """
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content["config"] = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self.config).items()
        }
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                torch.save({"format": _FORMAT, **content}, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except RuntimeError as error:  # how torch.save reports a full disk
            raise OSError(f"cannot write {str(path)!r}: {_first_line(error)}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> Checkpoint:
        """Read what :meth:`save` wrote; ``device`` replaces that of the config.

        Raises:
            RecipeError: if there is no such file, or it is no checkpoint of this recipe.
        """
        if not path.is_file():
            raise RecipeError(f"checkpoint: there is no file {str(path)!r}.")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise RecipeError(
                f"checkpoint: {str(path)!r} cannot be read ({type(error).__name__}); is it a whole "
                "checkpoint.pt of `layeredrl_trl train`?"
            ) from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise RecipeError(
                f"checkpoint: {str(path)!r} was not written by `layeredrl_trl train`."
            )
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        if unknown := sorted(set(content["config"]) - known):
            raise RecipeError(
                f"checkpoint: {str(path)!r} is of another version, with the unknown options "
                f"{unknown}."
            )
        options = content["config"] | {"logdir": Path(content["config"]["logdir"])}
        content["config"] = TrainConfig(**options | {"device": device})
        return cls(**content)


def restore(predictor: RewardPredictor, state: dict[str, Any], path: Path) -> None:
    """Load ``state`` into ``predictor``.

    Raises:
        RecipeError: if the state is that of another architecture; nothing is changed then.
    """
    own = predictor.state_dict()
    shapes = {key: x.shape for key, x in own.items() if isinstance(x, torch.Tensor)}
    found = {key: x.shape for key, x in state.items() if isinstance(x, torch.Tensor)}
    differing = sorted(
        key for key in shapes.keys() | found.keys() if shapes.get(key) != found.get(key)
    )
    if differing:
        key = differing[0]
        raise RecipeError(
            f"checkpoint: {str(path)!r} is of another architecture: {len(differing)} entries "
            f"differ, the first is {key!r} (here {_shape(shapes, key)}, in the file "
            f"{_shape(found, key)})."
        )
    predictor.load_state_dict(state)


def _shape(shapes: dict[str, torch.Size], key: str) -> str:
    return str(list(shapes[key])) if key in shapes else "missing"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
