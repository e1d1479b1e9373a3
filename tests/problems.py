"""Problems with known answers: model-based environments with exact dynamics, and transitions."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import Bounded, Composite, OneHot, TensorSpec, Unbounded
from torchrl.envs import ModelBasedEnvBase

DOUBLE_INTEGRATOR = {
    "A": torch.tensor([[1.0, 0.2], [0.0, 1.0]]),
    "B": torch.tensor([[0.02], [0.2]]),
    "Q": torch.diag(torch.tensor([1.0, 0.1])),
    "R": torch.tensor([[0.05]]),
}
"""A cart ``(position, speed)`` pushed by a force every 0.2 s."""

TWO_MOTORS = {
    "A": torch.tensor([[1.05, 0.1, 0.0], [0.0, 0.9, 0.2], [0.1, 0.0, 0.95]]),
    "B": torch.tensor([[0.2, 0.0], [0.0, 0.3], [0.1, -0.1]]),
    "Q": torch.diag(torch.tensor([1.0, 0.5, 0.2])),
    "R": torch.diag(torch.tensor([0.1, 0.3])),
}
"""An unstable system of three states and two actions that work on each other."""


def riccati(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    R: Tensor,
    horizon: int,
    terminal: Tensor | None = None,
    gamma: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Solve the finite-horizon linear-quadratic regulator backwards in time.

    With reward ``-(x' Q x + a' R a)`` of the state *before* the step, and ``-x' terminal x`` after
    the last one, the best return of the steps from t on is ``-x_t' P_t x_t``, with
    ``a_t = -K_t x_t``.

    Returns:
        ``P [horizon + 1, D, D]`` and ``K [horizon, A, D]``.
    """
    P = [torch.zeros_like(Q) if terminal is None else terminal]
    K = []
    for _ in range(horizon):
        gain = torch.linalg.solve(R + gamma * B.T @ P[0] @ B, gamma * B.T @ P[0] @ A)
        K.insert(0, gain)
        P.insert(0, Q + gain.T @ R @ gain + gamma * (A - B @ gain).T @ P[0] @ (A - B @ gain))
    return torch.stack(P), torch.stack(K)


class LQREnv(ModelBasedEnvBase):
    """Linear dynamics, quadratic cost, no termination: ``latent [..., D]``, ``action [..., A]``.

    ``latent' = A latent + B action``, ``reward = -(latent' Q latent + action' R action)``. Starts
    from a standard normal state. The best return is :func:`riccati`'s as long as its actions are
    within ``bound``.

    Args:
        A, B, Q, R (Tensor): ``[D, D]``, ``[D, A]``, ``[D, D]``, ``[A, A]``.
        bound (float): the action's, on both sides.
    """

    def __init__(self, A: Tensor, B: Tensor, Q: Tensor, R: Tensor, bound: float = 5.0) -> None:
        def step(latent: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
            cost = ((latent @ Q) * latent).sum(-1) + ((action @ R) * action).sum(-1)
            return latent @ A.T + action @ B.T, -cost.unsqueeze(-1)

        super().__init__(TensorDictModule(step, ["latent", "action"], ["latent", "reward"]))
        self.observation_spec = Composite(latent=Unbounded(A.shape[:1]))
        self.state_spec = Composite(latent=Unbounded(A.shape[:1]))
        self.action_spec = Bounded(-bound, bound, B.shape[1:])
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict: TensorDict | None, **kwargs) -> TensorDict:
        batch_size = self.batch_size if tensordict is None else tensordict.batch_size
        latent = torch.randn(*batch_size, *self.observation_spec["latent"].shape)
        return TensorDict({"latent": latent}, batch_size=batch_size)


class PendulumModel(ModelBasedEnvBase):
    """The equations and starts of Gymnasium's Pendulum-v1, on its observation ``x [..., 3]``."""

    def __init__(self) -> None:
        def step(x: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
            angle, speed = torch.atan2(x[..., 1:2], x[..., 0:1]), x[..., 2:3]
            reward = -(angle**2 + 0.1 * speed**2 + 0.001 * action**2)
            speed = (speed + (15 * torch.sin(angle) + 3 * action) * 0.05).clamp(-8, 8)
            angle = angle + speed * 0.05
            return torch.cat([torch.cos(angle), torch.sin(angle), speed], -1), reward

        super().__init__(TensorDictModule(step, ["x", "action"], ["x", "reward"]))
        self.observation_spec = Composite(x=Unbounded((3,)))
        self.state_spec = Composite(x=Unbounded((3,)))
        self.action_spec = Bounded(-2.0, 2.0, (1,))
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict: TensorDict | None, **kwargs) -> TensorDict:
        batch_size = self.batch_size if tensordict is None else tensordict.batch_size
        angle = (2 * torch.rand(*batch_size, 1) - 1) * torch.pi
        speed = 2 * torch.rand(*batch_size, 1) - 1
        x = torch.cat([torch.cos(angle), torch.sin(angle), speed], -1)
        return TensorDict({"x": x}, batch_size=batch_size)


