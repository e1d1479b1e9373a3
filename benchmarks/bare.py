"""The same work in bare PyTorch: no TensorDict, no buffer class, no module, no checks.

What the library is measured against. Each piece is the fastest plain code that we could write: flat
columns and hand-made index arithmetic, fused Adam, `foreach` clipping and targets, products
batched over members or one by one, whichever is faster. `tests/benchmarks/test_bare.py` holds it to
the numbers of the library, so that the same work is compared.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear, silu

from benchmarks.workloads import (
    ACTION_DIM,
    BATCH_SIZE,
    GAMMA,
    N_STEPS,
    OBSERVATION_DIM,
    Workload,
    make_predictor,
)

D = OBSERVATION_DIM
STD_LOW, STD_HIGH = math.exp(-5.0), 2.0
SUM_UNIT = (1 - GAMMA**2) ** -0.5
"""Size of a discounted sum of independent rewards of size 1."""


class BareModel:
    """Weights as lists of tensors; the state is that of ``make_predictor`` before any step."""

    def __init__(self, workload: Workload) -> None:
        predictor = make_predictor(workload)
        self.workload = workload
        model = predictor.model

        def layers(net):
            return [
                (w.detach().clone().requires_grad_(), b.detach().clone().requires_grad_())
                for w, b in zip(net.weights, net.biases, strict=True)
            ]

        def linears(head):
            return [
                (
                    m.weight.detach().clone().requires_grad_(),
                    m.bias.detach().clone().requires_grad_(),
                )
                for m in head.module.layers
                if hasattr(m, "weight")
            ]

        self.dynamics = layers(model.net)
        self.termination = layers(model.termination_net)
        self.reward = linears(predictor.rew_func)
        self.value = linears(predictor.val_func)
        self.target = [(w.detach().clone(), b.detach().clone()) for w, b in self.value]
        self.raw = torch.eye(D, requires_grad=True)
        self.input_mean, self.input_var = torch.zeros(D + ACTION_DIM), torch.ones(D + ACTION_DIM)
        self.target_mean, self.target_var = torch.zeros(D), torch.ones(D)
        # of the inputs of reward and value, and last of the reward
        n = D + ACTION_DIM + 1
        self.reward_mean, self.reward_var = torch.zeros(n), torch.ones(n)
        self.value_mean, self.value_var = torch.zeros(D + 1), torch.ones(D + 1)
        self.seen = 0
        self.mode_start = torch.zeros(2, workload.n_modes, D)

    def mlp(self, layers: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
        for weight, bias in layers[:-1]:
            x = silu(linear(x, weight, bias))
        return linear(x, *layers[-1])

    def head_of_reward(self, x: Tensor) -> Tensor:
        """Evaluate the reward: inputs standardised, output in its own unit."""
        mean, std = self.reward_mean, self.reward_var.sqrt()
        return mean[-1:] + std[-1:] * self.mlp(self.reward, (x - mean[:-1]) / std[:-1])

    def head_of_value(self, layers: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
        """Evaluate the value or its target: inputs standardised, in the unit of the reward."""
        mean, std = self.value_mean[:-1], self.value_var[:-1].sqrt()
        return self.value_unit() * self.mlp(layers, (x - mean) / std)

    def value_unit(self) -> Tensor:
        """That of a discounted sum of independent rewards, 1 before any was seen."""
        return (self.value_var[-1] + self.value_mean[-1].square()).sqrt()

    def ensemble(self, layers: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
        """Map ``[E, N, in]`` to ``[E, N, out]``."""
        for weight, bias in layers[:-1]:
            x = silu(torch.baddbmm(bias, x, weight))
        return torch.baddbmm(layers[-1][1], x, layers[-1][0])

    def gaussians(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Means, standard deviations ``[E, N, M, D]``, log weights; in units of the target."""
        modes = self.workload.n_modes
        both = raw[..., : 2 * modes * D].unflatten(-1, (2, modes, D))
        if modes > 1:
            both = both + self.mode_start
        mean, log_std = both.unbind(-3)
        std = STD_LOW + STD_HIGH * torch.sigmoid(log_std - math.log(STD_HIGH))
        return mean, std, torch.log_softmax(raw[..., 2 * modes * D :], -1) if modes > 1 else None


