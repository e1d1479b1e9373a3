#!/usr/bin/env python3
"""Build the sdist and, from it, the wheel; try the wheel in an environment that has nothing else.

usage: check_wheel.py FOLDER

Both files are in FOLDER afterwards. It fails if

- the wheel holds anything but the package, its licence and its metadata, or lacks one of them;
- the README's example does not run with the wheel and its dependencies, in an empty folder;
- the command line does not say which extra it needs, or does not start with it.

Versions are those of constraints.txt. Needs a network or what pip has stored, and no package.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from email.policy import EmailPolicy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "layeredrl_trl"
# Runs after the README's example.
FACTS = f"""
import importlib.metadata
import {PACKAGE}

assert {PACKAGE}.__version__ == importlib.metadata.version("{PACKAGE}"), {PACKAGE}.__version__
print({PACKAGE}.__file__)
"""


class Failure(Exception):
    """What is wrong with the package."""


def source_files() -> set[str]:
    """Return the files that the package has to bring, as they are named in a wheel."""
    files = (ROOT / PACKAGE).rglob("*")
    return {
        file.relative_to(ROOT).as_posix()
        for file in files
        if file.is_file() and "__pycache__" not in file.parts
    }


def check_content(names: Iterable[str], version: str, sources: set[str]) -> None:
    """Compare the files of a wheel to those it has to hold.

    Raises:
        Failure: if one is missing or too much.
    """
    info = f"{PACKAGE}-{version}.dist-info"
    expected = sources | {f"{PACKAGE}/py.typed"}
    expected |= {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    found = set(names)
    if found != expected:
        lacks, strays = sorted(expected - found), sorted(found - expected)
        raise Failure(f"the wheel lacks {lacks}, and {strays} do not belong into it")


def check_metadata(text: str, version: str) -> None:
    """Compare what an index shows of the package to what the repository says.

    Raises:
        Failure: if a fact is missing or wrong.
    """
    fields = Parser(policy=EmailPolicy(utf8=True)).parsestr(text)
    expected = {
        "Name": PACKAGE,
        "Version": version,
        "License-Expression": "MIT",
        "Description-Content-Type": "text/markdown",
    }
    for name, value in expected.items():
        if fields[name] != value:
            raise Failure(f"{name} is {fields[name]!r} in the metadata, expected {value!r}")
    description = text.split("\n\n", 1)[1]
    if description.strip() != (ROOT / "README.md").read_text(encoding="utf-8").strip():
        raise Failure("the long description is not README.md")


def readme_example() -> str:
    """Return the first Python block of the README.

    Raises:
        Failure: if it has none.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    if block is None:
        raise Failure("README.md has no Python block")
    return block[1]


def run(*command: str | Path, folder: Path, may_fail: bool = False) -> str:
    """Run a command, without this environment's Python settings, and return what it prints.

    Raises:
        Failure: if it fails, unless it may, with what it printed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode and not may_fail:
        line = " ".join(map(str, command))
        raise Failure(f"{line}\nended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def say(text: str, started: float) -> None:
    """Print a line with the seconds since the start."""
    print(f"{time.perf_counter() - started:5.0f} s  {text}", flush=True)


def check(out: Path, work: Path, started: float) -> None:
    """Build and try the package, with `work` for the two environments.

    Raises:
        Failure: if something is wrong with it.
    """
    # One environment to build in, and one without even pip, for the wheel.
    venv.create(work / "tools", with_pip=True)
    venv.create(work / "clean", with_pip=False)
    scripts = "Scripts" if os.name == "nt" else "bin"
    tools, clean = (work / name / scripts / "python" for name in ("tools", "clean"))
    pip = (tools, "-m", "pip")
    run(*pip, "install", "-q", "build", folder=work)
    run(tools, "-m", "build", "--outdir", work / "dist", ROOT, folder=work)
    (sdist,), (wheel,) = (sorted((work / "dist").glob(end)) for end in ("*.tar.gz", "*.whl"))
    version = wheel.name.split("-")[1]
    if sdist.name != f"{PACKAGE}-{version}.tar.gz":
        raise Failure(f"{sdist.name} and {wheel.name} are of two versions")
    with zipfile.ZipFile(wheel) as archive:
        check_content(archive.namelist(), version, source_files())
        metadata = archive.read(f"{PACKAGE}-{version}.dist-info/METADATA").decode()
    check_metadata(metadata, version)
    say(f"{sdist.name} and {wheel.name} hold what they should", started)

    elsewhere = work / "elsewhere"
    elsewhere.mkdir()
    # Not all that is installed is imported: what is, Python compiles then.
    install = (*pip, "--python", clean, "install", "-q", "--no-compile")
    install += ("-c", ROOT / "constraints.txt")
    run(*install, wheel, folder=work)
    say("the wheel is installed, without extras", started)
    (elsewhere / "example.py").write_text(readme_example() + FACTS, encoding="utf-8")
    place = run(clean, "example.py", folder=elsewhere).splitlines()[-1]
    if not Path(place).resolve().is_relative_to((work / "clean").resolve()):
        raise Failure(f"the package was imported from {place}, not from the wheel")
    say("the README's example runs", started)

    command_line = (clean, "-m", PACKAGE, "--help")
    if f"pip install '{PACKAGE}[demo]'" not in run(*command_line, folder=elsewhere, may_fail=True):
        raise Failure("without the demo extra, the command line does not say that it needs it")
    run(*install, f"{PACKAGE}[demo] @ {wheel.as_uri()}", folder=work)
    if "train" not in run(*command_line, folder=elsewhere):
        raise Failure("the help of the command line names no `train`")
    say("the command line asks for its extra, and runs with it", started)

    out.mkdir(parents=True, exist_ok=True)
    for file in (sdist, wheel):
        shutil.copy(file, out)
    say(f"{wheel.name} is good; it is in {out}", started)


def main() -> int:
    """Run the check and return the exit status."""
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="check_wheel-") as work:
            check(Path(sys.argv[1]).resolve(), Path(work), time.perf_counter())
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
