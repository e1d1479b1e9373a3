"""The README's example runs, the README stays short, and links of all pages lead somewhere."""

import re
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

MOST_LINES = 130
MOST_WORDS = 80  # in a paragraph

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def paragraphs(text):
    """Prose between blank lines; headings, tables and comments are none, a list item is one."""
    lines = [line.strip() for line in without_code(text).splitlines()]
    lines = ["" if line.startswith(("|", "#", "<!--")) else line for line in lines]
    number = 0
    for line in lines:
        if not line or line.startswith(("- ", "* ")):
            number += 1
        if line:
            yield number, line


def prose(text):
    groups = groupby(paragraphs(text), key=lambda numbered: numbered[0])
    return [" ".join(line for _, line in group) for _, group in groups]


def links(text):
    """Targets of links and pictures, code left out."""
    text = re.sub(r"`[^`\n]*`", "", without_code(text))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(text):
    """What GitHub calls the headings of a page in links."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def test_the_composition_example_runs():
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    scope: dict = {}
    exec(compile(block, str(README), "exec"), scope)
    assert len(scope["buffer"]) == 100
    assert scope["terms"]["loss_reward"].isfinite()


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= MOST_LINES
    assert [text for text in prose(README.read_text()) if len(text.split()) > MOST_WORDS] == []


@each_page
def test_relative_links_lead_somewhere(page):
    for target in links(page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = unquote(target).partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there.read_text()), f"{page.name}: {target}"


def test_links_and_anchors_are_found():
    text = "# One, `two` [x](a.md)\n[x](b.md#c) ![y](c.png) `[z](d.md)`\n```\n[z](e.md)\n```"
    assert links(text) == ["a.md", "b.md#c", "c.png"]
    assert anchors("## One step: of `learn`\n") == {"one-step-of-learn"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n\nthree", ["one two", "three"]),
        ("# title\none\n| a | b |\n", ["one"]),
        ("- one\n  more\n- two", ["- one more", "- two"]),
        ("one\n```\nx = 1\n```\ntwo", ["one", "two"]),
    ],
)
def test_paragraphs_are_told_apart(text, expected):
    assert prose(text) == expected
