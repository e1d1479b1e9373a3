"""RealRows: uniform over the transitions that took place."""

import pytest
import torch

from layeredrl_trl import TransitionSliceSampler
from layeredrl_trl.trainers.real_rows import RealRows
from tests.trainers.imagined_problems import (
    imagined_buffer,
    real_buffer,
    real_steps,
    rows_of,
)


@pytest.mark.parametrize("n_envs", [None, 3])
def test_starts_and_real_rows_are_uniform_over_what_took_place(n_envs):
    """Of 60 rows, 12 are padding and 9 repeat the end of an episode."""
    steps = real_steps(60)
    steps["collector", "mask"] = (torch.arange(60) % 5 != 0).unsqueeze(-1)
    steps["done"][torch.arange(60) % 7 == 3] = True
    possible = (steps["collector", "mask"] & ~steps["done"]).flatten().nonzero().flatten()
    buffer = real_buffer(steps if n_envs is None else steps.reshape(n_envs, -1))
    real, n = RealRows(buffer), 40_000
    for observation in (real.observations(n, "observation"), real.transitions(n)["observation"]):
        count = torch.bincount(rows_of(observation), minlength=60)
        assert set(count.nonzero().flatten().tolist()) == set(possible.tolist())
        expected = n / len(possible)
        chi_square = ((count[possible] - expected) ** 2 / expected).sum().item()
        assert chi_square < 85  # 0.999 quantile for 39 to 46 degrees of freedom is below 83


def test_starts_after_the_ring_was_written_over():
    buffer = real_buffer(real_steps(60), size=25)
    starts = set(rows_of(RealRows(buffer).observations(2000, "observation")).tolist())
    assert starts == set(range(35, 60))


def test_slices_of_the_buffer_are_not_asked_for_and_its_generator_is():
    def draw(seed):
        sampler = TransitionSliceSampler(slice_len=4)
        buffer = real_buffer(sampler=sampler, batch_size=8)
        buffer.sampler._rng = torch.Generator().manual_seed(seed)
        return RealRows(buffer).observations(50, "observation")

    torch.testing.assert_close(draw(1), draw(1), rtol=0, atol=0)
    assert not torch.equal(draw(1), draw(2))


def test_a_buffer_in_which_nothing_took_place_is_an_error():
    steps = real_steps()
    steps["collector", "mask"] = torch.zeros(60, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="no action was taken in any of its rows"):
        imagined_buffer(buffer=real_buffer(steps))
