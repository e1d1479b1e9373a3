"""State values made of a Q-function: against loops over states and actions."""

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical, OneHot, Unbounded

from layeredrl_trl import BestActionValue, PolicyValue
from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import IdentityEncoder, ValueNet
from layeredrl_trl.planners import CandidateReturn, CrossEntropyPlanner
from tests.oracles import random_ensemble, random_reward

BATCH_SHAPES = [(), (3,), (2, 3), (4, 3, 2)]
D, C, A = 3, 1, 2
BOX = Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 3.0]), (2,))


def plain_q(latent, context, action):
    return latent.sum(-1, keepdim=True) * action.sum(-1, keepdim=True) + context


def plain_policy(latent, context):
    return torch.tanh(latent[..., :A]) + context


def reading(names, function, out):
    return TensorDictModule(function, names, [out])


QS = {
    "net": ValueNet(D, C, action_dim=A, hidden_sizes=(8,)),
    "plain": plain_q,
    "module": reading(["latent", "context", "action"], plain_q, "state_action_value"),
}
POLICIES = {"plain": plain_policy, "module": reading(["latent", "context"], plain_policy, "action")}


def ask(q, latent, context, action):
    """The number that a Q-function gives a single pair."""
    if isinstance(q, TensorDictModule) and not isinstance(q, ValueNet):
        return q(TensorDict(latent=latent, context=context, action=action))[q.out_keys[0]].item()
    return q(latent, context, action).item()


def states(*batch):
    latent, context = torch.randn(*batch, D), torch.randn(*batch, C)
    return TensorDict(latent=latent, context=context, batch_size=batch)


def every_state(td):
    batch = td.batch_size.numel()
    return zip(td["latent"].reshape(batch, D), td["context"].reshape(batch, C), strict=True)


# --- contract, oracle


