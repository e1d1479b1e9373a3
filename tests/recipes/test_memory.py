"""The memory that a run needs, told before it begins."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from layeredrl_trl.recipes import RecipeError, TrainConfig, make_env, memory
from layeredrl_trl.recipes.agent import Spaces
from tests.recipes.tiny_runs import TINY

GIB = 2**30


@pytest.fixture(scope="module")
def env():
    return Spaces.of(make_env("Pendulum-v1"))


@pytest.fixture
def machine(monkeypatch):
    def of(gib):
        monkeypatch.setattr(memory, "machine_memory", lambda: gib * GIB)

    of(16)
    return of


def test_the_defaults_fit_into_a_small_machine(env, machine):
    machine(1)
    memory.check_memory(TrainConfig(), env)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"total_frames": 10**9}, "total_frames: the run would need about .* this machine has 16"),
        ({"hidden_size": 2**16}, "hidden_size and n_models: "),
        ({"hidden_size": 8000, "n_models": 50}, "hidden_size and n_models: "),
        ({"batch_size": 10**6, "n_models": 100}, "batch_size, n_steps, hidden_size and n_models: "),
        ({"batch_size": 10**6, "n_steps": 1000}, "batch_size, n_steps, hidden_size and n_models: "),
        ({"num_candidates": 10**6, "eval_episodes": 1000}, "eval_episodes, num_candidates, "),
        ({"num_candidates": 10**5, "num_particles": 1000}, "eval_episodes, num_candidates, "),
    ],
)
def test_runs_that_are_too_large(options, text, env, machine):
    with pytest.raises(RecipeError, match=f"^{text}"):
        memory.check_memory(replace(TINY, **options), env)


@pytest.mark.parametrize(
    ("options", "gib"),
    [
        # measured as the peak of a run of Pendulum-v1 with these options, less that of a tiny run
        ({"hidden_size": 4096}, 2.0),
        ({"batch_size": 200_000}, 0.9),
        ({"batch_size": 20_000, "hidden_size": 256}, 0.75),
        ({"batch_size": 20_000, "n_steps": 1000}, 1.8),
        ({"num_candidates": 200_000}, 0.3),
    ],
)
def test_the_estimate_is_near_what_was_measured(options, gib):
    config = replace(TINY, eval_episodes=1, **options)
    needed = sum(memory.memory_needed(config, obs_dim=3, action_dim=1).values()) / GIB
    assert gib / 2 < needed < 2 * gib


def test_the_buffer_is_counted_by_actions():
    needed = [
        memory.memory_needed(replace(TINY, action_repeat=n), 3, 1)["total_frames"] for n in (1, 2)
    ]
    assert needed[0] == 2 * needed[1]


def test_a_gpu_holds_all_but_the_buffer(env, machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, GIB))
    large = replace(TINY, device="cuda", hidden_size=4096)
    with pytest.raises(RecipeError, match=r"hidden_size and n_models: .* cuda has 1.0 GiB"):
        memory.check_memory(large, env)
    memory.check_memory(replace(TINY, device="cuda", total_frames=10**8), env)
    machine(1)
    with pytest.raises(RecipeError, match=r"total_frames: .* this machine has 1.0 GiB"):
        memory.check_memory(replace(TINY, device="cuda", total_frames=10**8), env)


@pytest.mark.parametrize(
    ("limits", "expected"), [((), 1000), (("max",), 1000), (("300\n", "500"), 300), (("x",), 1000)]
)
def test_a_container_has_less_memory_than_its_machine(limits, expected, tmp_path, monkeypatch):
    paths = [tmp_path / str(i) for i in range(len(limits))]
    for path, limit in zip(paths, limits, strict=True):
        path.write_text(limit)
    monkeypatch.setattr(memory, "_LIMITS", (*paths, tmp_path / "nowhere"))
    values = {"SC_PAGE_SIZE": 10, "SC_PHYS_PAGES": 100}
    monkeypatch.setattr(memory, "os", SimpleNamespace(sysconf=values.__getitem__))
    assert memory.machine_memory() == expected


def test_a_machine_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(memory, "_LIMITS", ())
    monkeypatch.setattr(memory, "os", SimpleNamespace())
    assert memory.machine_memory() == float("inf")
