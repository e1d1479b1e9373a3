"""Small environments to plan in, and what goes with them."""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import ModelBasedEnvBase

from tests.problems import LQREnv, PendulumModel


class OpenLoop:
    """Gives an environment of one state entry the open-loop fast path."""

    def imagine(self, tensordict, actions):
        (key,) = self.observation_spec.keys()
        state, states, rewards = tensordict[key], [], []
        for action in actions.unbind(-2):
            state, reward = self.world_model.module(state, action)
            states.append(state)
            rewards.append(reward)
        following = {key: torch.stack(states, -2), "reward": torch.stack(rewards, -2)}
        return TensorDict({"next": following}, batch_size=actions.shape[:-1])


class FastLQREnv(OpenLoop, LQREnv):
    pass


class FastPendulumModel(OpenLoop, PendulumModel):
    pass


class CliffEnv(ModelBasedEnvBase):
    """Walk along a line that may end beyond 1: softly (``alive``), by termination or truncation.

    Earns the position after the step plus the context. The bare env has ``latent [..., 1]``, the
    soft one particles ``[..., E, P, 1]`` that all do the same.
    """

    def __init__(self, mode, particles=(2, 3), prob=1.0):
        lead = particles if mode == "soft" else ()
        latent = Unbounded((*lead, 1))
        state = {"latent": latent, "context": Unbounded((1,))}
        if mode == "soft":
            state["alive"] = Bounded(0.0, 1.0, (*lead, 1))

        def soft(latent, context, alive, action):
            latent = latent + action[..., None, None, :]
            reward = (alive * (latent + context[..., None, None, :])).mean((-2, -3))
            return latent, context, alive * torch.where(latent > 1, 1 - prob, 1.0), reward

        def hard(latent, context, action):
            latent = latent + action
            over = latent > 1
            flags = (over,) if mode == "terminated" else (over & False, over, over)
            return latent, context, *flags, latent + context

        out_keys = {
            "soft": ["alive"],
            "terminated": ["terminated"],  # TorchRL completes `done`
            "truncated": ["terminated", "truncated", "done"],
        }[mode]
        in_keys = ["latent", "context", *(["alive"] if mode == "soft" else []), "action"]
        module = TensorDictModule(
            soft if mode == "soft" else hard, in_keys, ["latent", "context", *out_keys, "reward"]
        )
        super().__init__(module)
        self.observation_spec = Composite(state)
        self.state_spec = Composite(state).clone()
        self.action_spec = Bounded(-1.0, 1.0, (1,))
        self.reward_spec = Unbounded((1,))
        if mode == "truncated":
            flags = ("done", "terminated", "truncated")
            self.done_spec = Composite({k: Categorical(2, (1,), dtype=torch.bool) for k in flags})

    def _reset(self, tensordict, **kwargs):
        return self.observation_spec.zero(tensordict.batch_size)


class FreeEnv(ModelBasedEnvBase):
    """Any action spec; earns ``reward(action)``."""

    def __init__(self, action_spec, reward=lambda action: -action.square().sum(-1, keepdim=True)):
        def step(latent, action):
            return latent, reward(action)

        super().__init__(TensorDictModule(step, ["latent", "action"], ["latent", "reward"]))
        self.observation_spec = Composite(latent=Unbounded((1,)))
        self.action_spec = action_spec
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict, **kwargs):
        return self.observation_spec.zero(tensordict.batch_size)


def free_state(*batch_size):
    return TensorDict({"latent": torch.zeros(*batch_size, 1)}, batch_size=batch_size)


def quadratic_value(P):
    return TensorDictModule(
        lambda x: -((x @ P) * x).sum(-1, keepdim=True), ["latent"], ["state_value"]
    )