class BareLearner(BareModel):
    """``RewardPredictor.learn`` by hand."""

    def __init__(self, workload: Workload, columns: dict[str, Tensor]) -> None:
        super().__init__(workload)
        self.columns = columns
        done = columns["done"][:, 0]
        n = len(done)
        ends = done.nonzero()[:, 0]
        self.last = ends[torch.searchsorted(ends, torch.arange(n))]
        self.flat_reward = columns["reward"][:, 0]
        self.flat_terminated = columns["terminated"][:, 0]
        nets = (self.dynamics + self.termination, self.value, self.reward)
        self.parts = [[p for layer in net for p in layer] for net in nets] + [[self.raw]]
        self.value_params = [p for layer in self.value for p in layer]
        self.target_params = [p for layer in self.target for p in layer]
        groups = [
            {"params": [p for part in self.parts[:-1] for p in part], "lr": 3e-4},
            {"params": [self.raw], "lr": 1e-3},
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self.offset = torch.arange(workload.k_steps + N_STEPS - 1)

    def draw(self) -> tuple[Tensor, Tensor]:
        n = len(self.last)
        return torch.randint(n, (BATCH_SIZE,)), torch.randint(n, (BATCH_SIZE,))

    def step(self) -> Tensor:
        loss = self.loss(*self.draw())
        self.optimizer.zero_grad()
        loss.backward()
        self.clip()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.target_params, self.value_params, 0.005)
        return loss.detach()

    def clip(self) -> None:
        for part in self.parts:
            torch.nn.utils.clip_grad_norm_(part, 20.0, foreach=True)

    def loss(self, start: Tensor, single: Tensor) -> Tensor:
        return self.head_loss(start) + self.dynamics_loss(single)

    def head_loss(self, start: Tensor) -> Tensor:
        k, columns = self.workload.k_steps, self.columns
        last = self.last.index_select(0, start)[:, None]
        index = start[:, None] + self.offset
        mask = index <= last
        index = index.minimum(last)
        reward = self.flat_reward.index_select(0, index.flatten()).view(index.shape)
        steps = (last - start[:, None] + 1 - self.offset[:k]).clamp(0, N_STEPS)
        total = torch.where(mask, reward, 0.0)
        window = total[:, :k]
        for i in range(1, N_STEPS):
            window = window + GAMMA**i * total[:, i : i + k]
        behind = (index[:, :k] + steps - 1).minimum(last)
        terminated = self.flat_terminated.index_select(0, behind.flatten()).view(behind.shape)
        first = index[:, :k].flatten()
        observation = columns["observation"].index_select(0, first)
        action = columns["action"].index_select(0, first)
        counts, inputs = mask[:, :k], torch.cat([observation, action], -1)
        value_moments = self.value_mean, self.value_var
        rate, value_rate = max(1 / (self.seen + 1), 1e-3), max(1 / (self.seen + 2), 1e-3)
        with torch.no_grad():
            seen = self.counted(counts, observation, SUM_UNIT * reward[:, :k])
            if self.seen == 0:  # before the first targets
                self.move(*value_moments, seen, 1.0)
            after = columns["next_observation"].index_select(0, behind.flatten())
            value = self.head_of_value(self.target, after).view(behind.shape)
            target = window + torch.where(terminated, 0.0, GAMMA**steps * value)
            self.move(*value_moments, seen, value_rate)
            rows = self.counted(counts, inputs, reward[:, :k])
            self.move(self.reward_mean, self.reward_var, rows, rate)
            value_unit, unit = self.value_unit(), self.reward_var[-1].sqrt()
        error = self.head_of_reward(inputs).view(-1, k) - reward[:, :k]
        value_error = self.head_of_value(self.value, observation).view(-1, k) - target
        error, value_error = (error / unit).square(), (value_error / value_unit).square()
        return torch.where(counts, error + value_error, 0.0).sum() / counts.sum()

    def dynamics_loss(self, index: Tensor) -> Tensor:
        columns, n_models = self.columns, self.workload.n_models
        observation, action, after = (
            columns[name].index_select(0, index)
            for name in ("observation", "action", "next_observation")
        )
        terminated = self.flat_terminated.index_select(0, index).to(torch.float32)
        inputs = torch.cat([observation, action], -1)
        delta = after - observation
        with torch.no_grad():
            rate = max(1 / (self.seen + 1), 1e-3)
            self.seen += 1
            self.move(self.input_mean, self.input_var, inputs, rate)
            self.move(self.target_mean, self.target_var, delta, rate)
            width, scale = self.input_var.sqrt(), self.target_var.sqrt()
            inputs = (inputs - self.input_mean) / width
            wanted = (delta - self.target_mean) / scale
        inputs = inputs.expand(n_models, -1, -1)
        mean, std, log_weights = self.gaussians(self.ensemble(self.dynamics, inputs))
        scaled = (wanted.unsqueeze(-2) - mean) / std
        if log_weights is None:
            nll = (0.5 * scaled.square() + std.log()).sum((-1, -2)).mean()
        else:
            log_prob = (-0.5 * scaled.square() - std.log()).sum(-1) + log_weights
            nll = -torch.logsumexp(log_prob, -1).mean()
        nll = nll + scale.log().sum() + 0.5 * D * math.log(2 * math.pi)
        logit = self.ensemble(self.termination, inputs).squeeze(-1)
        bce = binary_cross_entropy_with_logits(logit, terminated.expand_as(logit))
        matrix = 0.5 * (self.raw + self.raw.mT) / torch.maximum(scale[:, None], scale)
        white = delta @ matrix.mT
        white = white - white.mean(0)
        residual = torch.linalg.matrix_norm(white.mT @ white / len(white) - torch.eye(D))
        return nll + bce + residual

    @staticmethod
    def counted(counts: Tensor, inputs: Tensor, target: Tensor) -> Tensor:
        """Inputs and rewards ``[N, in + 1]`` of the steps that count ``[B, k]``."""
        rows = torch.cat([inputs, target.reshape(-1, 1)], -1)
        return rows if counts.shape[1] == 1 else rows[counts.flatten()]

    @staticmethod
    def move(mean: Tensor, var: Tensor, samples: Tensor, rate: float) -> None:
        batch_var, batch_mean = torch.var_mean(samples, 0, correction=0)
        shift = batch_mean - mean
        var.lerp_(batch_var, rate).add_(shift.square(), alpha=rate * (1 - rate))
        mean.add_(shift, alpha=rate)


