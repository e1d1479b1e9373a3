"""What a fingerprint of modules tells apart, and what it does not."""

import copy
import gc

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictParams
from torch import nn

from layeredrl_trl.acceleration import fingerprint
from layeredrl_trl.modules import ProbabilisticEnsemble, SymmetryBreakingStart
from tests.acceleration.changes import CHANGES, Scale


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("depth", [0, 2])
def test_a_change_is_seen_in_any_part(change, depth):
    module = whole = Scale()
    for _ in range(depth):
        whole = nn.Sequential(nn.Tanh(), whole)
    before, objects = fingerprint([whole])
    assert fingerprint([whole])[0] == before
    change(module)
    assert fingerprint([whole])[0] != before
    del objects


def test_numbers_in_memory_are_no_change():
    module = Scale()
    before, _ = fingerprint([module])
    with torch.no_grad():
        module.net.weight.mul_(2.0)
    module.load_state_dict({**module.state_dict(), "total": torch.randn(2)})
    module.table["a"].fill_(3.0)
    assert fingerprint([module])[0] == before


def test_it_can_be_looked_up():
    assert {fingerprint([Scale()])[0]: 1}


def test_other_modules_and_another_order_are_something_else():
    first, second = Scale(), Scale()
    found = [fingerprint(modules)[0] for modules in ((first,), (second,), (first, second), ())]
    assert len(set(found)) == len(found)
    assert fingerprint([copy.deepcopy(first)])[0] != found[0]


def test_a_part_that_is_used_twice_is_described_once():
    module = Scale()
    module.again = module.net
    twice, _ = fingerprint([module, module])
    assert twice == fingerprint([module])[0]


def test_objects_that_are_known_by_their_address_are_held():
    """Else a new one could lie where one has just been freed, and be taken for it."""
    module = Scale()
    before, objects = fingerprint([module])
    module.options[1] = None
    gc.collect()
    for _ in range(100):
        module.options[1] = object()
        assert fingerprint([module])[0] != before
    assert any(type(x) is object for x in objects)


def test_an_activation_is_not_taken_for_another():
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    before, objects = fingerprint([module])
    module[1] = nn.Sigmoid()
    assert fingerprint([module])[0] != before
    del objects


def test_of_a_long_container_the_length_is_looked_at():
    module = Scale()
    module.options = list(range(17))
    before, _ = fingerprint([module])
    module.options[3] = -1
    assert fingerprint([module])[0] == before
    module.options.append(17)
    assert fingerprint([module])[0] != before


def test_attributes_that_a_class_says_do_not_matter():
    model = SymmetryBreakingStart(ProbabilisticEnsemble(2, 0, 1), 100)
    model.advance(10)
    before, _ = fingerprint([model])
    model.advance(90)
    assert fingerprint([model])[0] == before
    model.advance(100)  # the start is over
    assert fingerprint([model])[0] != before


def test_what_params_of_a_loss_remember_of_their_use_is_no_change():
    net = nn.Linear(2, 2)
    params = TensorDictParams(TensorDict.from_module(net))
    before, _ = fingerprint([params])
    with params.to_module(net, preserve_module_state=False):
        assert fingerprint([params])[0] == before
    assert fingerprint([params])[0] == before
    params["weight"].data = torch.ones(2, 2)
    assert fingerprint([params])[0] != before
