"""Kill a run again and again, and see whether it ends as the run that was never killed.

``python -m benchmarks.killed_runs --kills 50`` starts a small run of the command line, ends its
process by ``kill -9`` after a random time, resumes it, and so on. After each kill the latest
checkpoint that is whole must not be older than the last one that had been published before it. The
run that survived all kills must hold the numbers of the uninterrupted one, to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from torchrl.checkpoint import CheckpointRotation

from layeredrl_trl.checkpoints import latest_whole

_OPTIONS = {
    "updates-per-frame": 0.3,
    "eval-episodes": 1,
    "init-random-frames": 100,
    "hidden-size": 32,
    "planning-horizon": 5,
    "num-candidates": 32,
    "checkpoint-interval": 40,
}
_FROM_HERE = {"config", "manifest.json", "checksums.sha256", "index.json"}


def command(**options: object) -> list[str]:
    """The command line of a run."""
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "layeredrl_trl", "train", *arguments]


def content(run: Path, frames: int) -> dict[str, str]:
    """The digest of every file of a checkpoint but those that say how it was made."""
    folder = run / "checkpoints" / f"checkpoint-{frames:012d}"
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(name in str(file.relative_to(folder)) for name in _FROM_HERE)
    }


def rows(run: Path, frames: int) -> list[str]:
    """What the checkpoint says of the rows of its buffer."""
    folder = run / "checkpoints" / f"checkpoint-{frames:012d}"
    (index,) = folder.glob("components/*-replay_buffer/index.json")
    return json.loads(index.read_text())["chunks"]


def step_of(path: Path | None) -> int:
    return 0 if path is None else int(path.name.rpartition("-")[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds of work before a kill")
    arguments = parser.parse_args()
    generator, failures, kills, done_before = random.Random(arguments.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        options = {"env": arguments.env, "logdir": Path(folder) / "killed", **_OPTIONS}
        run: Path | None = None
        while kills < arguments.kills:
            # long enough that it is never over by itself
            more = {"total-frames": 10**6}
            more |= options if run is None else {"resume": run}
            process = subprocess.Popen(
                command(**more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:  # until it works, and a while longer
                runs = list((Path(folder) / "killed").glob("*"))
                run = runs[0] if runs else None
                rotation = CheckpointRotation(run / "checkpoints", keep_last=2) if run else None
                if rotation is not None and step_of(rotation.latest()) > done_before:
                    break
                time.sleep(0.05)
            time.sleep(generator.uniform(0, arguments.longest))
            published = step_of(rotation.latest())
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            whole = step_of(latest_whole(rotation))
            failures += whole < published
            done_before = whole
            print(f"kill {kills}: published {published}, whole {whole}", flush=True)
        frames = done_before + 40
        for more in ({"resume": run}, options | {"logdir": Path(folder) / "whole"}):
            subprocess.run(
                command(**{"total-frames": frames} | more), check=True, capture_output=True
            )
        (whole,) = (Path(folder) / "whole").iterdir()
        same = content(run, frames) == content(whole, frames)
        same = same and rows(run, frames) == rows(whole, frames)
        same = same and (run / "episodes.csv").read_bytes() == (whole / "episodes.csv").read_bytes()
        print(f"{kills} kills, {failures} lost a checkpoint; after {frames} steps the run", end=" ")
        print("equals the uninterrupted one" if same else "DIFFERS from the uninterrupted one")
    return int(failures > 0 or not same)


if __name__ == "__main__":
    sys.exit(main())
