"""Gymnasium's registry: ids, the modules that register them, and what wrong ids get."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io

import gymnasium
from gymnasium.envs.registration import EnvSpec

from layeredrl_trl.recipes.errors import RecipeError, describe, quote

# Packages that register environments when they are imported, with what their ids begin with.
_REGISTERING = {
    "gymnasium_robotics": ("PointMaze", "AntMaze", "Fetch", "Hand", "AdroitHand", "FrankaKitchen"),
    "ale_py": ("ALE/",),
}
# How the packages of the extras are called where they are said to be missing.
_EXTRAS = {
    "gymnasium_robotics": "robotics",
    "dm-control": "dm-control",
    "dm_control": "dm-control",
    "mujoco": "mujoco",
}
_FORMS = "Pendulum-v1, NAMESPACE/NAME-v0, MODULE:NAME-v0 or dm_control/cartpole-swingup"


def find_spec(env_id: str) -> EnvSpec:
    """Look an id up in Gymnasium's registry.

    The module that an id names (``MODULE:ID``) is imported first. For an id that is not registered
    the packages that register environments are imported, where they are installed.

    Raises:
        RecipeError: if the module cannot be imported, or nothing is registered under the id.
    """
    module, colon, name = env_id.rpartition(":")
    if colon:
        _import_for(env_id, module)
    elif name not in gymnasium.registry:
        _import_registering(env_id)
    try:
        return gymnasium.spec(name)
    except (gymnasium.error.Error, AssertionError, ValueError) as error:
        raise RecipeError(
            f"env: Gymnasium has no environment {quote(env_id)}; {_hint(name, error)}."
        ) from error


def missing_package(env_id: str, error: Exception) -> RecipeError:
    """Make the error to raise where a registered environment needs a package that is missing."""
    text = str(error).rstrip(".")
    advice = _extra_for(text) or "install it"
    if newer := _newer_version(gymnasium.registry.get(env_id.rpartition(":")[2])):
        advice = f"a newer version is {newer}"  # old versions need packages of their time
    return RecipeError(
        f"env: {quote(env_id)} needs a package that is not installed ({text}); {advice}."
    )


def _import_for(env_id: str, module: str) -> None:
    """Import the module that an id names."""
    shown = f"the module {quote(module)} of the id {quote(env_id)}"
    if not module or ":" in module:
        raise RecipeError(f"env: {shown} cannot be one; an id looks like {_FORMS}.")
    try:
        _import(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            reason = "is not found"
            advice = _extra_for(module) or "run where Python finds it, or set PYTHONPATH"
        else:
            reason = f"cannot be imported ({describe(error)})"
            advice = _extra_for(str(error)) or "mend the module"
        raise RecipeError(f"env: {shown} {reason}; {advice}.") from error


def _import_registering(env_id: str) -> None:
    """Import the packages that register environments; only what the id needs must be there."""
    for package, beginnings in _REGISTERING.items():
        try:
            _import(package)
        except Exception as error:
            if not env_id.startswith(beginnings):
                continue
            extra = _EXTRAS.get(package)
            name = f"'layeredrl_trl[{extra}]'" if extra else package.replace("_", "-")
            missing = isinstance(error, ModuleNotFoundError) and error.name == package
            reason = "not installed" if missing else f"broken ({describe(error)})"
            raise RecipeError(
                f"env: {quote(env_id)} needs a package that is {reason}: pip install {name}."
            ) from error


def _import(module: str) -> None:
    """Import a module; the messages of registering packages are not shown."""
    quiet = contextlib.redirect_stderr(io.StringIO())
    with quiet if module in _REGISTERING else contextlib.nullcontext():
        importlib.import_module(module)


def _hint(name: str, error: Exception) -> str:
    """Tell what to write in place of an id that is not registered."""
    if similar := difflib.get_close_matches(name, gymnasium.registry, n=3):
        return f"similar: {', '.join(similar)}"
    if isinstance(error, gymnasium.error.UnregisteredEnv):
        return f"{str(error).rstrip('.')}; see `gymnasium.pprint_registry()`"
    return f"an id looks like {_FORMS}"


def _extra_for(text: str) -> str:
    """Tell how to install a package that the text of an error names, nothing for an unknown one."""
    named = [extra for package, extra in _EXTRAS.items() if package in text.lower()]
    return f"pip install 'layeredrl_trl[{named[0]}]'" if named else ""


def _newer_version(spec: EnvSpec | None) -> str:
    """Return the id of the newest version of an environment, nothing if there is none newer."""
    if spec is None:
        return ""
    family = [
        other
        for other in gymnasium.registry.values()
        if (other.namespace, other.name) == (spec.namespace, spec.name)
    ]
    newest = max(family, key=lambda other: other.version or 0)
    return "" if newest.version == spec.version else newest.id
