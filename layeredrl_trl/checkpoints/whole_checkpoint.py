"""Checkpoints whose content is verified, and that are loaded as a whole or not at all."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrl.checkpoint import (
    Checkpoint,
    CheckpointAdapter,
    CheckpointError,
    CheckpointLoadResult,
    CheckpointOptions,
    CheckpointRotation,
    DumpLoadCheckpointAdapter,
    GlobalRNGState,
    JSONCheckpointAdapter,
    StateDictCheckpointAdapter,
)
from torchrl.data import ReplayBuffer

from layeredrl_trl.checkpoints.checksums import CHECKSUMS, seal, verify
from layeredrl_trl.checkpoints.publishing import publish, remove, set_aside, stage_for
from layeredrl_trl.checkpoints.state_file import StateFile

_MANIFEST = "manifest.json"
_PAYLOADS = {
    StateDictCheckpointAdapter.adapter_id: {
        StateDictCheckpointAdapter.state_consolidated,
        StateDictCheckpointAdapter.schema_filename,
    },
    JSONCheckpointAdapter.adapter_id: {JSONCheckpointAdapter.state_filename},
}
_PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".t")
_SHOWN = 300  # characters of an error of somebody else


class WholeCheckpoint(Checkpoint):
    """TorchRL's ``Checkpoint`` that is verified before it is loaded, and loaded all or nothing.

    Saving adds a list of the sha256 of every file, the manifest included (``checksums.sha256``),
    flushes everything to the disk and only then gives the folder its name: a checkpoint that
    :meth:`save` returned survives ``kill -9`` and a power cut, and at every moment of a save over
    an older one of the same name there is a whole one. The cost is that of what is new: an adapter
    that knows the sha256 of files already on the disk (``known_digests``, as
    :class:`~layeredrl_trl.checkpoints.stored_rows.StoredRows` has it) spares reading them. When a
    save fails, older checkpoints are as before; adapters with an ``end_save(kept=...)`` are told.

    Loading reads nothing from a checkpoint with a missing, surplus, swapped or changed file, or a
    link. Where a component refuses what it gets, all components get back the state that they had:
    by ``load_state_dict`` of their own earlier state, by ``restore_point(component)`` of their
    adapter, or, mappings and lists, in place. A ``GlobalRNGState`` is set after all others.

    No file can name code: state dicts are stored as one file of numbers and one of JSON
    (TorchRL's payload format ``"consolidated"``), and any other format is refused, as are
    components that TorchRL would save by ``dump`` or ``pickle``. The checksums find damage, not
    forgery: whoever can write to the folder can write numbers of their choice.

    A replay buffer needs an adapter, see :class:`~layeredrl_trl.checkpoints.StoredRows`.

    Args:
        format: must be ``"directory"``.
        strict: must be ``"error"``.
        save_components: names of the components to save by default; None: all.
        **components: named objects with a ``state_dict``, or JSON values.

    Raises:
        ValueError: ``format`` or ``strict`` is another one.
        CheckpointError: when saving or loading: one line that names the checkpoint and says what
            is wrong.

    Example:
        >>> import tempfile
        >>> import torch
        >>> layer, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     path = WholeCheckpoint(layer=layer).save(f"{run}/checkpoint-1")
        ...     sorted(WholeCheckpoint(layer=other).load(path).loaded)
        ['layer']
        >>> torch.equal(layer.weight, other.weight)
        True
    """

    def __init__(
        self,
        *,
        format: str = "directory",
        strict: str = "error",
        save_components: Collection[str] | None = None,
        **components: Any,
    ) -> None:
        _check_option("format", format, "directory")
        _check_option("strict", strict, "error")
        super().__init__(save_components=save_components, **components)

    def save(
        self,
        path: str | Path,
        *,
        components: Collection[str] | None = None,
        component_options: Mapping[str, CheckpointOptions] | None = None,
        format: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Path:
        """Save components, list the content of all files, and publish the folder at once.

        Args:
            path: of the folder to make; an older checkpoint there is replaced.
            components: names of those to save; None: the default of this checkpoint.
            component_options: arguments for some components.
            format: None or ``"directory"``.
            metadata: JSON values for the manifest.

        Returns:
            The absolute path.
        """
        if format is not None:
            _check_option("format", format, "directory")
        destination = Path(path).expanduser().absolute()
        stage = stage_for(destination)
        with _named(destination, "cannot be saved"):
            try:
                super().save(
                    stage,
                    components=components,
                    component_options=component_options,
                    metadata=metadata,
                )
                seal(stage, self._known_digests(stage))
                publish(stage, destination)
            except BaseException:
                self._end_saves(kept=False)
                remove(stage)
                raise
            self._end_saves(kept=True)
        return destination

    def load(
        self,
        path: str | Path,
        *,
        components: Collection[str] | None = None,
        component_options: Mapping[str, CheckpointOptions] | None = None,
        map_location: Any = None,
        tensor_load_kwargs: Mapping[str, Any] | None = None,
        strict: str | None = None,
    ) -> CheckpointLoadResult:
        """Verify all files, then load all components or none.

        Args:
            path: of the checkpoint.
            components: names of those to load; None: all that are registered.
            component_options: arguments for some components.
            map_location: device for tensors.
            tensor_load_kwargs: must be empty, see TorchRL.
            strict: None or ``"error"``.

        Returns:
            TorchRL's report.
        """
        if strict is not None:
            _check_option("strict", strict, "error")
        source = Path(path).expanduser().absolute()
        with _named(source, "cannot be loaded"):
            manifest = _verified(source)
            names = set(self.components if components is None else components)
            names &= self.components.keys() & manifest["components"].keys()
            draws = {n for n in names if isinstance(self.components[n], GlobalRNGState)}
            points = [
                self._restore_point(name, (component_options or {}).get(name))
                for name in (*sorted(names - draws), *sorted(draws))
            ]
            try:
                result = super().load(
                    source,
                    components=components,
                    component_options=component_options,
                    map_location=map_location,
                    tensor_load_kwargs=tensor_load_kwargs,
                )
                if draws:  # again, as last: loading another component may have drawn numbers
                    super().load(source, components=draws)
            except BaseException as error:
                for restore in points:
                    _try(restore, error)
                raise
            return result

    @classmethod
    def verify(cls, path: str | Path) -> dict[str, Any]:
        """Check that a checkpoint is whole, without loading it.

        Args:
            path: of the checkpoint.

        Returns:
            Its manifest.

        Raises:
            CheckpointError: if it is not; one line that says what is wrong.
        """
        source = Path(path).expanduser().absolute()
        with _named(source, "is not whole"):
            return _verified(source)

    def _resolve_adapter(self, component: Any) -> CheckpointAdapter:
        """Take TorchRL's choice of an adapter, but none that pickles."""
        adapter, value = super()._resolve_adapter(component), component.value
        if component.adapter is None and _has_state(value) and not isinstance(value, ReplayBuffer):
            by_state = (DumpLoadCheckpointAdapter, StateDictCheckpointAdapter)
            if isinstance(adapter, by_state):
                return StateFile()
        if isinstance(adapter, DumpLoadCheckpointAdapter):
            wanted = "adapter=StoredRows(folder)" if isinstance(value, ReplayBuffer) else "another"
            raise TypeError(
                f"a {type(value).__name__} would be saved by its dump(), whose files may hold "
                f"code; register it with {wanted} adapter"
            )
        form = getattr(adapter, "payload_format", "consolidated")
        if isinstance(adapter, StateDictCheckpointAdapter) and form != "consolidated":
            raise TypeError(
                f"StateDictCheckpointAdapter: expected payload_format='consolidated', got {form!r}"
            )
        return adapter

    def _known_digests(self, stage: Path) -> dict[str, str]:
        """Give the sha256 of files that are on the disk already, by their path in the stage."""
        known = {}
        for name, record in Checkpoint.manifest(stage)["components"].items():
            digests = getattr(self._resolve_adapter(self._components[name]), "known_digests", {})
            known |= {f"{record['path']}/{file}": digest for file, digest in digests.items()}
        return known

    def _end_saves(self, kept: bool) -> None:
        adapters = [one.adapter for one in self._components.values()]
        for adapter in (*adapters, *(adapter for _, adapter in self._adapter_registry)):
            end_save = getattr(adapter, "end_save", None)
            if end_save is not None:
                end_save(kept=kept)

    def _restore_point(self, name: str, options: CheckpointOptions | None) -> Callable[[], None]:
        """Give a function that gives a component the state it has now."""
        registration = self._components[name]
        adapter, value = self._resolve_adapter(registration), registration.value
        options = registration.options.merged(options)
        point = getattr(adapter, "restore_point", None)
        if point is not None:
            return point(value).restore
        if _has_state(value):
            state = copy.deepcopy(
                value.state_dict(*(options.save_args or ()), **(options.save_kwargs or {}))
            )
            args, kwargs = options.load_args or (), options.load_kwargs or {}
            return lambda: value.load_state_dict(state, *args, **kwargs)
        if isinstance(value, MutableMapping):
            items = copy.deepcopy(dict(value))
            return lambda: (value.clear(), value.update(items))[1]
        if isinstance(value, list):
            items = copy.deepcopy(value)
            return lambda: value.__setitem__(slice(None), items)
        if isinstance(adapter, JSONCheckpointAdapter):
            return lambda: None  # it is returned, not changed
        raise TypeError(
            f"component {name!r}: its adapter {type(adapter).__name__} has no restore_point(), and "
            f"{type(value).__name__} no state_dict(), so that a failed load could not be undone"
        )


def latest_whole(rotation: CheckpointRotation) -> Path | None:
    """Find the newest checkpoint of a rotation that is whole, and warn of newer ones that are not.

    Args:
        rotation: whose directory to look at; nothing in it is changed.

    Returns:
        Path of the checkpoint, or None if no checkpoint is whole.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     rotation = CheckpointRotation(run, keep_last=2)
        ...     path = rotation.save(WholeCheckpoint(step={"frames": 5}), step=5)
        ...     latest_whole(rotation) == path
        True
    """
    for path in _newest_first(rotation):
        try:
            WholeCheckpoint.verify(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; an older one is looked for.", stacklevel=2)
        else:
            return path
    return None


def set_damaged_aside(rotation: CheckpointRotation) -> list[Path]:
    """Rename the checkpoints that are newer than the latest whole one, so that none is in its way.

    A rotation counts a damaged checkpoint as the newest, and would remove the next one that is
    saved by a run which goes on from an older one. Call it before such a run goes on.

    Args:
        rotation: whose directory to look at.

    Returns:
        The new paths, ``damaged-`` before the name.
    """
    moved = []
    for path in _newest_first(rotation):
        try:
            WholeCheckpoint.verify(path)
        except CheckpointError:
            target, number = path.with_name(f"damaged-{path.name}"), 1
            while os.path.lexists(target):
                number += 1
                target = path.with_name(f"damaged-{path.name}-{number}")
            os.rename(path, target)
            moved.append(target)
        else:
            break
    return moved


def _newest_first(rotation: CheckpointRotation) -> list[Path]:
    """List what has the name of a checkpoint of a rotation, whatever is in it.

    The rotation itself lists only those whose manifest can be read.
    """
    start, steps = f"{rotation.prefix}-", {}
    if not rotation.directory.is_dir():
        return []
    for path in rotation.directory.iterdir():
        name = path.name
        if name.startswith(f".{start}") and ".backup-" in name:  # a save was killed
            name = name[1:].split(".backup-")[0]
            if set_aside(rotation.directory, name) != path:
                continue
        step = name.removeprefix(start)
        if name.startswith(start) and step.isdecimal() and step.isascii():
            steps[path] = int(step)
    return sorted(steps, key=lambda path: (steps[path], path.name), reverse=True)


def _verified(source: Path) -> dict[str, Any]:
    """Check all files of a checkpoint and give its manifest."""
    files = verify(source)
    if _MANIFEST not in files:
        raise CheckpointError(f"it has no {_MANIFEST}")
    manifest = Checkpoint.manifest(source)
    others = files - {_MANIFEST, CHECKSUMS}
    for name, record in manifest["components"].items():
        prefix = f"{record['path']}/"
        own = {file.removeprefix(prefix) for file in others if file.startswith(prefix)}
        others -= {f"{prefix}{file}" for file in own}
        if record["adapter"] == DumpLoadCheckpointAdapter.adapter_id:
            raise CheckpointError(f"component {name!r} was saved by dump(), which may hold code")
        allowed = _PAYLOADS.get(record["adapter"], own)
        pickled = {file for file in own if file.endswith(_PICKLED)}
        if own - allowed or pickled:
            first = min(own - allowed or pickled)
            raise CheckpointError(
                f"component {name!r} is of a format that is not accepted: {first!a}"
            )
    if others:
        raise CheckpointError(f"{min(others)!a} belongs to no component")
    return manifest


def _has_state(value: Any) -> bool:
    names = ("state_dict", "load_state_dict")
    return all(callable(getattr(value, name, None)) for name in names)


def _try(restore: Callable[[], None], cause: BaseException) -> None:
    """Give a component its state back, and the others theirs if it refuses its own."""
    try:
        restore()
    except Exception as error:
        cause.args = (f"{cause} Nor could a component get its earlier state back: {error}",)


def _check_option(name: str, value: Any, only: str) -> None:
    if value != only:
        raise ValueError(f"WholeCheckpoint: {name}: expected {only!r}, got {value!r}.")


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """Make any error one line that names the checkpoint."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
        text = " ".join(f"{kind}{error}".split())
        if len(text) > _SHOWN:
            text = f"{text[:_SHOWN]} ..."
        text = text.rstrip(". ")
        raise CheckpointError(
            f"checkpoint {str(path)!a} {what}: {text}", getattr(error, "result", None)
        ) from error