@pytest.mark.parametrize("batch", BATCH_SHAPES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("q", QS)
def test_value_of_a_policys_action(q, policy, batch):
    value, td = PolicyValue(QS[q], POLICIES[policy]), states(*batch)
    assert value.in_keys == ["latent", "context"] and value.out_keys == ["state_value"]
    before = td.clone()
    out = value(td)
    assert out is td and out["state_value"].shape == (*batch, 1)
    assert set(td.keys()) == {"latent", "context", "state_value"}
    assert (td.exclude("state_value") == before).all()
    expected = [ask(QS[q], s, c, plain_policy(s, c)) for s, c in every_state(td)]
    torch.testing.assert_close(td["state_value"].flatten(), torch.tensor(expected))


@pytest.mark.parametrize("batch", BATCH_SHAPES)
@pytest.mark.parametrize("q", QS)
def test_value_of_the_best_of_given_actions(q, batch):
    actions, td = torch.randn(5, A), states(*batch)
    value = BestActionValue(QS[q], actions)
    assert value.in_keys == ["latent", "context"]
    out = value(td)
    assert set(out.keys()) == {"latent", "context", "state_value"}
    expected = [max(ask(QS[q], s, c, a) for a in actions) for s, c in every_state(td)]
    torch.testing.assert_close(out["state_value"].flatten(), torch.tensor(expected))


@pytest.mark.parametrize(
    "actions",
    [OneHot(4), Categorical(4), Categorical(4, shape=(1,)), torch.arange(4), torch.eye(4)],
    ids=["one-hot", "categorical", "categorical-1", "indices", "vectors"],
)
@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_value_of_the_best_of_all_discrete_actions(batch, actions):
    q, td = ValueNet(D, C, action_dim=4, hidden_sizes=(8,)), states(*batch)
    out = BestActionValue(q, actions)(td)
    expected = [max(ask(q, s, c, a) for a in torch.eye(4)) for s, c in every_state(td)]
    torch.testing.assert_close(out["state_value"].flatten(), torch.tensor(expected))


def test_continuous_actions_are_spread_evenly_and_the_same_for_all_states_and_calls():
    """Drawn anew, they made the same plan worth something else in every round."""
    seen = []

    def q(latent, context, action):
        seen.append(action)
        return action[..., :1]

    value = BestActionValue(q, BOX, num_samples=500)
    out = value(states(2, 3))
    (actions,) = seen
    assert actions.shape == (2, 3, 500, 2) and (actions == actions[:1, :1]).all()
    one = actions[0, 0]
    assert (one >= BOX.space.low).all() and (one <= BOX.space.high).all()
    torch.testing.assert_close(one.mean(0), torch.tensor([0.0, 1.5]), rtol=0, atol=0.2)
    torch.testing.assert_close(one.std(0), torch.tensor([2.0, 3.0]) / 12**0.5, rtol=0.1, atol=0)
    assert torch.equal(out["state_value"], one[:, 0].max().expand(2, 3, 1))
    value(states(2, 3))
    assert torch.equal(seen[1], seen[0])


def test_nested_keys():
    names = [("agent", "z"), ("agent", "c"), ("agent", "a")]
    q = ValueNet(D, C, action_dim=A, in_keys=names)
    td = states(4)
    nested = TensorDict({"agent": {"z": td["latent"], "c": td["context"]}}, batch_size=[4])
    for kind, other in ((PolicyValue, plain_policy), (BestActionValue, torch.randn(3, A))):
        value = kind(q, other, in_keys=names, out_keys=[("agent", "v")])
        out = value(nested.clone())
        assert value.in_keys == names[:2] and out["agent", "v"].shape == (4, 1)
        plain = ValueNet(D, C, action_dim=A)
        plain.load_state_dict(q.state_dict())
        expected = kind(plain, other)(td.clone())["state_value"]
        torch.testing.assert_close(out["agent", "v"], expected)


# --- in a planner


@pytest.mark.parametrize("num_particles", [None, 1])
def test_a_planner_takes_it_as_a_terminal_value(num_particles):
    model = random_ensemble(3, 0, 2, n_particles_per_model=2)
    options = {"num_particles": num_particles, "deterministic": True}
    env = PredictorEnv(IdentityEncoder(3), model, random_reward(model), BOX, **options)
    q = ValueNet(3, 0, action_dim=2, hidden_sizes=(8,))
    start = TensorDict(observation=torch.randn(4, 3), batch_size=[4])
    start, actions = env.initial_state(start), torch.rand(4, 5, 2)
    for value in (PolicyValue(q, lambda s, c: s[..., :2]), BestActionValue(q, BOX)):
        score = CandidateReturn(env, gamma=0.9, terminal_value=value)
        torch.manual_seed(0)
        returns = score(start, actions)
        last = env.imagine(start, actions)["next"][:, -1]
        torch.manual_seed(0)
        context = last["context"][:, None, None].expand(*last["latent"].shape[:-1], 0)
        state = {"latent": last["latent"], "context": context}
        worth = value(TensorDict(state, batch_size=last["latent"].shape[:-1]))["state_value"]
        plain = CandidateReturn(env, gamma=0.9)(start, actions)
        expected = plain + 0.9**5 * (last["alive"] * worth).mean((1, 2))
        torch.testing.assert_close(returns, expected, rtol=1e-4, atol=1e-5)
        planner = CrossEntropyPlanner(
            env,
            planning_horizon=3,
            optim_steps=2,
            num_candidates=16,
            top_k=4,
            gamma=0.9,
            terminal_value=value,
        )
        assert planner(start.clone())["action"].shape == (4, 2)


# --- gradients, errors, state


def test_gradient_reaches_q_and_policy():
    q, net = ValueNet(D, C, action_dim=A), nn.Linear(D, A)
    policy = reading(["latent"], net, "action")
    PolicyValue(q, policy)(states(5))["state_value"].sum().backward()
    assert all((p.grad != 0).any() for p in (*q.parameters(), *net.parameters()))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PolicyValue(ValueNet(D, C), plain_policy), ValueError, "PolicyValue: q must be a"),
        (lambda: BestActionValue(ValueNet(D, C), BOX), ValueError, "reads 'action', but it reads"),
        (lambda: PolicyValue(None, plain_policy), TypeError, "must be a Q-function, got None"),
        (lambda: PolicyValue(3, plain_policy), TypeError, "q: expected a module or a function"),
        (lambda: PolicyValue(plain_q, None), TypeError, "policy: expected a module or a function"),
        (
            lambda: PolicyValue(plain_q, reading(["latent"], torch.tanh, "loc")),
            ValueError,
            "policy must write 'action', it writes",
        ),
        (lambda: BestActionValue(plain_q, 4), TypeError, "expected a tensor, or a OneHot"),
        (lambda: BestActionValue(plain_q, Binary(4)), TypeError, "got Binary"),
        (lambda: BestActionValue(plain_q, MultiCategorical((2, 3))), TypeError, "got MultiCat"),
        (lambda: BestActionValue(plain_q, Unbounded((2,))), ValueError, "must be bounded"),
        (lambda: BestActionValue(plain_q, BOX.expand(3, 2)), ValueError, "one vector of one env"),
        (lambda: BestActionValue(plain_q, OneHot(3).expand(2, 3)), ValueError, "spec of one env"),
        (lambda: BestActionValue(plain_q, torch.zeros(0, 2)), ValueError, "at least one"),
        (lambda: BestActionValue(plain_q, torch.zeros(1, 2, 2)), ValueError, r"\[K, A\]"),
        (lambda: BestActionValue(plain_q, BOX, num_samples=0), ValueError, "num_samples must be"),
        (lambda: PolicyValue(plain_q, plain_policy, in_keys="zca"), TypeError, "in_keys must be"),
        (
            lambda: PolicyValue(plain_q, plain_policy, out_keys=["a", "b"]),
            ValueError,
            "out_keys must hold 1",
        ),
    ],
)
def test_construction_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_output_of_another_shape_is_not_broadcast():
    def squeezed(latent, context, action):
        return latent.sum(-1)

    for value in (PolicyValue(squeezed, plain_policy), BestActionValue(squeezed, torch.eye(A))):
        with pytest.raises(ValueError, match=r"q must return \[..., 1\]"):
            value(states(4))
    flat = PolicyValue(plain_q, lambda latent, context: latent.sum())
    with pytest.raises(ValueError, match=r"policy must return actions \[4, 'A'\] .*, got \[\]"):
        flat(states(4))


