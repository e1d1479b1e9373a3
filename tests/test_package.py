"""What the package says of itself: version, metadata, extras, tested versions, make's targets."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import layeredrl_trl

ROOT = Path(__file__).parents[1]
NAME = "layeredrl_trl"
# Made when the package was installed: `make install` after a change of pyproject.toml.
METADATA = importlib.metadata.metadata(NAME)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

EXTRAS = {
    "demo",
    "dev",
    "dm-control",
    "docs",
    "mujoco",
    "offline",
    "onnx",
    "robotics",
    "test",
}


def load_check_wheel():
    """The script of CI as a module; it lies in no package."""
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / ".ci" / "check_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_wheel = load_check_wheel()


def pins(name):
    """Versions by package of a constraints file; None where it gives none."""
    lines = (ROOT / name).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith(("#", "-"))]
    return {
        canonicalize_name(requirement.name): next(
            (specifier.version for specifier in requirement.specifier), None
        )
        for requirement in requirements
    }


def requirements():
    """Everything that the library and its extras ask for, but for its own extras."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [Requirement(text) for texts in lists for text in texts]
    return [requirement for requirement in found if requirement.name != NAME]


# The version.


def test_version_is_that_of_the_metadata():
    assert layeredrl_trl.__version__ == METADATA["Version"] == importlib.metadata.version(NAME)


def test_version_follows_pep_440_and_is_not_behind_the_fallback():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["version"]
    assert Version(layeredrl_trl.__version__) >= Version(settings["fallback-version"])


# The metadata.


def test_readme_is_the_long_description():
    assert METADATA["Description-Content-Type"] == "text/markdown"
    title = (ROOT / "README.md").read_text().splitlines()[0]
    assert METADATA["Description"].lstrip().startswith(title)


def test_licence_and_authors_are_those_of_the_licence_file():
    licence = (ROOT / "LICENSE").read_text()
    assert licence.startswith(f"{METADATA['License-Expression']} License")
    assert METADATA.get_all("License-File") == ["LICENSE"]
    assert f"{METADATA['Author']}\n" in licence


@pytest.mark.parametrize(
    "classifier",
    [
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
def test_classifier(classifier):
    assert classifier in METADATA.get_all("Classifier")


def test_the_package_is_marked_as_typed():
    assert (Path(layeredrl_trl.__file__).parent / "py.typed").is_file()


def test_urls_are_addresses_or_paths_of_the_repository():
    urls = dict(url.split(", ", 1) for url in METADATA.get_all("Project-URL", []))
    assert {"Homepage", "Documentation", "Changelog"} <= set(urls)
    lost = [url for url in urls.values() if not url.startswith("https://")]
    assert [url for url in lost if not (ROOT / url).exists()] == []


def test_extras():
    assert set(METADATA.get_all("Provides-Extra")) == EXTRAS


# The tested versions.


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_requirement_is_pinned_to_a_version_that_it_allows(requirement):
    version = pins("constraints.txt")[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


def test_next_constraints_take_their_versions_from_the_tested_ones():
    unpinned = {name for name, version in pins("constraints-next.txt").items() if version is None}
    assert unpinned <= set(pins("constraints.txt"))


# Make.


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = re.findall(r"^  ([a-z-]+) +\S", shown.stdout, re.MULTILINE)
    targets = [row for row in rows if row != "make"]
    assert sorted(targets) == sorted(phony.split())


# What CI's script refuses.


INFO = [f"{NAME}-1.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL")]
GOOD = [f"{NAME}/__init__.py", f"{NAME}/py.typed", f"{NAME}-1.dist-info/licenses/LICENSE", *INFO]


def test_good_wheel_passes():
    check_wheel.check_content(GOOD, "1", {f"{NAME}/__init__.py"})


@pytest.mark.parametrize("lost", [name for name in GOOD if name not in INFO])
def test_wheel_that_lacks_a_file_is_refused(lost):
    names = [name for name in GOOD if name != lost]
    with pytest.raises(check_wheel.Failure, match=rf"lacks \['{lost}'\]"):
        check_wheel.check_content(names, "1", {f"{NAME}/__init__.py"})


@pytest.mark.parametrize("stray", ["tests/__init__.py", "tutorials/01.py", f"{NAME}/notes.txt"])
def test_wheel_with_a_stray_file_is_refused(stray):
    with pytest.raises(check_wheel.Failure, match=rf"\['{stray}'\] do not belong"):
        check_wheel.check_content([*GOOD, stray], "1", {f"{NAME}/__init__.py"})


def metadata_text(**changes):
    fields = {
        "Name": NAME,
        "Version": "1",
        "License-Expression": "MIT",
        "Description-Content-Type": "text/markdown",
        "text": (ROOT / "README.md").read_text(),
    } | changes
    text = fields.pop("text")
    return "".join(f"{name}: {value}\n" for name, value in fields.items()) + "\n" + text


def test_good_metadata_passes():
    check_wheel.check_metadata(metadata_text(), "1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Version": "2"}, "Version is '2'"),
        ({"License-Expression": "Apache-2.0"}, "License-Expression is 'Apache-2.0'"),
        ({"text": "# Another page\n"}, "long description is not README.md"),
    ],
)
def test_wrong_metadata_is_refused(changes, message):
    with pytest.raises(check_wheel.Failure, match=message):
        check_wheel.check_metadata(metadata_text(**changes), "1")
