"""Reward and value: wrapping of plain modules, state value or Q-function, shapes, errors."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from layeredrl_trl.modules import (
    LatentFunction,
    RewardNet,
    ValueNet,
    as_reward_module,
    as_termination_module,
    as_value_module,
    evaluate,
    reads_action,
)


class StateValue(nn.Module):
    def forward(self, latent, context):
        return latent.sum(-1, keepdim=True) + context.sum(-1, keepdim=True)


class ActionValue(nn.Module):
    def forward(self, latent, context, action, scale=1.0):
        return scale * (latent.sum(-1, keepdim=True) - action.sum(-1, keepdim=True))


class Squeezed(nn.Module):
    def forward(self, latent, context, action):
        return latent.sum(-1)


def entries(*batch, action=2):
    return {
        "latent": torch.randn(*batch, 3),
        "context": torch.randn(*batch, 1),
        "action": torch.randn(*batch, action),
    }


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_nets_write_their_entry(batch):
    data = TensorDict(entries(*batch), batch_size=batch)
    for net, key in (
        (RewardNet(3, 1, 2), "reward"),
        (ValueNet(3, 1), "state_value"),
        (ValueNet(3, 1, action_dim=2), "state_action_value"),
    ):
        out = net(data.clone())
        assert out[key].shape == (*batch, 1)
        assert torch.equal(out[key], evaluate(net, dict(data.items())))
        assert torch.equal(out[key], net(*(data[k] for k in net.in_keys)))


def test_nets_take_other_and_nested_keys():
    data = TensorDict(z=torch.randn(4, 3), c=torch.zeros(4, 0), a=torch.randn(4, 2), batch_size=[4])
    net = RewardNet(3, 0, 2, in_keys=["z", "c", "a"], out_keys=[("model", "r")])
    assert net(data)["model", "r"].shape == (4, 1)
    net = ValueNet(3, 0, in_keys=["z", "c"], out_keys=["v"])
    assert net(data)["v"].shape == (4, 1)


@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
def test_discrete_actions_as_index_and_one_hot_agree(batch):
    index = torch.randint(5, batch)
    one_hot = nn.functional.one_hot(index, 5)
    latent, context = torch.randn(*batch, 3), torch.zeros(*batch, 0)
    for net in (RewardNet(3, 0, 5), ValueNet(3, 0, action_dim=5)):
        expected = net(latent, context, one_hot.float())
        for action in (index, index.unsqueeze(-1), one_hot, one_hot.bool()):
            assert torch.equal(net(latent, context, action), expected)


def test_plain_modules_are_wrapped():
    data = entries(4)
    reward = as_reward_module(ActionValue())
    assert reward.in_keys == ["latent", "context", "action"] and reward.out_keys == ["reward"]
    expected = data["latent"].sum(-1, keepdim=True) - data["action"].sum(-1, keepdim=True)
    assert torch.equal(evaluate(reward, data), expected)
    assert torch.equal(reward(TensorDict(data, [4]))["reward"], expected)


@pytest.mark.parametrize(
    ("module", "is_q"), [(StateValue(), False), (ActionValue(), True), (Squeezed(), True)]
)
def test_a_value_is_a_q_function_if_it_reads_the_action(module, is_q):
    wrapped = as_value_module(module)
    assert isinstance(wrapped, LatentFunction)
    assert reads_action(wrapped) is is_q
    assert wrapped.out_keys == ["state_action_value" if is_q else "state_value"]


def test_tensordict_modules_and_none_pass_through():
    module = TensorDictModule(nn.Linear(3, 1), ["z"], ["v"])
    for wrap in (as_reward_module, as_value_module):
        assert wrap(module) is module
        assert wrap(None) is None
    assert reads_action(ValueNet(3, 0, action_dim=2)) and not reads_action(ValueNet(3, 0))
    assert reads_action(TensorDictModule(nn.Identity(), [("x", "a")], ["v"]), ("x", "a"))


@pytest.mark.parametrize("batch", [(4,), (4, 1, 1)])
def test_evaluate_any_tensordict_module(batch):
    module = TensorDictModule(lambda z: z[..., :1], in_keys=["latent"], out_keys=["v"])
    data = entries(*batch)
    assert torch.equal(evaluate(module, data), data["latent"][..., :1])
    assert "v" not in data


def test_gradients_reach_parameters_and_inputs():
    data = {key: x.requires_grad_() for key, x in entries(4).items()}
    net = RewardNet(3, 1, 2)
    evaluate(net, data).sum().backward()
    assert all((x.grad != 0).any() for x in (*data.values(), *net.parameters()))


@pytest.mark.parametrize("batch", [(4,), (4, 1, 1), (1, 1)])
def test_a_reward_without_its_last_dim_is_not_broadcast(batch):
    # [N, E, 1] times [N, E, 1, 1] would broadcast without a word
    with pytest.raises(ValueError, match=r"must return \[\.\.\., 1\], here"):
        evaluate(as_reward_module(Squeezed()), entries(*batch))


@pytest.mark.parametrize(
    "function", [lambda z: z, lambda z: z.sum(), lambda z: z[:1, :1], lambda z: z[..., 0]]
)
def test_output_of_another_shape(function):
    module = TensorDictModule(function, in_keys=["latent"], out_keys=["v"])
    with pytest.raises((ValueError, RuntimeError), match=r"must return|batch dimension mismatch"):
        evaluate(module, entries(4))
    wrapped = LatentFunction(lambda z: function(z), in_keys=["latent"], out_keys=["v"])
    with pytest.raises(ValueError, match=r"must return \[\.\.\., 1\], here \[4, 1\]"):
        evaluate(wrapped, entries(4))


def test_missing_entry():
    with pytest.raises(KeyError, match=r"RewardNet reads \['action'\], but there is only"):
        evaluate(RewardNet(3, 1, 2), {k: v for k, v in entries(4).items() if k != "action"})


@pytest.mark.parametrize(
    ("module", "count"), [(nn.Linear(3, 1), 1), (nn.Bilinear(3, 1, 1), None), (nn.Identity(), 1)]
)
def test_plain_value_with_another_signature(module, count):
    if count is None:
        assert not reads_action(as_value_module(module))
        return
    with pytest.raises(TypeError, match=rf"val_func: .*{type(module).__name__}.* {count} arg"):
        as_value_module(module)


@pytest.mark.parametrize("shape", [(4, 1), (1, 2), (4,), (4, 3)])
def test_action_that_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"action: expected shape \[4, 2\]"):
        evaluate(RewardNet(3, 1, 2), entries(4) | {"action": torch.zeros(shape)})


@pytest.mark.parametrize("key", ["latent", "context"])
def test_input_that_does_not_fit(key):
    data = entries(4)
    data[key] = torch.zeros(4, 7)
    with pytest.raises(ValueError, match="expected inputs with last dims"):
        evaluate(RewardNet(3, 1, 2), data)


def test_state_dict_round_trip():
    net, other, data = ValueNet(3, 1), ValueNet(3, 1), entries(4)
    other.load_state_dict(net.state_dict())
    assert torch.equal(evaluate(net, data), evaluate(other, data))


# --- found by a user


@pytest.mark.parametrize(
    ("function", "is_q"),
    [
        (lambda latent, context: latent[..., :1], False),
        (lambda latent, context, action: action[..., :1], True),
        (lambda latent, context, scale=2.0: scale * latent[..., :1], False),
    ],
)
def test_a_plain_function_as_value_crashed(function, is_q):
    value, data = as_value_module(function), entries(4)
    assert reads_action(value) is is_q
    assert evaluate(value, data).shape == (4, 1)
    with pytest.raises(TypeError, match=r"val_func: .* but <lambda> takes 1 arguments"):
        as_value_module(lambda latent: latent)


def test_reward_and_value_are_told_apart():
    with pytest.raises(TypeError, match=r"rew: expected a reward, got a ValueNet\. Swap it with"):
        as_reward_module(ValueNet(3, 1), argument="rew")
    with pytest.raises(TypeError, match=r"val: expected a value, got a RewardNet\. Swap it with"):
        as_value_module(RewardNet(3, 1, 2), argument="val")


@pytest.mark.parametrize("thing", ["x", 3, torch.zeros(3)])
@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (as_reward_module, "reward"),
        (as_value_module, "val_func"),
        (as_termination_module, "termination_fn"),
    ],
)
def test_what_cannot_be_called_is_named(wrap, name, thing):
    with pytest.raises(TypeError, match=rf"{name}: expected a module or a function f\(latent"):
        wrap(thing)


def test_errors_about_what_a_function_returns_spoke_of_an_internal_class():
    data = entries(4)
    with pytest.raises(ValueError, match=r"^reward must return \[..., 1\], here \[4, 1\], got"):
        evaluate(as_reward_module(lambda latent, context, action: latent), data)
    with pytest.raises(ValueError, match=r"^val_func must return"):
        evaluate(as_value_module(lambda latent, context: latent), data)
    with pytest.raises(TypeError, match=r"^reward must return a tensor .*, got 1.0 \(float\)"):
        evaluate(as_reward_module(lambda latent, context, action: 1.0), data)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: RewardNet(3, -1, 1), ValueError, "context_dim must be at least 0, got -1"),
        (lambda: RewardNet(0, 0, 1), ValueError, "latent_state_dim must be at least 1, got 0"),
        (lambda: RewardNet(3, 0, 1.0), TypeError, "action_dim must be an integer, got 1.0"),
        (lambda: ValueNet(3, 0, action_dim=0), ValueError, "action_dim must be at least 1, got 0"),
        (lambda: ValueNet("3", 0), TypeError, "latent_state_dim must be an integer, got '3'"),
        (lambda: ValueNet(3, 0, hidden_sizes=32), TypeError, "hidden_sizes must be a sequence"),
        (lambda: RewardNet(3, 0, 1, hidden_sizes=(0,)), ValueError, r"hidden_sizes\[0\] must be"),
    ],
)
def test_sizes_that_are_none(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: RewardNet(3, 0, 1, in_keys="lca"), TypeError, "RewardNet: in_keys must be a seq"),
        (lambda: RewardNet(3, 0, 1, out_keys="r"), TypeError, "RewardNet: out_keys must be a seq"),
        (
            lambda: RewardNet(3, 0, 1, in_keys=["z", "c"]),
            ValueError,
            r"must hold 3 key\(s\), got 2",
        ),
        (lambda: ValueNet(3, 0, in_keys="zc"), TypeError, "ValueNet: in_keys must be a sequence"),
        (lambda: ValueNet(3, 0, in_keys=["z", "c", "a"]), ValueError, r"must hold 2 key\(s\)"),
        (lambda: ValueNet(3, 0, in_keys=["z", 1]), TypeError, r"in_keys\[1\] must be a string"),
        (
            lambda: LatentFunction(nn.Identity(), in_keys="latent", out_keys=["v"]),
            TypeError,
            "LatentFunction: in_keys must be a sequence of keys",
        ),
    ],
)
def test_keys_that_are_a_string_are_not_split_into_letters(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_value_of_three_arguments_that_ignores_the_action_can_be_declared_a_state_value():
    """It was taken for a Q-function: another bootstrap, and no terminal value of a planner."""

    class Ignores(nn.Module):
        reads_action = False

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, latent, context, action):
            return self.layer(latent)

    module, data = Ignores(), entries(4)
    function = lambda latent, context, action: latent[..., :1]  # noqa: E731
    declared = as_value_module(module), as_value_module(function, reads_action=False)
    for value in declared:
        assert not reads_action(value) and value.out_keys == ["state_value"]
        assert evaluate(value, data).shape == (4, 1)
    assert {id(p) for p in declared[0].parameters()} == {id(p) for p in module.parameters()}
    assert reads_action(as_value_module(function))
    assert reads_action(as_value_module(module, reads_action=True))
    with pytest.raises(TypeError, match="val_func: reads_action must be True or False, got 'no'"):
        as_value_module(function, reads_action="no")
    with pytest.raises(ValueError, match="val_func: reads_action is True, but it takes no action"):
        as_value_module(StateValue(), reads_action=True)


def test_a_head_without_statistics_is_a_plain_perceptron():
    net, data = RewardNet(3, 1, 2), entries(4)
    x = torch.cat(list(data.values()), -1)
    torch.testing.assert_close(evaluate(net, data), net.module.layers(x))
    assert net.has_statistics and net.target_scale == 1
    plain = as_reward_module(ActionValue())
    plain.update_statistics(data, torch.ones(4, 1))
    assert not plain.has_statistics and plain.target_scale is None


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_head_standardises_what_it_reads_and_what_it_learns(batch, masked):
    units = torch.tensor([100.0, 1.0, 0.01, 5.0, 3.0, 0.2])
    seen = 7 + units * torch.randn(50, 6)
    target = 1e3 + 200 * torch.randn(50, 1)
    mask = torch.rand(50, 1) < 0.5 if masked else None
    net = RewardNet(3, 1, 2)
    parts = dict(zip(("latent", "context", "action"), seen.split([3, 1, 2], -1), strict=True))
    net.update_statistics(parts, target, mask)
    rows = slice(None) if mask is None else mask[:, 0]
    mean, std = seen[rows].mean(0), seen[rows].std(0, correction=0)
    centre, unit = target[rows].mean(), target[rows].std(correction=0)
    x = 7 + units * torch.randn(*batch, 6)
    expected = centre + unit * net.module.layers((x - mean) / std)
    torch.testing.assert_close(net(*x.split([3, 1, 2], -1)), expected, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(net.target_scale, unit.reshape(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("constant", [0.0, 1e-3, -500.0])
def test_the_unit_of_a_constant_target_is_its_size(constant):
    net, data = ValueNet(3, 1), entries(4)
    net.update_statistics(data, torch.full((4, 1), constant))
    assert net.target_scale.item() == pytest.approx(abs(constant) or 1.0)


def test_indices_of_discrete_actions_are_counted_as_one_hot():
    index, data = torch.randint(2, (9,)), entries(9)
    nets = [RewardNet(3, 1, 2) for _ in range(2)]
    for net, action in zip(nets, (index, nn.functional.one_hot(index, 2)), strict=True):
        net.update_statistics(data | {"action": action}, torch.randn(9, 1).sign())
    for a, b in zip(*(net.module.moments.mean[:-1] for net in nets), strict=True):
        assert torch.equal(a, b)


class Sum(nn.Linear):
    """A layer over all that it is given."""

    def __init__(self, dim, dtype):
        super().__init__(dim, 1, dtype=dtype)

    def forward(self, *inputs):
        return super().forward(torch.cat(inputs, -1))


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-6), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_network_of_another_dtype_failed_in_a_matrix_product(dtype, error, wrapped):
    net = Sum(5, dtype)
    inputs = {"latent": torch.randn(4, 3), "context": torch.randn(4, 1)}
    inputs["action"] = torch.randn(4, 1)
    module = TensorDictModule(net, [*inputs], ["reward"]) if wrapped else as_reward_module(net)
    row = torch.cat([*inputs.values()], -1).double()
    expected = row @ net.weight.double().mT + net.bias.double()
    found = evaluate(module, inputs)
    found.sum().backward()
    assert found.dtype is torch.float32 and net.weight.grad.dtype is dtype
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)
    if not wrapped:
        out = module(TensorDict(inputs, batch_size=[4]))["reward"]
        assert out.dtype is torch.float32 and torch.equal(out, found)


def test_a_function_that_returns_float64_is_cast_but_bools_stay():
    inputs = {key: torch.ones(4, 1) for key in ("latent", "context", "action")}
    wide = as_reward_module(lambda latent, context, action: latent.double())
    assert evaluate(wide, inputs).dtype is torch.float32
    inputs["next", "latent"] = inputs["latent"]
    ends = as_termination_module(lambda latent, context, action, following: following > 0)
    assert evaluate(ends, inputs).dtype is torch.bool
