"""The folder of a run: its checkpoints, its lock, and the options that it was started with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout
from torchrl.checkpoint import CheckpointError, CheckpointRotation

from layeredrl_trl.checkpoints import (
    StoredRows,
    WholeCheckpoint,
    latest_whole,
    remove_leftovers,
    set_damaged_aside,
)
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.config import TrainConfig
from layeredrl_trl.recipes.errors import RecipeError, describe, quote

_KEPT = 2
_OF_THIS_PROCESS = ("resume", "device", "logdir")


class RunFolder:
    """The folder of a run.

    Args:
        path: the folder; it exists.

    Attributes:
        rotation: its latest checkpoints, in ``checkpoints/``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rotation = CheckpointRotation(path / "checkpoints", keep_last=_KEPT)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to the folder, and clear up after those that ended.

        Damaged checkpoints that are newer than the latest whole one are renamed.

        Raises:
            RecipeError: if another one writes to it.
        """
        try:
            with FileLock(self.path / ".lock", blocking=False):
                remove_leftovers(self.rotation.directory)
                set_damaged_aside(self.rotation)
                yield
        except Timeout as error:
            raise RecipeError(
                f"resume: another process is writing to {quote(self.path)}; wait for it, or copy "
                "the folder."
            ) from error

    def checkpoint(self, config: TrainConfig) -> WholeCheckpoint:
        """Make the checkpoint of a run, which saves the options."""
        options = {name: _plain(value) for name, value in vars(config).items()}
        options = {name: x for name, x in options.items() if name not in _OF_THIS_PROCESS}
        # read-only, because loading a checkpoint would put its options into a dictionary
        return WholeCheckpoint(config=MappingProxyType(options))

    def stored_rows(self) -> StoredRows:
        """Make the adapter by which checkpoints save each row of a buffer once."""
        return StoredRows(self.path / "rows")

    def latest(self) -> Path:
        """Return the latest checkpoint that is whole.

        Raises:
            RecipeError: if there is none.
        """
        if not self.path.is_dir():
            raise RecipeError(f"run: there is no folder {quote(self.path)}.")
        found = latest_whole(self.rotation)
        if found is None:
            raise RecipeError(
                f"run: {quote(self.path)} holds no whole checkpoint of `layeredrl_trl train`; give "
                "the folder of a run."
            )
        return found

    def read_config(self, path: Path, *, device: str, env: str | None = None) -> TrainConfig:
        """Read the options that the checkpoint ``path`` holds.

        Args:
            path: from :meth:`latest`.
            device: of this process.
            env: id of the environment, if the user has given it. An id with a module, which is
                imported, is taken from the user only: a file names no code.

        Raises:
            RecipeError: if the options are those of another version, or an id with a module is not
                given.
        """
        options: dict[str, Any] = {}
        try:
            WholeCheckpoint(config=options).load(path, components=["config"])
            unknown = sorted(options.keys() - {field.name for field in fields(TrainConfig)})
            if unknown:
                raise RecipeError(f"it has the unknown options {unknown}, of another version")
            config = TrainConfig(**options, device=device, logdir=self.path.parent)
        except (CheckpointError, RecipeError, TypeError) as error:
            raise RecipeError(f"run: {quote(path)} cannot be used: {error}") from error
        if ":" in config.env and env != config.env:
            raise RecipeError(
                f"env: the run is of {quote(config.env)}, whose module would be imported; give "
                "--env with this id if you trust it."
            )
        return config

    def load_predictor(self, predictor: RewardPredictor, path: Path) -> None:
        """Load the predictor that the checkpoint ``path`` holds.

        Raises:
            RecipeError: if it is of another architecture; nothing is changed then.
        """
        try:
            WholeCheckpoint(predictor=predictor).load(path)
        except CheckpointError as error:
            raise RecipeError(f"run: {quote(path)} cannot be used: {describe(error)}") from error


def _plain(value: Any) -> Any:
    """Convert an option to what JSON holds: no paths, no numbers of NumPy."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, Integral) else value
