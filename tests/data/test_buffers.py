"""What learning does with every public part of TorchRL's replay buffers."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import torchrl
from torchrl.data import (
    LazyTensorStorage,
    RandomSampler,
    SliceSampler,
    TensorDictReplayBuffer,
)
from torchrl.data import replay_buffers as parts
from torchrl.envs import transforms
from torchrl.envs.transforms import Transform

from layeredrl_trl.data import TransitionSliceSampler, check_buffer
from layeredrl_trl.diagnostics import model_report
from tests.small_predictors import learn, small_predictor, snapshot
from tests.torchrl_parts import (
    BUFFERS,
    NOT_HERE,
    RIGHT,
    SAMPLERS,
    STORAGES,
    TRANSFORMS,
    UNITS,
    WRITERS,
    Doubled,
    episodes,
    filled,
)

PAGE = Path(__file__).parents[2] / "docs" / "buffers.md"
TABLES = {
    "buffer": (BUFFERS, (parts.ReplayBuffer, parts.OfflineToOnlineReplayBuffer)),
    "sampler": (SAMPLERS, parts.Sampler),
    "storage": (STORAGES, parts.Storage),
    "writer": (WRITERS, parts.Writer),
    "unit": (UNITS, parts.SampleUnit),
    "transform": (TRANSFORMS, Transform),
}
STEPS = {"k_steps": 3, "n_steps": 2}
ALL = [
    pytest.param(part, id=f"{kind}-{name}")
    for kind, (table, _) in TABLES.items()
    for name, part in table.items()
    if part.make is not None
]


def batches_of(predictor, buffer, n_steps=1):
    """The slices and transitions of each step that ``learn`` takes."""
    seen, update = [], predictor.update

    def spy(slices, transitions):
        seen.append((slices, transitions))
        return update(slices, transitions)

    spy.steps, spy.skipped, spy.optimizer = 0, 0, update.optimizer
    predictor.update = spy
    learn(predictor, buffer, n_steps=n_steps)
    return seen


# --- contract


@pytest.mark.parametrize("part", ALL)
def test_a_public_part_is_right_or_refused_with_the_way_out(part):
    with warnings.catch_warnings():  # of TorchRL, on what it deprecates
        warnings.simplefilter("ignore")
        buffer = part.make()
    predictor = small_predictor(**STEPS)
    if part.verdict != RIGHT:
        before = snapshot(predictor)
        with pytest.raises((TypeError, ValueError), match=f"(?s){part.verdict}"):
            learn(predictor, buffer)
        assert all(torch.equal(x, before[key]) for key, x in snapshot(predictor).items())
        return
    (slices, transitions), *_ = batches_of(predictor, buffer)
    stored = episodes()
    rows = slices.index
    expected = stored[rows]
    transform = buffer.transform
    if transform is not None and len(transform):
        plain = TensorDictReplayBuffer(storage=LazyTensorStorage(60))
        plain.extend(stored)
        flat = plain.storage.get(rows.flatten())
        expected = transform(flat).reshape(rows.shape)
    torch.testing.assert_close(slices.observation, expected["observation"].float())
    torch.testing.assert_close(slices.next_observation, expected["next", "observation"].float())
    torch.testing.assert_close(slices.reward, expected["next", "reward"].float())
    assert transitions.index.shape == (8,)
    # no slice crosses the end of an episode; past it the last step repeats
    assert bool((rows // 10 == rows[:, :1] // 10).all())


@pytest.mark.parametrize("kind", TABLES)
def test_every_public_name_has_a_verdict(kind):
    table, base = TABLES[kind]
    module = transforms if kind == "transform" else parts
    classes = {name: getattr(module, name) for name in module.__all__}
    of_kind = {name for name, x in classes.items() if isinstance(x, type) and issubclass(x, base)}
    if torchrl.__version__.startswith("0.14.1"):  # others may have more, or fewer
        assert of_kind == set(table)


@pytest.mark.parametrize("kind", TABLES)
def test_the_page_says_the_same(kind):
    table, _ = TABLES[kind]
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    for name, part in table.items():
        naming = [row for row in rows if f"`{name}`" in row]
        assert naming, f"docs/buffers.md does not name {name}"
        if part.verdict == RIGHT:
            assert any("right" in row.split("|")[2] for row in naming), name
        elif part.verdict != NOT_HERE:
            assert any("refused" in row.split("|")[2] for row in naming), name


# --- samplers


def test_a_slice_sampler_of_ones_own_draws_the_slices():
    """Its keys, its generator and what a subclass overrides count."""

    class FromTheFirst(TransitionSliceSampler):
        def sample_slices(self, storage, num_slices, slice_len):
            start = torch.zeros(num_slices, dtype=torch.long)
            return self.slices_from(storage, (start,), slice_len)

    buffer = filled(sampler=FromTheFirst(slice_len=3), batch_size=6)
    ((slices, transitions),) = batches_of(small_predictor(**STEPS), buffer)
    assert slices.index.tolist() == [[0, 1, 2]] * 8
    assert transitions.index.tolist() == [0] * 8


def test_a_slice_sampler_that_overrides_sample_was_passed_by():
    class Recent(TransitionSliceSampler):
        def sample(self, storage, batch_size):
            return super().sample(storage, batch_size)

    with pytest.raises(TypeError, match=r"Recent overrides sample, .* override sample_slices"):
        learn(small_predictor(), filled(sampler=Recent(slice_len=1)))


@pytest.mark.parametrize("sampler", [TransitionSliceSampler, SliceSampler])
def test_keys_of_the_buffers_sampler_tell_where_episodes_end(sampler):
    data = episodes(length=100)  # no end is marked
    data["part"] = torch.arange(40) // 5
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(60), sampler=sampler(slice_len=4, traj_key="part")
    )
    buffer.extend(data)
    ((slices, _),) = batches_of(small_predictor(**STEPS), buffer)
    assert bool((slices.index // 5 == slices.index[:, :1] // 5).all())
    own = small_predictor().sample_partial_trajectories(buffer, 20, 4)[0]
    assert bool((own // 5 == own[:1] // 5).all())


def test_an_end_key_of_a_slice_sampler_tells_where_episodes_end():
    data = episodes(length=100)
    data["last"] = (torch.arange(40) % 5 == 4).unsqueeze(-1)
    sampler = SliceSampler(slice_len=4, end_key="last")
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(60), sampler=sampler)
    buffer.extend(data)
    ((slices, _),) = batches_of(small_predictor(**STEPS), buffer)
    assert bool((slices.index // 5 == slices.index[:, :1] // 5).all())


def test_the_generator_of_a_buffer_draws_its_slices():
    drawn = []
    for _ in range(2):
        torch.manual_seed(len(drawn))
        generator = torch.Generator().manual_seed(3)
        buffer = filled(sampler=RandomSampler(), generator=generator)
        ((slices, _),) = batches_of(small_predictor(), buffer)
        drawn.append(slices.index.tolist())
    assert drawn[0] == drawn[1]


# --- buffers of one's own


def test_a_buffer_that_changes_what_it_samples_is_refused():
    class Relabelled(TensorDictReplayBuffer):
        def sample(self, *args, **kwargs):
            batch = super().sample(*args, **kwargs)
            return batch.set(("next", "reward"), batch["next", "reward"] + 1)

    buffer = filled(Relabelled)
    for use in (
        lambda: learn(small_predictor(), buffer),
        lambda: small_predictor().compute_targets(buffer, 4, 1, 1),
        lambda: small_predictor().sample_model_batch(buffer, 4),
        lambda: small_predictor().sample_partial_trajectories(buffer, 4, 2),
    ):
        with pytest.raises(TypeError, match="Relabelled draws or changes its batches"):
            use()


def test_a_buffer_that_changes_nothing_about_sampling_is_learned_from():
    class Named(TensorDictReplayBuffer):
        name = "mine"

    learn(small_predictor(), filled(Named))


def test_the_way_out_of_a_prioritised_buffer_learns_uniformly():
    refused = SAMPLERS["PrioritizedSampler"].make()
    with pytest.raises(TypeError, match="its PrioritizedSampler does not draw uniformly"):
        check_buffer(refused)
    buffer = TensorDictReplayBuffer(storage=refused.storage)
    ((slices, _),) = batches_of(small_predictor(), buffer)
    assert torch.equal(slices.observation, episodes()["observation"][slices.index])


def test_a_buffer_that_is_not_yet_made_is_made():
    buffer = TensorDictReplayBuffer(storage=lambda: LazyTensorStorage(60), delayed_init=True)
    buffer.extend(episodes())
    learn(small_predictor(), buffer)


# --- transforms


class Noise(Transform):
    """Adds one random number to the observation and the reward of each row."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, tensordict):
        self.batches.append(tensordict.batch_size)
        noise = torch.randn(*tensordict.batch_size, 1)
        tensordict["observation"] = tensordict["observation"] + noise
        tensordict["next", "reward"] = tensordict["next", "reward"] + noise
        return tensordict


