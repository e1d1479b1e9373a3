"""What the library is timed against does the same work: the numbers are those of the library."""

import dataclasses

import pytest
import torch
from tensordict import TensorDict

from benchmarks.bare import BareImagination, BareLearner, BarePlanner
from benchmarks.workloads import (
    BATCH_SIZE,
    GAMMA,
    WORKLOADS,
    action_spec,
    make_buffer,
    make_predictor,
    make_transitions,
)
from layeredrl_trl.functional import colouring_matrix
from layeredrl_trl.planners import ICEMPlanner

N = 2000


def small(name):
    hidden = {"model_hidden": (16,) * len(WORKLOADS[name].model_hidden), "hidden": (16, 16)}
    return dataclasses.replace(WORKLOADS[name], **hidden)


def transitions_at(columns, index):
    after = {"observation": columns["next_observation"], "terminated": columns["terminated"]}
    data = TensorDict(
        {"observation": columns["observation"], "action": columns["action"], "next": after}, [N]
    )
    return data[index]


@pytest.mark.parametrize("name", WORKLOADS)
def test_losses_and_steps(name):
    columns = make_transitions(N)
    buffer = make_buffer(columns)
    predictor, bare = make_predictor(small(name)), BareLearner(small(name), columns)
    loss = predictor.loss_module
    for group in predictor.update.optimizer.param_groups:  # as learn() sets them
        group["lr"] = 1e-3 if group["name"] == "delta_standardizer" else 3e-4
    for _ in range(4):
        start, single = bare.draw()
        start[:3] = torch.tensor([N - 1, N - 2, 199])  # ends of episodes
        index, mask = predictor._sampler.slices_from(buffer.storage, (start,), loss.slice_len)
        steps = buffer.storage[index[0]].set(loss.tensor_keys.mask, mask.unsqueeze(-1))
        info = predictor.update(steps, transitions_at(columns, single))
        if bare.seen == 0:  # where modes start is no part of the comparison
            bare.mode_start.copy_(predictor.model.mode_start)
        total = bare.loss(start, single)
        torch.testing.assert_close(info["loss"], total.detach(), rtol=1e-4, atol=1e-4)
        bare.optimizer.zero_grad()
        total.backward()
        bare.clip()
        bare.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(bare.target_params, bare.value_params, 0.005)
    for (weight, _), own in zip(bare.dynamics, predictor.model.net.weights, strict=True):
        torch.testing.assert_close(weight, own, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", WORKLOADS)
def test_rollout(name):
    predictor, bare = make_predictor(small(name)), BareImagination(small(name))
    observation, actions = torch.randn(6, 17), torch.rand(6, 4, 6) * 2 - 1
    rollout, _ = predictor.rollout(observation, actions, deterministic=True)
    latent, alive, reward = bare.rollout(observation, actions, deterministic=True)
    torch.testing.assert_close(rollout["next", "reward"][..., 0], reward, rtol=1e-4, atol=1e-5)
    ours = rollout["latent"].permute(1, 2, 0, 3, 4).flatten(2, 3)
    torch.testing.assert_close(ours, latent, rtol=1e-4, atol=1e-5)
    alive_before = rollout["next", "alive"][:, -2, ..., 0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(alive_before, alive[-1], rtol=1e-4, atol=1e-5)


def test_drawn_rollouts_are_as_wide():
    predictor, bare = make_predictor(small("mix4")), BareImagination(small("mix4"))
    observation, actions = torch.zeros(4000, 17), torch.zeros(4000, 3, 6)
    ours = predictor.rollout(observation, actions)[0]["latent"][:, -1, 0, 0]
    theirs = bare.rollout(observation, actions)[0][-1, 0]
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.1, atol=0.0)


def test_plan_is_as_good():
    """Both searches draw their own candidates; what they expect of their plans is alike."""
    workload = small("ens5")
    search = {"planning_horizon": 5, "optim_steps": 5, "num_candidates": 128, "top_k": 8}
    predictor = make_predictor(workload)
    env = predictor.env(action_spec(), num_particles=1)
    bare = BarePlanner(
        BareImagination(workload, n_particles=1), colouring=colouring_matrix(2.0, 5), **search
    )
    observation = torch.randn(64, 17)
    planner = ICEMPlanner(env, gamma=GAMMA, **search)
    state = env.initial_state(TensorDict(observation=observation, batch_size=[64]))
    planned = planner(state.clone())
    actions = bare.plan(observation)
    assert actions.shape == planned["action"].shape == (64, 6)

    def worth(first):
        return predictor.predict_reward(observation, first).mean()

    random = worth(torch.rand(64, 6) * 2 - 1)
    gains = [worth(planned["action"]) - random, worth(actions) - random]
    assert min(gains) > 0
    torch.testing.assert_close(*gains, rtol=0.2, atol=0.0)


def test_workloads_are_those_of_the_issue():
    sizes = {(w.n_models, w.n_modes, w.n_particles, w.k_steps) for w in WORKLOADS.values()}
    assert sizes == {(1, 4, 1, 1), (5, 1, 4, 1), (5, 1, 4, 5)}
    assert BATCH_SIZE == 256
