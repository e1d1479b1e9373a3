"""Common draws: which rows share numbers, and numbers that are drawn again."""

import pytest
import torch

from layeredrl_trl.functional import CommonDraws, draw_each, mixture_noise


def test_every_so_many_rows_share():
    x = CommonDraws(4)(torch.randn, (12, 2, 3))
    assert x.shape == (12, 2, 3)
    groups = x.unflatten(0, (3, 4))
    assert (groups == groups[:, :1]).all()
    assert len(groups[:, 0].flatten().unique()) == 18  # else all are of their own


def test_a_group_of_one_draws_as_each_does():
    outs = []
    for draw in (draw_each, CommonDraws(1)):
        torch.manual_seed(0)
        outs.append(draw(torch.rand, (5, 2)))
    assert torch.equal(*outs)


def test_it_costs_no_more_numbers_than_there_are_groups():
    torch.manual_seed(0)
    CommonDraws(6)(torch.randn, (12, 3))
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.randn(2, 3)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("modes", [1, 3])
def test_noise_of_a_mixture(modes):
    like = {"dtype": torch.float32, "device": torch.device("cpu")}
    for x in mixture_noise((6, 2, modes), 4, draw=CommonDraws(3), **like):
        if x is not None:
            assert torch.equal(x[:3], x[:1].expand_as(x[:3])) and not torch.equal(x[0], x[3])


def test_a_tape_gives_the_same_numbers_to_fewer_rows():
    tape, shapes = [], [(6, 2), (6, 3)]
    first = [CommonDraws(3, tape)]
    first = [first[0](torch.randn, shape) for shape in shapes]
    again = CommonDraws(2, tape)
    for shape, before in zip(shapes, first, strict=True):
        assert torch.equal(again(torch.randn, (4, shape[1]))[[0, 2]], before[[0, 3]])
    longer = again(torch.randn, (4, 7))  # beyond the tape
    assert len(tape) == 3 and torch.equal(longer[[0, 2]], tape[2])


def test_rows_that_cannot_be_divided():
    with pytest.raises(ValueError, match="5 rows cannot be divided into groups of 2"):
        CommonDraws(2)(torch.randn, (5, 1))


def test_a_tape_of_other_numbers():
    tape = []
    CommonDraws(2, tape)(torch.randn, (4, 1))
    with pytest.raises(ValueError, match=r"expected those of \[3, 1\] from before, .* \[2, 1\]"):
        CommonDraws(2, tape)(torch.randn, (6, 1))
