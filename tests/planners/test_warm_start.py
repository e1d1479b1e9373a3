"""The plan as an entry of the TensorDict."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded
from torchrl.envs import StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet
from layeredrl_trl.planners import CrossEntropyPlanner, ICEMPlanner
from tests.planners.planning_envs import FreeEnv, free_state

OPTIONS = {"planning_horizon": 3, "optim_steps": 1, "num_candidates": 8, "top_k": 2}


def primed(**keys):
    """A planner, and its model as an env that carries the plan."""
    planner = ICEMPlanner(FreeEnv(Bounded(-1, 1, (1,))), **OPTIONS, **keys)
    return planner, TransformedEnv(FreeEnv(Bounded(-1, 1, (1,))), planner.make_tensordict_primer())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_primer_of_a_planner_without_weights_was_on_the_meta_device(device):
    """TorchRL's multi-process collectors make the envs while the policy is on "meta"."""
    env = FreeEnv(Bounded(-1, 1, (1,)))
    planner = copy.deepcopy(CrossEntropyPlanner(env, **OPTIONS))
    planner.cold_step = planner.cold_step.to(device)
    primer = planner.make_tensordict_primer()
    spec = primer.primers["plan"]
    assert spec.shape == (3, 1)
    assert spec.device is None or spec.device.type == "cpu"
    assert spec.zero().device.type == "cpu"


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_an_env_of_any_batch_size_was_primed_without_batch_dims(batch):
    planner, env = primed()
    start = env.reset(TensorDict(batch_size=batch))
    assert start["plan"].shape == (*batch, 3, 1) and start["plan"].isnan().all()
    for given in ({"tensordict": TensorDict(batch_size=batch)}, {"tensordict": start}):
        out = env.rollout(4, planner, auto_reset="latent" not in given["tensordict"], **given)
        assert out["plan"].shape == (*batch, 4, 3, 1)
        assert out["plan"][..., 0, :, :].isnan().all()
        before, now = out["next", "plan"][..., :-1, :, :], out["plan"][..., 1:, :, :]
        assert before.isfinite().all() and torch.equal(now, before)


def test_a_planner_acts_in_an_imagined_env_with_its_plan():
    parts = IdentityEncoder(3), ProbabilisticEnsemble(3, 0, 1, n_models=2), RewardNet(3, 0, 1)
    model = PredictorEnv(*parts, Bounded(-1, 1, (1,)), num_particles=1)
    planner = CrossEntropyPlanner(model, **OPTIONS)
    env = TransformedEnv(model, planner.make_tensordict_primer())
    check_env_specs(env)
    start = TensorDict(observation=torch.randn(5, 3), batch_size=[5])
    out = env.rollout(4, planner, tensordict=start)
    assert torch.equal(out["observation"][:, 0], start["observation"])
    assert torch.equal(out["plan"][:, 1:], out["next", "plan"][:, :-1])


@pytest.mark.parametrize("batch", [(5,), (2, 3)])
def test_only_envs_that_are_reset_lose_their_plan(batch):
    planner, env = primed()
    state = env.step_mdp(env.step(planner(env.reset(TensorDict(batch_size=batch)))))
    over = torch.rand(*batch, 1) < 0.5
    over.view(-1)[:2] = torch.tensor([True, False])
    before = state["plan"].clone()
    after = env.reset(state.set("_reset", over))["plan"]
    assert after[over.squeeze(-1)].isnan().all()
    assert torch.equal(after[~over.squeeze(-1)], before[~over.squeeze(-1)])


def test_plans_begin_anew_with_episodes_that_end_in_mid_rollout():
    planner, env = primed()
    env.append_transform(StepCounter(max_steps=2))
    out = env.rollout(6, planner, tensordict=TensorDict(batch_size=[5]), break_when_any_done=False)
    assert out["plan"].isnan().all(-1).all(-1).tolist() == [[True, False] * 3] * 5


def test_a_rollout_that_starts_without_a_plan_carried_none():
    _, env = primed()
    out = env.rollout(3, tensordict=free_state(5), auto_reset=False)  # no planner acts
    assert out["next", "plan"].shape == (5, 3, 3, 1) and out["next", "plan"].isnan().all()


def test_the_primer_is_copied_and_works_outside_of_an_env():
    planner, _ = primed(plan_key=("agent", "plan"))
    primer = planner.make_tensordict_primer()
    for twin in (primer, copy.deepcopy(primer), pickle.loads(pickle.dumps(primer))):
        out = twin(TensorDict(batch_size=[4]))
        assert out["agent", "plan"].shape == (4, 3, 1) and out["agent", "plan"].isnan().all()
        assert twin.primers["agent", "plan"].shape == (3, 1)
    env = TransformedEnv(FreeEnv(Bounded(-1, 1, (1,))), primer)
    out = env.rollout(2, planner, tensordict=TensorDict(batch_size=[4]))
    assert out["agent", "plan"].shape == (4, 2, 3, 1)


def test_a_partial_reset_keeps_the_plans_of_the_others():
    planner = CrossEntropyPlanner(
        FreeEnv(Bounded(-1.0, 1.0, (2,))),
        planning_horizon=3,
        optim_steps=1,
        num_candidates=4,
        top_k=2,
    )
    primer = planner.make_tensordict_primer()
    primer.reset_key = "_reset"
    plan, reset = torch.randn(2, 3, 2), torch.tensor([[True], [False]])
    given = TensorDict({"plan": plan, "_reset": reset}, batch_size=[2])
    out = primer._reset(given, TensorDict(batch_size=[2]))["plan"]
    assert out[0].isnan().all() and torch.equal(out[1], plan[1])
