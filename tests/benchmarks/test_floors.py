"""The parts that a rollout is taken apart into are those of its networks."""

from itertools import pairwise

import pytest

from benchmarks.floors import PIECE, Parts, layers_of
from benchmarks.workloads import ACTION_DIM, OBSERVATION_DIM, WORKLOADS


@pytest.mark.parametrize("name", WORKLOADS)
def test_parts_hold_the_layers_of_all_networks(name):
    workload = WORKLOADS[name]
    seen, dim = OBSERVATION_DIM + ACTION_DIM, OBSERVATION_DIM
    given = workload.n_modes * (2 * dim + 1)
    sizes = [(seen, *workload.model_hidden, given), (seen, 64, 64, 1), (seen, *workload.hidden, 1)]
    expected = [list(pairwise(net)) for net in sizes]
    assert layers_of(workload) == expected
    parts = Parts(workload, rows=PIECE + 1)
    assert parts.rows == 2 * PIECE
    assert parts.operations == 2 * parts.rows * sum(a * b for net in expected for a, b in net)
    for part in (parts.products, parts.nonlinearities, parts.noise):
        part()
