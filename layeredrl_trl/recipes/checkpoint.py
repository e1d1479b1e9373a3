"""Checkpoints: everything that a run needs to go on, in a file that is always complete."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.config import RecipeError, TrainConfig

_FORMAT = "layeredrl_trl.recipe/1"


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
        options = vars(self.config).items()
        config = {name: str(x) if isinstance(x, Path) else x for name, x in options}
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                torch.save({"format": _FORMAT, **vars(self), "config": config}, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except RuntimeError as error:  # torch.save reports a full disk in this way
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise OSError(f"cannot write {str(path)!r}: {reason}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> Checkpoint:
        """Read a file that :meth:`save` wrote; ``device`` replaces the device in the config.

        Raises:
            RecipeError: if the file does not exist or is not a checkpoint of this recipe.
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
        options = content["config"]
        if unknown := sorted(options.keys() - {field.name for field in fields(TrainConfig)}):
            raise RecipeError(
                f"checkpoint: {str(path)!r} is of another version, with the unknown options "
                f"{unknown}."
            )
        options |= {"logdir": Path(options["logdir"]), "device": device}
        return cls(**content | {"config": TrainConfig(**options)})


def restore(predictor: RewardPredictor, state: dict[str, Any], path: Path) -> None:
    """Load the ``state`` that the checkpoint ``path`` holds into ``predictor``.

    Raises:
        RecipeError: if the state belongs to another architecture; ``predictor`` is not changed.
    """
    here, there = (
        {key: list(x.shape) for key, x in entries.items() if isinstance(x, torch.Tensor)}
        for entries in (predictor.state_dict(), state)
    )
    differing = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
    if differing:
        key = differing[0]
        raise RecipeError(
            f"checkpoint: {str(path)!r} is of another architecture: {len(differing)} entries "
            f"differ, the first is {key!r} (here {here.get(key, 'missing')}, in the file "
            f"{there.get(key, 'missing')})."
        )
    predictor.load_state_dict(state)
