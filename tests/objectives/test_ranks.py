"""Several ranks learn what one rank learns from their batches joined."""

import re

import pytest
import torch

from layeredrl_trl.objectives import ForeachSoftUpdate
from layeredrl_trl.ranks import check_same_on_ranks, n_ranks
from tests.objectives.ranks import (
    ON_THREE,
    RUNS,
    compiled,
    make_batches,
    make_loss,
    on_three_ranks,
    on_two_ranks,
    spawn,
)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two ranks found."""
    return spawn(2, on_two_ranks, tmp_path_factory.mktemp("two"))


def assert_equal(one, other):
    """Equal bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = [*one.values()], [*other.values()]
    if isinstance(one, (list, tuple)):
        for x, y in zip(one, other, strict=True):
            assert_equal(x, y)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == other or one != one


def check(run, found):
    """All ranks agree bit for bit, and with the run on one rank up to rounding."""
    for other in found[1:]:
        assert_equal(other, found[0])
    expected = run.joined(len(found))
    assert_equal(found[0].pop("counts", None), expected.pop("counts", None))
    # a mean of float32 is rounded in another order
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    return expected


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_learn_what_one_learns_from_the_joined_batch(two, name):
    check(RUNS[name], [rank[name] for rank in two])


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return spawn(3, on_three_ranks, tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize("name", ON_THREE)
def test_three_ranks_with_batches_of_other_sizes(three, name):
    check(ON_THREE[name], [rank[name] for rank in three])


def test_ranks_differ_in_what_they_saw(two):
    """Else the runs above would show nothing."""
    batches = RUNS["identity"].batches(2)
    assert not torch.equal(batches[0][0]["observation"], batches[1][0]["observation"])
    assert not torch.equal(batches[0][0]["collector", "mask"], batches[1][0]["collector", "mask"])
    assert not torch.equal(two[0]["learn"]["seen"], two[1]["learn"]["seen"])


def test_steps_of_a_bad_batch_of_one_rank_are_skipped_by_all(two):
    for rank in two:
        assert rank["nan"]["infos"][2]["grad_norm"].isnan()
    expected = RUNS["nan"].joined(2)
    assert expected["counts"][:2] == [4, 1] and expected["counts"][-1] == 1


def test_learn_leaves_all_ranks_equal(two):
    """Each had a buffer of its own, and started from parameters of its own."""
    one, other = (rank["learn"] for rank in two)
    for key in ("info", "loss", "state"):
        assert_equal(one[key], other[key])
    assert one["state"]["_extra_state"]["steps"] == 6 and one["info"]["skipped"] == 0


def test_parameters_that_only_some_ranks_have_a_gradient_for(two):
    """``b`` learns on all ranks, ``c`` on none, so its moments do not age."""
    one, other = (rank["one_sided"] for rank in two)
    assert_equal(one, other)
    assert one["state"]["a"].lt(1).any() and one["state"]["b"].ne(1).all()
    torch.testing.assert_close(one["grads"]["b"], torch.full((2,), -0.5))
    assert one["state"]["c"].eq(1).all() and one["grads"]["c"] is None
    assert one["counts"] == [2]


def test_evaluation_is_of_a_rank_alone(two):
    for rank in two:
        assert_equal(rank["evaluation"]["state"], rank["evaluation"]["before"])
        assert rank["evaluation"]["calls"] == []
    terms = two[0]["evaluation"]["terms"]
    loss = make_loss("mlp")
    ForeachSoftUpdate(loss, 0.1)
    assert_equal(loss.eval()(make_batches([6, 6])[0][0]).detach().to_dict(), terms)


@pytest.mark.parametrize(("name", "n_gathered"), [("counting", 1), ("counting_mlp", 2)])
def test_collectives_of_a_step(two, name, n_gathered):
    """Two for each gathering, of sizes and rows, and one for the gradients."""
    calls = two[0][name]["calls"]
    assert [call for call, _ in calls] == ["all_gather"] * 2 * n_gathered + ["all_reduce"]
    n_params, n_tensors = two[0][name]["n_params"], two[0][name]["n_tensors"]
    n_terms, n_groups, in_float64 = 7, 1, 8
    assert calls[-1][1] == in_float64 * (n_params + n_tensors + n_terms + n_groups)


def test_rows_are_gathered_in_the_order_of_ranks_whatever_they_are(two):
    for rank in two:
        floats, doubles, flags, nothing, numbers, one = rank["gathering"]
        assert floats.tolist() == [[0.0] * 2] * 2 + [[1.0] * 2] * 3
        assert not floats.requires_grad
        assert doubles.dtype is torch.float64 and doubles.shape == (6, 2, 1)
        assert flags.tolist() == [True] * 3 + [False] * 4
        assert nothing.shape == (5, 0) and numbers.tolist() == [0, 1, 0, 1, 2]
        assert one.shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("shape", "ranks: expected the same entries on all ranks"),
        ("dtype", "ranks: expected the same entries on all ranks"),
        ("number", r"n_total_env_steps: expected the same on all ranks, got \[100, 101\] by rank"),
        ("rates", "ranks: expected the same learning rates on all ranks, got"),
        ("cudagraphs", "cudagraphs: expected one rank, got 2"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_all_ranks(two, name, text):
    for rank in two:
        assert re.search(text, rank["failing"][name])


def test_without_a_process_group_there_is_one_rank():
    assert n_ranks() == 1
    check_same_on_ranks(n_steps=3)


@pytest.mark.slow
def test_compiled_steps_are_those_of_plain_code(tmp_path):
    one, other = spawn(2, compiled, tmp_path)
    assert_equal(one, other)
    torch.testing.assert_close(one["compile=True"], one["compile=False"], rtol=1e-4, atol=1e-5)
