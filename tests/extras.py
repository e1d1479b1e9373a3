"""Marks for tests that need a package of an extra that may not be installed."""

from importlib.util import find_spec

import pytest


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


needs_dm_control = needs("dm_control")
needs_gymnasium_robotics = needs("gymnasium_robotics")
