"""Learning beside other threads: one that fills the buffer, one that asks for values."""

import threading
import time

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl.data import TransitionSliceSampler
from layeredrl_trl.predictors import RewardPredictor
from tests.oracles_predictors import filled_buffer
from tests.small_predictors import learn, small_parts, small_predictor


class Hesitating(TransitionSliceSampler):
    """Leaves other threads time between drawing positions and reading them."""

    def sample_slices(self, storage, num_slices, slice_len):
        drawn = super().sample_slices(storage, num_slices, slice_len)
        time.sleep(0.01)
        return drawn


def steps(first: int, n: int = 10) -> TensorDict:
    """Steps of an endless episode; an observation is the number of its step."""
    number = torch.arange(first, first + n + 1.0).unsqueeze(-1).expand(-1, 3)
    flags = {key: torch.zeros(n, 1).bool() for key in ("terminated", "truncated", "done")}
    reached = {"observation": number[1:], "reward": torch.zeros(n, 1), **flags}
    data = {"observation": number[:-1], "action": torch.zeros(n, 1), "next": reached}
    return TensorDict(data, batch_size=[n])


def filling(buffer, learns):
    """Call ``learns`` while another thread writes over a full buffer."""
    stopped = threading.Event()

    def write():
        first = 100
        while not stopped.is_set():
            buffer.extend(steps(first))
            first += 10
            time.sleep(0.0001)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        learns()
    finally:
        stopped.set()
        thread.join()


def test_slices_that_were_drawn_while_a_collector_wrote_joined_unrelated_steps():
    for transform in (None, lambda td: td):
        sampler = Hesitating(slice_len=4)
        storage = LazyTensorStorage(100)
        buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, transform=transform)
        buffer.extend(steps(0, 100))
        predictor = small_predictor(k_steps=4)
        seen, update = [], predictor.update

        def spy(slices, transitions, seen=seen, update=update):
            seen.append(slices)
            return update(slices, transitions)

        spy.steps, spy.skipped, spy.optimizer = 0, 0, update.optimizer
        predictor.update = spy

        def learns(predictor=predictor, buffer=buffer):
            for _ in range(10):
                learn(predictor, buffer, batch_size=64)

        filling(buffer, learns)
        moved = 0
        for slices in seen:
            number = slices.observation[..., 0]
            mask = torch.ones_like(number).bool() if slices.mask is None else slices.mask[..., 0]
            follows = (number[:, 1:] == number[:, :-1] + 1) | ~mask[:, 1:]
            assert bool(follows.all())
            moved += int(number.max() > 100)
        assert moved  # the other thread did write


def test_a_transform_looked_at_rows_that_were_written_over_since_the_batch_was_read():
    """A goal in hindsight is one of the storage: it must still be of the same episode."""
    ends = []

    def look(rows):
        time.sleep(0.005)
        index = rows["index"].flatten()
        ends.append(torch.equal(buffer.storage.get(index)["observation"], rows["observation"]))
        return rows

    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), transform=look)
    buffer.extend(steps(0, 100))
    predictor = small_predictor(k_steps=4)
    filling(buffer, lambda: [learn(predictor, buffer) for _ in range(10)])
    assert len(ends) >= 10 and all(ends)


def test_an_env_that_was_made_meanwhile_moved_parameters_of_a_backward_pass():
    """TorchRL's envs move their model: each parameter's memory was set anew, which crashed."""
    predictor = small_predictor()
    tensors = [*predictor.parameters(), *predictor.buffers()]
    before = [(x.data_ptr(), x._version) for x in tensors]
    moved = []
    for part in predictor.modules():
        part._apply = lambda fn, recurse=True: moved.append(fn)  # type: ignore[method-assign]
    env = predictor.env(Bounded(-1.0, 1.0, (1,)))
    env.rollout(2)
    assert not moved and [(x.data_ptr(), x._version) for x in tensors] == before


def test_a_second_buffer_of_the_same_storage_waits_too():
    written = TensorDictReplayBuffer(storage=LazyTensorStorage(100))
    written.extend(steps(0, 100))
    read = TensorDictReplayBuffer(storage=written.storage, sampler=Hesitating(slice_len=4))
    predictor, targets = small_predictor(k_steps=4), []

    def learns():
        targets.extend(predictor.compute_targets(read, 64, 4, 1) for _ in range(10))

    predictor.encoder.net.weight.data.zero_()
    predictor.encoder.net.weight.data[0, 0] = 1.0
    predictor.encoder.net.bias.data.zero_()
    filling(written, learns)
    for batch in targets:
        number = batch["latent"][..., 0]
        mask = batch["collector", "mask"][..., 0]
        assert bool(((number[:, 1:] == number[:, :-1] + 1) | ~mask[:, 1:]).all())


def test_a_buffer_shared_between_processes_can_be_read():
    """Its lock cannot be taken twice by one thread."""
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), shared=True)
    buffer.extend(steps(0, 100))
    learn(small_predictor(k_steps=4), buffer)


_inside, _done = threading.Event(), threading.Event()


class Waiting(nn.Module):
    """A value that lets the thread "targets" wait in the middle of it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, latent, context):
        if threading.current_thread().name == "targets":
            _inside.set()
            _done.wait(10)
        return self.linear(torch.cat((latent, context), -1))


def test_a_thread_that_computed_targets_lent_the_value_its_targets_tensors():
    _inside.clear()
    _done.clear()
    dynamics, _, reward, encoder = small_parts()
    predictor = RewardPredictor(dynamics, Waiting(), reward, encoder, 2, 1)
    predictor.target_val_params.data.mul_(0.0)
    buffer, obs = filled_buffer().buffer, torch.randn(4, 3)
    expected = predictor.value(obs)
    thread = threading.Thread(
        target=lambda: predictor.compute_targets(buffer, 8, 1, 1), name="targets"
    )
    thread.start()
    assert _inside.wait(10)
    meanwhile = predictor.value(obs)
    _done.set()
    thread.join()
    assert torch.equal(meanwhile, expected)
    assert torch.equal(predictor.value(obs), expected)
    own = {id(p) for p in predictor.val_func.parameters()}
    learned = {id(p) for group in predictor.update.optimizer.param_groups for p in group["params"]}
    assert own <= learned
