"""ImaginedBuffer in TorchRL's SACTrainer, and the blocks of docs/dyna.md."""

import re
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import (
    Compose,
    RenameTransform,
    StepCounter,
    TransformedEnv,
)
from torchrl.objectives import SoftUpdate
from torchrl.trainers.algorithms import SACTrainer

from layeredrl_trl.trainers.imagined_buffer import ImaginedBuffer
from tests.problems import DOUBLE_INTEGRATOR, LQREnv
from tests.trainers.imagined_problems import (
    ACTIONS,
    imagined_buffer,
    known_env,
    plain,
    sac,
)

SAC_WARNINGS = [
    pytest.mark.filterwarnings("ignore:SACTrainer is an experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:The '(optimizer|post_loss)' hook stage:FutureWarning"),
]


def with_sac_warnings(test):
    for mark in SAC_WARNINGS:
        test = mark(test)
    return test


# ---- in TorchRL's trainer


def real_env():
    """A cart, in a storage's layout of a real env."""
    renamed = RenameTransform(["latent"], ["observation"], ["latent"], ["observation"])
    return TransformedEnv(LQREnv(**DOUBLE_INTEGRATOR, bound=1.0), Compose(renamed, StepCounter(20)))


def make_trainer(frames=150, **options):
    """TorchRL's SACTrainer, with imagined batches, and what reaches its loss."""
    torch.manual_seed(0)
    actor, loss = sac(2, ACTIONS)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), batch_size=40)
    trainer = SACTrainer(
        collector=Collector(
            real_env(),
            actor,
            frames_per_batch=25,
            total_frames=frames,
            auto_register_policy_transforms=False,
        ),
        total_frames=frames,
        frame_skip=1,
        optim_steps_per_batch=3,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=1e-3),
        replay_buffer=buffer,
        target_net_updater=SoftUpdate(loss, tau=0.1),
        progress_bar=False,
        log_rewards=False,
    )
    options = {"num_starts": 30, "interval": 50, "real_ratio": 0.25, **options}
    imagined = ImaginedBuffer(known_env(), actor, buffer, **options)
    imagined.register(trainer)
    batches = []

    def note(batch):
        batches.append((trainer.collected_frames, len(buffer), len(imagined), batch))
        return batch

    trainer.register_op("process_optim_batch", note)
    return trainer, imagined, batches


@with_sac_warnings
def test_the_sac_trainer_of_torchrl_learns_from_mixed_batches():
    trainer, imagined, batches = make_trainer()
    before = [p.detach().clone() for p in trainer.loss_module.parameters()]
    refills = []
    refill = imagined.refill
    imagined.refill = lambda frames: (refills.append(frames), refill(frames))
    trainer.train()
    assert refills == [25, 75, 125]  # the first batch, then every 50 steps
    assert [frames for frames, *_ in batches] == [25 * k for k in range(1, 7) for _ in range(3)]
    assert [n_rows for *_, n_rows, _ in batches] == [30] * 6 + [60] * 6 + [90] * 6
    stored = trainer.replay_buffer.storage[:]["next", "observation"]
    for frames, n_stored, _, batch in batches:
        assert n_stored == frames and batch.batch_size == (40,)
        is_real = (batch["next", "observation"][:, None] == stored[:n_stored]).all(-1).any(-1)
        assert is_real.tolist() == [True] * 10 + [False] * 30
    after = list(trainer.loss_module.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@with_sac_warnings
def test_the_batch_size_in_a_trainer_can_be_chosen():
    trainer, _, batches = make_trainer(frames=25, batch_size=17)
    trainer.train()
    assert [batch.batch_size for *_, batch in batches] == [(17,)] * 3


def test_a_trainer_may_have_drawn_no_batch_or_one_of_no_device():
    drawn = TensorDict(batch_size=[2, 4])
    assert imagined_buffer()._mix(drawn)["action"].shape == (8, 1)
    assert imagined_buffer(batch_size=3)._mix(None)["action"].shape == (3, 1)
    with pytest.raises(TypeError, match="batch_size: give it here"):
        imagined_buffer()._mix(None)


@with_sac_warnings
def test_the_state_of_a_trainer_has_the_imagined_rows():
    trainer, imagined, _ = make_trainer(frames=50)
    states = []
    trainer.register_op("post_steps", lambda: states.append(trainer.state_dict()))
    trainer.train()
    assert plain(states[-1]["imagined_buffer"])
    other, loaded, _ = make_trainer(frames=50)
    other.load_state_dict(states[-1])
    assert (loaded.buffer[:] == imagined.buffer[:]).all() and len(loaded) == 30
    refilled = []
    loaded.refill = refilled.append
    for other.collected_frames in (60, 74, 75):
        loaded._refill_if_due(None)
    assert refilled == [75]


# ---- the page


PAGE = Path(__file__).parents[2] / "docs" / "dyna.md"


@with_sac_warnings
@pytest.mark.slow
def test_the_blocks_of_the_page_run_one_after_the_other():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    scope: dict = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), scope)
    assert len(scope["real"]) == 750 and scope["trainer"].collected_frames == 750
    assert scope["imagined"].branch_length(750) == 3
    real = scope["real"].storage[:]["next", "observation"]
    is_real = (scope["batch"]["next", "observation"][:, None] == real).all(-1).any(-1)
    assert is_real.tolist() == [True] * 13 + [False] * 243
    assert scope["only_imagined"].batch_size == (64,) and scope["terms"]["loss_actor"].isfinite()