def test_a_transform_made_for_slices_of_another_length_cut_them_into_pieces():
    predictor = small_predictor(k_steps=3, n_steps=2)
    for length, fits in ((2, False), (4, True), (8, False), (None, True)):
        transform = Doubled()
        transform.slice_len = length
        buffer = filled()
        buffer.append_transform(transform)
        if fits:
            learn(predictor, buffer)
        else:
            text = f"Doubled is made for slices of slice_len={length} steps, but slices of 4 are"
            with pytest.raises(ValueError, match=text):
                learn(predictor, buffer)


def test_a_transform_saw_a_batch_several_times_and_gave_reward_and_observation_other_numbers():
    noise = Noise()
    buffer = filled()
    buffer.append_transform(noise)
    predictor = small_predictor(**STEPS)
    for slices, _ in batches_of(predictor, buffer, n_steps=2):
        stored = episodes()[slices.index]
        on_observation = (slices.observation - stored["observation"]).mean(-1, keepdim=True)
        on_reward = slices.reward - stored["next", "reward"]
        real = slices.index[:, 1:] != slices.index[:, :-1]  # padding repeats a step and its noise
        torch.testing.assert_close(on_observation, on_reward)
        assert bool(real.any())
    # once a step, slices and transitions together, the latter as first steps of slices
    assert noise.batches == [torch.Size([(8 + 8) * predictor.loss_module.slice_len])] * 2