def test_entries_of_other_shapes_and_missing_ones():
    value = PolicyValue(plain_q, plain_policy)
    with pytest.raises(KeyError, match=r"PolicyValue reads \['context'\], but"):
        value(states(4).exclude("context"))
    td = TensorDict(latent=torch.zeros(4, 2, D), context=torch.zeros(4, C), batch_size=[4])
    with pytest.raises(ValueError, match=r"one leading shape, \[4, 2\], but 'context'"):
        value(td)


def test_planners_that_refuse_a_q_function_name_what_helps():
    model = random_ensemble(3, 0, 2)
    env = PredictorEnv(IdentityEncoder(3), model, None, BOX)
    with pytest.raises(ValueError, match=r"PolicyValue\(q, policy\) or BestActionValue\(q, actio"):
        CandidateReturn(env, gamma=0.9, terminal_value=ValueNet(3, 0, action_dim=2))


def test_each_module_is_there_once():
    q, policy = ValueNet(D, C, action_dim=A), reading(["latent"], nn.Linear(D, A), "action")
    value = PolicyValue(q, policy)
    assert len(value.state_dict()) == len(q.state_dict()) + len(policy.state_dict())
    best = BestActionValue(q, BOX)
    assert list(best.state_dict()) == [f"q.{key}" for key in q.state_dict()]
    again, td = copy.deepcopy(value), states(4)
    assert torch.equal(again(td.clone())["state_value"], value(td)["state_value"])


class Policy(nn.Linear):
    def forward(self, latent, context):
        return super().forward(latent).tanh()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_policy_of_float64_gets_and_gives_what_the_q_function_reads(wrapped):
    policy = Policy(3, 2, dtype=torch.float64)
    module = TensorDictModule(policy, ["latent", "context"], ["action"]) if wrapped else policy
    q = ValueNet(3, 0, action_dim=2)
    latent, context = torch.randn(4, 3), torch.zeros(4, 0)
    state = TensorDict(latent=latent, context=context, batch_size=[4])
    found = PolicyValue(q, module)(state)["state_value"]
    expected = q.module(latent, context, policy(latent.double(), context).float())
    torch.testing.assert_close(found, expected)


def test_actions_of_float64_are_tried_in_float32():
    actions = torch.randn(5, 2, dtype=torch.float64)
    given = BestActionValue(ValueNet(3, 0, action_dim=2), actions)
    spec = Bounded(-1, 1, (2,), dtype=torch.float64)
    for value in (given, BestActionValue(given.q, spec)):
        assert all(x.dtype is torch.float32 for x in value.buffers())
        state = TensorDict(latent=torch.randn(4, 3), context=torch.zeros(4, 0), batch_size=[4])
        assert value(state)["state_value"].dtype is torch.float32
