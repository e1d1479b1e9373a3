"""Scalars to a SummaryWriter or a TorchRL logger."""

import warnings

import pytest
from torch.utils.tensorboard import SummaryWriter
from torchrl.record import CSVLogger, TensorboardLogger

from layeredrl_trl.predictors.logging import check_writer, log_scalars
from tests.oracles_predictors import read_csv, read_tensorboard

SCALARS = {"predictor/loss": 0.5, "predictor/grad_norm": 2.0}


def expected(steps=(10, 20)):
    return {key: [(step, value) for step in steps] for key, value in SCALARS.items()}


def test_no_writer_no_log():
    assert check_writer(None) is None
    log_scalars(None, SCALARS, 10)


def test_summary_writer(tmp_path):
    writer = SummaryWriter(tmp_path)
    assert check_writer(writer) is writer
    for step in (10, 20):
        log_scalars(writer, SCALARS, step)
    writer.close()
    assert read_tensorboard(tmp_path) == expected()


def test_torchrl_tensorboard_logger(tmp_path):
    writer = TensorboardLogger("run", log_dir=str(tmp_path))
    for step in (10, 20):
        log_scalars(check_writer(writer), SCALARS, step)
    writer.experiment.close()
    assert read_tensorboard(tmp_path / "run") == expected()


def test_torchrl_csv_logger(tmp_path):
    writer = CSVLogger("run", log_dir=str(tmp_path))
    for step in (10, 20):
        log_scalars(check_writer(writer), SCALARS, step)
    assert read_csv(tmp_path) == expected()


def test_anything_with_add_scalar():
    class Writer:
        seen = []

        def add_scalar(self, name, value, step):
            self.seen.append((name, value, step))

    log_scalars(check_writer(Writer()), SCALARS, 3)
    assert Writer.seen == [(key, value, 3) for key, value in SCALARS.items()]


@pytest.mark.parametrize("writer", ["runs/", 3, print])
def test_what_is_no_writer(writer):
    with pytest.raises(TypeError, match=f"writer: expected None.*{type(writer).__name__}"):
        check_writer(writer)


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_scalars(None, {}, 0)
