"""A class promises by defining a method itself."""

import pytest

from layeredrl_trl.acceleration import promised


class Model:
    def fast(self):
        return self, "fast"


class Changed(Model):
    def predict(self):
        return 1


class PromisesAgain(Changed):
    fast = Model.fast


class PromisesOtherwise(Changed):
    def fast(self):
        return self, "other"


def test_the_class_that_defines_it_promises():
    model = Model()
    assert promised(model, "fast")() == (model, "fast")


def test_a_subclass_does_not_inherit_a_promise():
    assert promised(Changed(), "fast") is None


@pytest.mark.parametrize(("kind", "word"), [(PromisesAgain, "fast"), (PromisesOtherwise, "other")])
def test_a_subclass_may_promise_itself(kind, word):
    model = kind()
    assert promised(model, "fast")() == (model, word)


def test_what_nobody_defines():
    assert promised(Model(), "faster") is None


def test_an_attribute_of_the_instance_is_no_promise():
    model = Changed()
    model.fast = lambda: "mine"
    assert promised(model, "fast") is None
