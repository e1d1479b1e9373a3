import pytest
import torch
from tensordict import TensorDict

from layeredrl_trl.predictors.term_sums import _AT_ONCE, TermSums


@pytest.mark.parametrize("n_steps", [1, 2, _AT_ONCE - 1, _AT_ONCE, _AT_ONCE + 1, 3 * _AT_ONCE + 7])
def test_they_are_the_sums_over_the_steps_that_were_taken(n_steps):
    torch.manual_seed(n_steps)
    steps = torch.randn(n_steps, 3).exp()
    skipped = torch.rand(n_steps) < 0.3
    steps[skipped, 1] = torch.tensor([torch.nan, torch.inf])[
        torch.randint(2, (int(skipped.sum()),))
    ]
    steps[skipped & (torch.rand(n_steps) < 0.5), 0] = torch.nan
    sums, expected = TermSums(), torch.zeros(3, dtype=torch.float64)
    for step in steps:
        sums.add(TensorDict(dict(zip(("loss", "grad_norm", "nll"), step, strict=True))))
        if step[1].isfinite():
            expected += step
    assert sums.names == ["loss", "grad_norm", "nll"]
    torch.testing.assert_close(sums.total().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.total().double(), expected, rtol=1e-5, atol=1e-5)