class TwoStepBanditEnv(ModelBasedEnvBase):
    """Two choices and the end: the arm that costs something first pays most.

    ``latent [..., 1]`` is 0 at the start. The first action chooses an arm by being above or below
    0.5; the second earns the arm's prize if it is below 0. Then the episode terminates.

    ====== ============ ===== ===========
    arm    first action first second step
    ====== ============ ===== ===========
    greedy <= 0.5       +0.1  0.0
    patient > 0.5       -0.2  1.0
    ====== ============ ===== ===========

    Steps taken after the end would earn 10 each: a planner that counts them is found out.

    Args:
        action_spec (TensorSpec, optional): ``OneHot(3)`` or ``Categorical(3)`` of shape ``()`` or
            ``(1,)`` for three actions that stand for -0.75, 0 and 0.75.
    """

    best_return = 0.8
    greedy_return = 0.1

    def __init__(self, action_spec: TensorSpec | None = None) -> None:
        def step(latent: Tensor, action: Tensor) -> tuple[Tensor, ...]:
            if isinstance(action_spec, OneHot):
                action = 0.75 * (action.long().argmax(-1, keepdim=True) - 1)
            elif action_spec is not None:
                action = 0.75 * (action.reshape(latent.shape) - 1)
            first, over = latent == 0, latent.abs() >= 2
            patient = action > 0.5
            arm = torch.where(patient, 1.0, -1.0)
            prize = torch.where((latent > 0) & (action < 0), 1.0, 0.0)
            reward = torch.where(first, torch.where(patient, -0.2, 0.1), prize)
            reward = torch.where(over, 10.0, reward)
            return torch.where(first, arm, 2 * latent.sign()), reward, ~first, ~first

        out_keys = ["latent", "reward", "terminated", "done"]
        super().__init__(TensorDictModule(step, ["latent", "action"], out_keys))
        self.observation_spec = Composite(latent=Unbounded((1,)))
        self.state_spec = Composite(latent=Unbounded((1,)))
        self.action_spec = Bounded(-1.0, 1.0, (1,)) if action_spec is None else action_spec
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict: TensorDict | None, **kwargs) -> TensorDict:
        batch_size = self.batch_size if tensordict is None else tensordict.batch_size
        return TensorDict({"latent": torch.zeros(*batch_size, 1)}, batch_size=batch_size)


class LinearGaussian:
    """Transitions ``s' = A s + B a + noise`` that end with a probability that is known.

    Two latent dims of unlike noise and one action, all standard normal. The step terminates with
    probability ``0.8 sigmoid(2 s_0 - 1)``.
    """

    A = torch.tensor([[0.9, 0.2], [-0.1, 0.95]])
    B = torch.tensor([[0.3], [1.0]])
    noise = torch.tensor([0.05, 0.4])

    @property
    def negative_log_likelihood(self) -> float:
        """The expected one of the true density, in nats: the entropy of the noise."""
        return sum(0.5 * math.log(2 * math.pi * math.e * s**2) for s in self.noise.tolist())

    def hazard(self, latent: Tensor) -> Tensor:
        """The true probability of termination ``[..., 1]`` at ``latent`` ``[..., 2]``."""
        return 0.8 * torch.sigmoid(2 * latent[..., :1] - 1)

    def transitions(self, n: int) -> TensorDict:
        """Draw ``n``, with the entries that a dynamics model learns from."""
        latent, action = torch.randn(n, 2), torch.randn(n, 1)
        mean = latent @ self.A.T + action @ self.B.T
        following = mean + self.noise * torch.randn(n, 2)
        return _transitions(latent, action, following, torch.rand(n, 1) < self.hazard(latent))


class Branching:
    """Transitions to one of several outcomes by chance: ``s' = s + outcome_k + noise``.

    Args:
        outcomes (Tensor): ``[K, D]``.
        probs (Tensor): of the outcomes, ``[K]``; even by default.
        noise (float): standard deviation, small against the distance of the outcomes.
    """

    def __init__(self, outcomes: Tensor, probs: Tensor | None = None, noise: float = 0.1) -> None:
        self.outcomes, self.noise = outcomes, noise
        self.probs = torch.full((len(outcomes),), 1 / len(outcomes)) if probs is None else probs

    @property
    def negative_log_likelihood(self) -> float:
        """The expected one of the true density, in nats: of the outcome, then of the noise."""
        of_noise = 0.5 * math.log(2 * math.pi * math.e * self.noise**2)
        of_outcome = -(self.probs * self.probs.log()).sum().item()
        return of_outcome + self.outcomes.shape[-1] * of_noise

    def transitions(self, n: int) -> TensorDict:
        """Draw ``n``, with the entries that a dynamics model learns from."""
        latent, action = torch.randn(n, self.outcomes.shape[-1]), torch.randn(n, 1)
        moved = latent + self.outcomes[torch.multinomial(self.probs, n, replacement=True)]
        following = moved + self.noise * torch.randn_like(latent)
        return _transitions(latent, action, following, torch.zeros(n, 1).bool())


FOUR_WAYS = {
    "cross": Branching(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])),
    "corners": Branching(torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])),
    "lopsided": Branching(torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0], [0.0, -1.0]])),
    "line": Branching(torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])),
    "uneven": Branching(
        torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]),
        torch.tensor([0.7, 0.1, 0.1, 0.1]),
    ),
}
"""Systems whose every step has one of four outcomes, at least six standard deviations apart."""


def _transitions(latent: Tensor, action: Tensor, following: Tensor, end: Tensor) -> TensorDict:
    entries = {"latent": latent, "context": torch.zeros(len(latent), 0), "action": action}
    return TensorDict(
        {**entries, "next": {"latent": following, "terminated": end}}, batch_size=[len(latent)]
    )
