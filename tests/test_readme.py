"""The README's example runs as it stands there."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_composition_example_runs():
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    scope: dict = {}
    exec(compile(block, str(README), "exec"), scope)
    assert len(scope["buffer"]) == 100
    assert scope["terms"]["loss_reward"].isfinite()