def test_transforms_see_nothing_but_slices():
    class Rows(Transform):
        def forward(self, tensordict):
            rows.append(tensordict["action"].flatten())
            return tensordict

    rows: list = []
    buffer = filled()
    buffer.append_transform(Rows())
    predictor = small_predictor(**STEPS)
    length = predictor.loss_module.slice_len
    learn(predictor, buffer)
    predictor.compute_targets(buffer, 4, 3, 2)
    predictor.sample_model_batch(buffer, 4)
    for actions in rows:
        position = ((actions + 1) / 2 * 39).round().long().reshape(-1, length)
        step = position[:, 1:] - position[:, :-1]
        assert bool(((step == 0) | (step == 1)).all())


def test_transitions_of_several_steps_are_not_learned_as_of_one():
    data = episodes()
    data["steps_to_next_obs"] = torch.ones(40, 1, dtype=torch.long)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(60))
    buffer.extend(data)
    learn(small_predictor(**STEPS), buffer)
    data["steps_to_next_obs"] += 1
    buffer.extend(data)
    predictor = small_predictor(**STEPS)
    before = snapshot(predictor)
    with pytest.raises(ValueError, match="steps_to_next_obs: expected 1, got up to 2"):
        learn(predictor, buffer, batch_size=64)
    assert all(torch.equal(x, before[key]) for key, x in snapshot(predictor).items())
    sampler = TransitionSliceSampler(slice_len=predictor.loss_module.slice_len)
    slices = TensorDictReplayBuffer(storage=buffer.storage, sampler=sampler).sample(60)
    with pytest.raises(ValueError, match="pass n_steps"):
        predictor.loss_module(slices)
    with pytest.raises(ValueError, match="pass n_steps"):
        model_report(predictor, buffer, 3)


def test_a_gradient_that_was_stored_is_not_followed():
    """Imagined steps may be stored with the graph that made them."""
    data = episodes()
    weight = torch.ones(3, requires_grad=True)
    data["observation"] = data["observation"] * weight
    for transform in (None, lambda td: td):
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(60), transform=transform)
        buffer.extend(data)
        learn(small_predictor(**STEPS), buffer, n_steps=3)
        assert weight.grad is None


def test_the_error_of_a_refused_transform_names_it_inside_a_composition():
    buffer = filled()
    inner = transforms.Compose(transforms.CatFrames(2, -1, in_keys=["extra"]))
    buffer.append_transform(transforms.Compose(inner))
    with pytest.raises(TypeError, match=re.escape("its transform CatFrames cannot be right")):
        learn(small_predictor(), buffer)


def test_the_code_of_the_page_runs():
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), scope)
    assert scope["buffer"].storage.shape == (100, 4)
    assert scope["update"].steps == 1 and scope["update"].skipped == 0
