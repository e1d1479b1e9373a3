"""The blocks of docs/training.md run, one after the other."""

import re
from pathlib import Path

import torch

from layeredrl_trl.checkpoints import latest_whole

PAGE = Path(__file__).parents[1] / "docs" / "training.md"


def test_the_page_does_what_it_says(tmp_path):
    scope = {"RUN": str(tmp_path)}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), scope)
    first, resumed = scope["trainer"], scope["resumed"]
    assert first.collected_frames == 120 and resumed.collected_frames == 200
    assert resumed.optimization_stepper.steps == 100
    assert latest_whole(resumed.checkpoint_rotation).name.endswith("200")
    rows = resumed.replay_buffer.storage._storage[:200]
    # the episode of the stop went on: each step begins where the one before has led
    goes_on = ~rows["next", "done"][:-1, 0]
    assert torch.equal(rows["next", "observation"][:-1][goes_on], rows["observation"][1:][goes_on])
