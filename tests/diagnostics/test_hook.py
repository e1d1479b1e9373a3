"""ModelReportHook in a loop of one's own and in a TorchRL Trainer."""

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.record import CSVLogger
from torchrl.trainers import Trainer

from layeredrl_trl.diagnostics import ModelReportHook
from tests.diagnostics.systems import KnownReward, buffer_of, episodes_of, known_predictor
from tests.oracles_predictors import read_csv


def make_hook(**options) -> ModelReportHook:
    buffer = buffer_of(episodes_of([6] * 3))
    return ModelReportHook(known_predictor(KnownReward()), buffer, 3, **options)


def test_in_a_loop_it_logs_at_intervals(tmp_path):
    hook = make_hook(interval=100, writer=CSVLogger("run", log_dir=str(tmp_path)), n_segments=4)
    reported = [steps for steps in range(0, 260, 30) if hook(steps) is not None]
    assert reported == [0, 120, 240]
    assert hook.report.metrics["open_loop", "segments"][0] == 4
    logged = read_csv(tmp_path)
    expected = hook.report.scalars()["open_loop/error_last"]
    assert logged["model/open_loop/error_last"] == [
        (step, pytest.approx(expected)) for step in reported
    ]
    assert "model/termination/auc" not in logged  # NaN: no terminations in this buffer


def test_it_waits_while_the_buffer_is_empty():
    hook = make_hook()
    full, hook.buffer = hook.buffer, TensorDictReplayBuffer(storage=LazyTensorStorage(5))
    assert hook(10) is None
    hook.buffer = full
    assert hook(20) is not None


def test_state_goes_on_where_it_was():
    hook, restored = make_hook(interval=100), make_hook(interval=100)
    hook(50)
    restored.load_state_dict(hook.state_dict())
    assert restored(149) is None and restored(150) is not None


def test_bad_input():
    with pytest.raises(TypeError, match=r"number of env steps.*registered in a Trainer"):
        make_hook()()
    with pytest.raises(ValueError, match="interval must be at least 1"):
        make_hook(interval=0)
    with pytest.raises(TypeError, match="writer"):
        make_hook(writer="runs/")


@pytest.mark.parametrize("own_writer", [False, True])
def test_in_a_trainer_it_logs_at_the_collected_frames(tmp_path, own_writer):
    collector = Collector(
        GymEnv("Pendulum-v1"),
        None,
        frames_per_batch=10,
        total_frames=50,
        auto_register_policy_transforms=False,
    )
    trainer = Trainer(
        collector=collector,
        total_frames=50,
        frame_skip=1,
        optim_steps_per_batch=0,
        loss_module=torch.nn.Identity(),
        logger=CSVLogger("trainer", log_dir=str(tmp_path)),
        progress_bar=False,
        auto_log_optim_steps=False,
    )
    own = {"writer": CSVLogger("own", log_dir=str(tmp_path))} if own_writer else {}
    hook = make_hook(interval=20, prefix="held_out", **own)
    hook.register(trainer)
    assert trainer.state_dict()["model_report"] == {"last_report_at": None}
    trainer.train()
    logged = read_csv(tmp_path / ("own" if own_writer else "trainer"))
    assert [step for step, _ in logged["held_out/open_loop/error_first"]] == [10, 30, 50]
    assert hook.state_dict() == {"last_report_at": 50}
    assert torch.tensor(logged["held_out/one_step/nll"])[:, 1].isfinite().all()
