"""Pages of docs/ whose blocks of code stand on their own, one under each title."""

import re
from functools import cache
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def blocks_of(page: str) -> dict[str, list[str]]:
    """The blocks of code of a page by the title that they stand under."""
    text = (DOCS / page).read_text()
    return {
        title: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.M | re.DOTALL)
    }


@cache
def namespace_of(page: str, title: str) -> dict:
    """What the block under a title defines; each runs in a namespace of its own."""
    (block,) = blocks_of(page)[title]
    scope: dict = {}
    exec(compile(block, f"{page}: {title}", "exec"), scope)
    return scope
