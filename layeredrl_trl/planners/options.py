"""The options of a planner, and an error in its own name for those that it does not have."""

from __future__ import annotations

import inspect
from typing import Any

from layeredrl_trl.planners.scoring import CandidateReturn

REQUIRED: Any = None
"""Default of an option that has none: so that it is missed in the planner's own name."""


def check_options(planner: type, needed: dict[str, Any], others: dict[str, Any]) -> None:
    """Check that a planner got what it needs and nothing that it does not know.

    Args:
        planner: its class.
        needed: options that it cannot do without; ``REQUIRED`` where one did not come.
        others: what is left for :class:`~layeredrl_trl.planners.CandidateReturn`.

    Raises:
        TypeError: naming what is missing or unknown.
    """
    missing = [name for name, value in needed.items() if value is REQUIRED]
    if missing:
        raise TypeError(f"{planner.__name__} needs the options {', '.join(missing)}.")
    unknown = sorted(others.keys() - _keyword_only(CandidateReturn))
    if unknown:
        known = {name for base in planner.__mro__ for name in _keyword_only(base)}
        known |= _keyword_only(CandidateReturn)
        raise TypeError(
            f"{planner.__name__} has no option {', '.join(unknown)}; it has "
            f"{', '.join(sorted(known))}."
        )


def _keyword_only(cls: type) -> set[str]:
    """Names of the arguments that the constructor of a class itself takes by name only."""
    init = vars(cls).get("__init__")
    if init is None or not inspect.isfunction(init):
        return set()
    parameters = inspect.signature(init).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