class BareImagination(BareModel):
    """``Predictor.rollout`` by hand: particles sorted by member, rewards at the end."""

    def __init__(self, workload: Workload, *, n_particles: int | None = None) -> None:
        super().__init__(workload)
        # particles of an env; fewer than members: envs are dealt out to the members
        self.n_particles = n_particles or workload.n_models * workload.n_particles
        width = self.input_var.sqrt()
        self.latent_width, self.action_width = width[:D], width[D:]
        self.scale = self.target_var.sqrt()

    @torch.no_grad()
    def rollout(
        self, latent: Tensor, actions: Tensor, *, deterministic: bool = False, common: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Imagine ``H`` steps from ``latent`` ``[B, D]`` under ``actions`` ``[B, H, A]``.

        With a single particle of each, ``common`` consecutive envs share their noise.

        Returns:
            latent states before each step ``[H, E, N, D]``, whether they live ``[H, E, N]``,
            rewards ``[B, H]``. Envs stay in order if ``E`` divides the particles of each, else
            the number of envs is a multiple of ``E``.
        """
        n_envs, horizon, n_models = *actions.shape[:2], self.workload.n_models
        n_rows = n_envs * self.n_particles // n_models
        if self.n_particles >= n_models:
            copies = self.n_particles // n_models
            latent = latent.repeat_interleave(copies, 0).expand(n_models, -1, -1)
            rows = actions.repeat_interleave(copies, 0).expand(n_models, -1, -1, -1)
        else:
            latent = latent.view(n_rows, n_models, -1).transpose(0, 1)
            rows = actions.view(n_rows, n_models, horizon, -1).transpose(0, 1)
        group = None
        if common > 1:
            group = (torch.arange(n_envs) // common).view(n_rows, n_models).t()
        acts = ((rows - self.input_mean[D:]) / self.action_width).unbind(2)
        latents, inputs = [], []
        for act in acts:
            latents.append(latent)
            x = torch.cat([(latent - self.input_mean[:D]) / self.latent_width, act], -1)
            inputs.append(x)
            latent = latent + self.target_mean + self.scale * self.change(x, deterministic, group)
        latents, inputs = torch.stack(latents), torch.cat(inputs, 1)
        survives = 1 - torch.sigmoid(self.ensemble(self.termination, inputs))
        alive = survives.view(n_models, horizon, n_rows).transpose(0, 1).cumprod(0)
        alive = torch.cat([torch.ones_like(alive[:1]), alive[:-1]])
        seen = torch.cat([latents, rows.permute(2, 0, 1, 3)], -1)
        reward = self.head_of_reward(seen)
        reward = alive * reward.squeeze(-1)
        if self.n_particles >= n_models:
            reward = reward.view(horizon, n_models, n_envs, -1).mean((1, 3))
        else:
            reward = reward.transpose(1, 2).reshape(horizon, n_envs)
        return latents, alive, reward.t()

    def change(self, x: Tensor, deterministic: bool, group: Tensor | None = None) -> Tensor:
        """Draw the change of the latent ``[E, N, D]``, in units of the target scale.

        Rows of one ``group`` ``[E, N]`` share their noise.
        """
        mean, std, log_weights = self.gaussians(self.ensemble(self.dynamics, x))
        if log_weights is None:
            mean, std = mean.squeeze(-2), std.squeeze(-2)
        elif deterministic:
            return (log_weights.exp().unsqueeze(-1) * mean).sum(-2)
        else:
            like = log_weights if group is None else log_weights[0, : int(group.max()) + 1]
            gumbel = -torch.empty_like(like).exponential_().log()
            gumbel = gumbel if group is None else gumbel[group]
            mode = (log_weights + gumbel).argmax(-1)[..., None, None].expand(*mean.shape[:2], 1, D)
            mean, std = mean.gather(-2, mode).squeeze(-2), std.gather(-2, mode).squeeze(-2)
        if deterministic:
            return mean
        if group is None:
            return torch.addcmul(mean, std, torch.randn_like(mean))
        return torch.addcmul(mean, std, torch.randn(int(group.max()) + 1, D)[group])


class BarePlanner:
    """``ICEMPlanner`` by hand, cold start, with one particle a candidate and no terminal value."""

    def __init__(
        self,
        imagination: BareImagination,
        *,
        planning_horizon: int,
        optim_steps: int,
        num_candidates: int,
        top_k: int,
        colouring: Tensor,
    ) -> None:
        self.imagination = imagination
        self.horizon, self.optim_steps = planning_horizon, optim_steps
        self.top_k, self.n_kept = top_k, math.ceil(0.3 * top_k)
        self.colouring = colouring.mT.contiguous()
        self.sizes = [
            min(num_candidates, max(int(num_candidates * 1.25**-i), 2 * top_k))
            for i in range(optim_steps)
        ]
        self.discount = GAMMA ** torch.arange(planning_horizon)

    @torch.no_grad()
    def plan(self, latent: Tensor) -> Tensor:
        """Return the first action ``[B, A]`` of the best plan found from ``latent`` ``[B, D]``."""
        n_envs = len(latent)
        mean = torch.zeros(n_envs, self.horizon, ACTION_DIM)
        std, best, kept = torch.ones_like(mean), mean, None
        best_return = torch.full((n_envs,), -torch.inf)
        envs = torch.arange(n_envs)
        n_models = self.imagination.workload.n_models
        for i, size in enumerate(self.sizes):
            noise = torch.randn(n_envs, size, ACTION_DIM, self.horizon) @ self.colouring
            samples = torch.addcmul(mean[:, None], std[:, None], noise.mT)
            if i == self.optim_steps - 1:
                samples[:, 0] = mean
            if kept is not None:
                samples[:, 1 : 1 + self.n_kept] = kept
            samples = samples.clamp_(-1.0, 1.0)
            starts = latent.repeat_interleave(size, 0)
            actions = samples.flatten(0, 1)
            padding = -len(actions) % n_models  # as many candidates for each member
            if padding:
                starts = torch.cat([starts, starts[:padding]])
                actions = torch.cat([actions, actions[:padding]])
            _, _, reward = self.imagination.rollout(starts, actions, common=size)
            returns = (reward[: n_envs * size] @ self.discount).view(n_envs, size)
            top, index = returns.topk(self.top_k)
            elites = samples[envs[:, None], index]
            better = top[:, 0] > best_return
            best = torch.where(better[:, None, None], elites[:, 0], best)
            best_return = top[:, 0].maximum(best_return)
            var, new = torch.var_mean(elites, 1, correction=0)
            mean, std = mean.lerp(new, 0.9), std.lerp(var.sqrt(), 0.9)
            kept = elites[:, : self.n_kept]
        return best[:, 0]
