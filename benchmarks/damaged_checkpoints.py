"""Damages a checkpoint in many ways and sees whether a load notices.

    python -m benchmarks.damaged_checkpoints --number 10000

The checkpoint holds a predictor that has learned, its replay buffer, the random numbers and two
counters. Each damaged copy is loaded into a run of other numbers. A copy may be refused by a
CheckpointError of one line, after which the run is as it was; nothing else is right. The kinds
`forged` are sealed again after the damage, as by somebody who knows the format: their checksums are
right, but what they hold is not what can be loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.checkpoint import CheckpointError, GlobalRNGState
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from benchmarks.damage import KINDS, Damage
from layeredrl_trl.checkpoints.stored_rows import StoredRows
from layeredrl_trl.checkpoints.whole_checkpoint import WholeCheckpoint
from layeredrl_trl.data import TransitionSliceSampler
from layeredrl_trl.modules import LinearEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.predictors import RewardPredictor

OUTCOMES = (
    "refused",
    "loaded the same",
    "changed numbers",
    "ran code",
    "other error",
    "not undone",
)
GOOD = OUTCOMES[:2]
_ROWS, _CAPACITY, _CHUNK = 90, 64, 16


class Run:
    """Live objects and the checkpoint that they are registered with."""

    def __init__(self, folder: Path, seed: int, hidden: int = 8) -> None:
        torch.manual_seed(seed)
        self.predictor = _predictor(hidden)
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(_CAPACITY),
            sampler=TransitionSliceSampler(slice_len=2),
            batch_size=8,
            generator=torch.Generator().manual_seed(seed),
        )
        self.counters = {"frames": seed, "updates": 2 * seed}
        self.buffer.extend(_transitions(_ROWS))
        self.predictor.learn(self.buffer, 2, 4, 4, 100)
        self.buffer.sample()
        self.checkpoint = WholeCheckpoint(
            counters=self.counters, predictor=self.predictor, rng=GlobalRNGState()
        )
        rows = StoredRows(folder / f"rows-{seed}", chunk_rows=_CHUNK)
        self.checkpoint.register("buffer", self.buffer, adapter=rows)

    def fingerprint(self) -> str:
        """A hash of all numbers of the run."""
        digest = hashlib.sha256()
        buffer = self.buffer
        content = {
            "rows": buffer.storage._storage[: len(buffer)].to_dict(),
            "last": buffer.storage._last_cursor_index,
            "writer": buffer.writer.state_dict(),
            "generator": buffer._rng.get_state(),
            "predictor": self.predictor.state_dict(),
            "counters": self.counters,
            "rng": GlobalRNGState().state_dict(),
        }
        for part in _parts(content):
            digest.update(part)
        return digest.hexdigest()


def _predictor(hidden: int) -> RewardPredictor:
    encoder, sizes = LinearEncoder((3,), 2, 1), {"hidden_sizes": (hidden,)}
    dynamics = ProbabilisticEnsemble(2, 1, 1, n_models=2, **sizes)
    return RewardPredictor(
        dynamics, ValueNet(2, 1, **sizes), RewardNet(2, 1, 1, **sizes), encoder, 2, 1
    )


def _transitions(n: int) -> TensorDict:
    done = torch.arange(n).remainder(7).eq(6).unsqueeze(-1)
    following = {
        "observation": torch.randn(n, 3),
        "reward": torch.randn(n, 1),
        "terminated": done,
        "truncated": torch.zeros_like(done),
        "done": done.clone(),
    }
    entries = {"observation": torch.randn(n, 3), "action": torch.randn(n, 1), "next": following}
    return TensorDict(entries, batch_size=[n])


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{list(value.shape)}".encode()
        yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key in value:
            yield repr(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()


def outcome(run: Run, copy: Path, intact: str, before: str, canary: Path) -> tuple[str, str]:
    """Load a damaged copy; say how that went, and the text of the error."""
    text = ""
    try:
        run.checkpoint.load(copy)
    except CheckpointError as error:
        text = str(error)
        result = "refused" if "\n" not in text and str(copy) in text else "other error"
    except Exception as error:
        text, result = f"{type(error).__name__}: {error}", "other error"
    else:
        result = "loaded the same" if run.fingerprint() == intact else "changed numbers"
    if result == "refused" and run.fingerprint() != before:
        result = "not undone"
    if canary.exists():
        canary.rmdir()
        result = "ran code"
    return result, text


def try_damage(
    folder: Path, number: int, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Counter[str]]:
    """Damage and load ``number`` copies of a checkpoint; count the outcomes of each kind.

    Raises:
        RuntimeError: if an intact checkpoint no longer loads as it was saved.
    """
    saved, foreign, live = Run(folder, 1), Run(folder, 2, hidden=9), Run(folder, 3)
    older = saved.checkpoint.save(folder / "checkpoint-1", metadata={"step": 1})
    numbers = {older: saved.fingerprint()}
    saved.buffer.extend(_transitions(20))
    saved.predictor.learn(saved.buffer, 1, 4, 4, 100)
    saved.counters["frames"] += 1
    newer = saved.checkpoint.save(folder / "checkpoint-2", metadata={"step": 2})
    numbers[newer] = saved.fingerprint()
    other = foreign.checkpoint.save(folder / "foreign")

    choose, canary, copy = random.Random(seed), folder / "canary", folder / "damaged"
    counts = {kind.__name__: Counter[str]() for kind in KINDS}
    started: dict[str, str] = {}
    before = live.fingerprint()
    for turn in range(number):
        kind = KINDS[turn % len(KINDS)]
        shutil.copytree(newer, copy, copy_function=os.link)
        kind(Damage(copy, choose, older, other, canary))
        result, text = outcome(live, copy, numbers[newer], before, canary)
        counts[kind.__name__][result] += 1
        if result not in GOOD:
            say(f"{kind.__name__}, turn {turn}: {result}: {text}")
            before = live.fingerprint()
        started.setdefault(kind.__name__, text)
        shutil.rmtree(copy)
        if turn % 1000 == 0 or turn == number - 1:
            for path in (newer, older):
                live.checkpoint.load(path)
                if live.fingerprint() != numbers[path]:
                    raise RuntimeError(f"{path} no longer loads as it was saved")
            before = live.fingerprint()
    for name, text in started.items():
        say(f"{name}: {text[:300]}")
    return counts


def table(counts: Mapping[str, Counter[str]]) -> str:
    lines = ["| damage | " + " | ".join(OUTCOMES) + " |", "|---" * (1 + len(OUTCOMES)) + "|"]
    total: Counter[str] = sum(counts.values(), Counter())
    for name, row in (*counts.items(), ("all", total)):
        cells = " | ".join(str(row[result]) for result in OUTCOMES)
        lines.append(f"| {name.replace('_', ' ')} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("torchrl").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = try_damage(Path(folder), options.number, options.seed)
    print(table(counts))
    print(f"{options.number} loads in {time.perf_counter() - started:.0f} s")
    if any(row[result] for row in counts.values() for result in OUTCOMES if result not in GOOD):
        sys.exit(1)


if __name__ == "__main__":
    main()
