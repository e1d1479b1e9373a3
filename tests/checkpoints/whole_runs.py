"""A component of each kind, registered with a checkpoint."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torchrl.checkpoint import GlobalRNGState

from layeredrl_trl.checkpoints.stored_rows import StoredRows
from layeredrl_trl.checkpoints.whole_checkpoint import WholeCheckpoint
from tests.checkpoints.checkpointed import make_buffer, transitions, whole_state


class Picky:
    """Loads only the number that it has."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["number"] != self.number:
            raise ValueError(f"not mine:\n{state['number']}")


class Everything:
    """One component of each kind."""

    def __init__(self, run: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.Adam(self.layer.parameters(), lr=seed / 10)
        self.layer(torch.rand(5, 3)).sum().backward()
        self.optimizer.step()
        self.buffer = make_buffer(seed=seed)
        self.buffer.extend(transitions(20 + seed, seed))
        self.counters, self.returns = {"frames": seed}, [1.5 * seed]
        self.rng = GlobalRNGState()
        self.checkpoint = WholeCheckpoint(
            layer=self.layer,
            optimizer=self.optimizer,
            counters=self.counters,
            returns=self.returns,
            rng=self.rng,
            name="a run",
        )
        self.rows = StoredRows(run / "rows", chunk_rows=8)
        self.checkpoint.register("buffer", self.buffer, adapter=self.rows)

    def state(self) -> dict:
        return {
            "layer": {k: x.clone() for k, x in self.layer.state_dict().items()},
            "moments": [x["exp_avg"].clone() for x in self.optimizer.state.values()],
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "buffer": whole_state(self.buffer),
            "counters": dict(self.counters),
            "returns": list(self.returns),
            "torch": torch.random.get_rng_state(),
            "numpy": np.random.get_state()[1].tolist(),
            "python": random.getstate(),
        }

    def go_on(self, seed: int) -> None:
        self.buffer.extend(transitions(13, seed))
        self.counters["frames"] += 1
        with torch.no_grad():
            self.layer.weight.add_(1.0)
