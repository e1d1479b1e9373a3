"""Options: their kinds, their ranges, and how they fit together."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from layeredrl_trl.recipes import EvaluateConfig, RecipeError, TrainConfig

NUMBERS = [
    (config, option.name)
    for config in (TrainConfig, EvaluateConfig)
    for option in fields(config)
    if type(option.default) in (int, float)
]


def make(config, **options):
    required = {"run": Path("x")} if config is EvaluateConfig else {}
    return config(**required | options)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"total_frames": 0}, "total_frames must be positive"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\]"),
        ({"gamma": float("nan")}, "gamma must be a finite number, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number, got inf"),
        ({"updates_per_frame": float("inf")}, "updates_per_frame must be a finite number"),
        ({"clip_grad_max_norm": float("nan")}, "clip_grad_max_norm must be a finite number"),
        ({"seed": float("nan")}, "seed must be an integer, got nan"),
        ({"batch_size": 2.5}, "batch_size must be an integer, got 2.5"),
        ({"n_models": True}, "n_models must be an integer, got True"),
        ({"learning_rate": "x"}, "learning_rate must be a finite number, got x"),
        ({"terminal_value": "no"}, "terminal_value must be True or False, got no"),
        ({"planner": "cme"}, r"planner must be one of \['icem', 'cem', 'mppi'\], got cme"),
        ({"top_k": 200}, "top_k must not exceed num_candidates=128"),
        ({"init_random_frames": 9999}, "init_random_frames must not exceed"),
        ({"device": "tpu"}, "device must be cpu"),
        ({"updates_per_frame": -1.0}, "must not be negative"),
        ({"planned_frames": -1}, "planned_frames must not be negative"),
        ({"planned_frames": 5}, "planned_frames and random_frames must both"),
        ({"num_particles": 7}, "num_particles must be below n_models=5 or a multiple"),
        (
            {"action_repeat": 2, "planned_frames": 7, "random_frames": 2},
            "planned_frames must be a multiple of action_repeat=2, got 7",
        ),
        ({"action_repeat": 7}, "total_frames must be a multiple of action_repeat=7, got 3000"),
    ],
)
def test_options_out_of_range(change, text):
    with pytest.raises(RecipeError, match=text):
        TrainConfig(**change)


@pytest.mark.parametrize(("config", "name"), NUMBERS)
def test_every_number_has_a_range(config, name):
    assert get_origin(get_type_hints(config, include_extras=True)[name]) is Annotated


@pytest.mark.parametrize(
    "value",
    [-1, 10**15, 2**70, pytest.param(10**5000, id="vast"), float("nan"), float("inf"), -1e300],
)
@pytest.mark.parametrize(("config", "name"), NUMBERS)
def test_numbers_out_of_range(config, name, value):
    """Some of these got a traceback, others ran for ever or filled the memory."""
    if name == "clip_grad_max_norm" and 0 < value < 1e30:
        assert make(config, **{name: value})
        return
    with pytest.raises(RecipeError, match=rf"{name} must .*, got") as error:
        make(config, **{name: value})
    assert len(str(error.value)) < 150


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**31 - 1),
        ("total_frames", 10**9),
        ("eval_episodes", 1000),
        ("updates_per_frame", 0.0),
        ("learning_rate", 1.0),
        ("clip_grad_max_norm", 1e30),
        ("num_threads", np.int64(3)),
        ("gamma", np.float32(1.0)),
    ],
)
def test_the_ends_of_ranges_are_in_them(name, value):
    assert getattr(make(TrainConfig, **{name: value}), name) == value


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"frames_per_batch": 1_000_000}, "frames_per_batch must not exceed total_frames=3000"),
        ({"env": 5}, "env must be a string, got 5"),
        ({"device": None}, "device must be a string, got None"),
        ({"logdir": "runs"}, "logdir must be a pathlib.Path, got runs"),
        ({"resume": "x.pt"}, "resume must be a pathlib.Path, got x.pt"),
        *(
            ({"device": device}, f"device must be cpu, cuda or cuda:N, got '{device}'")
            for device in ("", "cpu:0", "meta", "mps", "cuda:x", "cuda:-1")
        ),
    ],
)
def test_options_of_another_kind(options, text):
    with pytest.raises(RecipeError, match=text):
        make(TrainConfig, **options)


@pytest.mark.parametrize("config", [TrainConfig, EvaluateConfig])
@pytest.mark.parametrize(
    ("count", "device", "text"),
    [
        (0, "cuda", "device is 'cuda', but torch .* sees no CUDA device"),
        (2, "cuda:2", "device is 'cuda:2', but torch .* sees only 2 CUDA devices, counted from 0"),
        (2, "cuda:1", None),
        (1, "cuda", None),
    ],
)
def test_a_cuda_device_that_is_not_there(config, count, device, text, monkeypatch):
    """cuda:2 was taken where there were two devices, and got a traceback."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if text is None:
        assert make(config, device=device).device == device
    else:
        with pytest.raises(RecipeError, match=text):
            make(config, device=device)


def test_phases_longer_than_the_run_are_legal_in_a_resumed_one():
    assert TrainConfig(resume=Path("x"), total_frames=5).total_frames == 5
