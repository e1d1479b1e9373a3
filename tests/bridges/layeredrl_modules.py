"""What predictors of LayeredRL compute, written anew: an oracle for ``from_layeredrl``.

After its commit 248fb87. Names and shapes of parameters are LayeredRL's; each function is the
plainest one that gives its numbers. Nothing here learns.
"""

from __future__ import annotations

import math

import torch
from scipy.stats import special_ortho_group
from torch import nn

EPS = 1e-5


def fixed(x):
    """A tensor that LayeredRL keeps as a parameter without gradient."""
    return nn.Parameter(x, requires_grad=False)


class Perceptron(nn.Module):
    """Hidden layers ``net`` and a last one, ``final_layer``."""

    def __init__(self, n_in, n_out, hidden, activation=nn.ReLU):
        super().__init__()
        sizes = [n_in, *hidden]
        layers = []
        for k in range(len(hidden)):
            layers += [nn.Linear(sizes[k], sizes[k + 1]), activation()]
        self.net = nn.Sequential(*layers)
        self.final_layer = nn.Linear(hidden[-1], n_out)

    def run(self, *inputs):
        return self.final_layer(self.net(torch.cat(inputs, -1)))


class ScalarNet(Perceptron):
    """``RewardNet``, and with ``reads_action=False`` ``ValueNet``."""

    def __init__(self, n_in, hidden, activation=nn.ReLU, reads_action=True):
        super().__init__(n_in, 1, hidden, activation)
        self.reads_action = reads_action

    def forward(self, state, context, action):
        inputs = (state, context, action) if self.reads_action else (state, context)
        return self.run(*inputs)[..., 0]


class RunningNorm(nn.Module):
    """``RunningBatchNorm`` in evaluation mode."""

    def __init__(self, n, track_mean=True):
        super().__init__()
        self.mean = fixed(torch.randn(n) if track_mean else torch.zeros(n))
        self.var = fixed(torch.rand(n) * 4 + 0.01)
        self.register_buffer("_initialized", torch.tensor(1, dtype=torch.uint8))
        self.register_buffer("_counter", torch.tensor(77))

    def std(self):
        return (self.var + EPS).sqrt()


class DynamicsNet(Perceptron):
    """``ProbFCDynamics``: one member, in units of the targets."""

    def __init__(
        self, D, C, A, M, hidden, activation, ignore_context=True, discrete=False, input_norm=False
    ):
        super().__init__(
            D + (0 if ignore_context else C) + A, 2 * M * D + M + 1, hidden, activation
        )
        self.D, self.A, self.M = D, A, M
        self.ignore_context, self.discrete = ignore_context, discrete
        self.input_bn = nn.BatchNorm1d(D) if input_norm else None
        if input_norm:
            nn.init.normal_(self.input_bn.weight)
            nn.init.normal_(self.input_bn.bias)
            self.input_bn.running_mean.normal_()
            self.input_bn.running_var.uniform_(0.1, 3)

    def forward(self, state, context, action):
        if self.input_bn is not None:
            state = self.input_bn(state)
        if self.discrete:
            action = nn.functional.one_hot(action.squeeze(-1), self.A).float()
        out = self.run(*((state, action) if self.ignore_context else (state, context, action)))
        n = self.M * self.D
        mean = out[..., :n].reshape(*out.shape[:-1], self.M, self.D)
        std = out[..., n : 2 * n].clamp(-10, 10).exp().reshape(mean.shape)
        weights = out[..., 2 * n : -1].softmax(-1)
        return mean, std, weights, out[..., -1].clamp(min=-20).sigmoid()


class RandomMap(nn.Module):
    """``RandomDynamics``."""

    def __init__(self, D, A):
        super().__init__()
        matrix = special_ortho_group.rvs(D) if D > 1 else [[1.0]]
        self.A = fixed(torch.as_tensor(matrix, dtype=torch.float32)[:, :A])
        self.transform = fixed(torch.eye(D))


class Ensemble(nn.Module):
    """``ProbabilisticEnsemble``, with or without what is left of a symmetry-breaking start."""

    def __init__(self, D, C, A, E, M, hidden, activation, normalize, delta, start, **options):
        super().__init__()
        self.register_buffer("n_total_env_steps", torch.tensor(5000))
        self.register_buffer("_learn_counter", torch.tensor(12))
        nets = [DynamicsNet(D, C, A, M, hidden, activation, **options) for _ in range(E)]
        self.nets = nn.ModuleList(nets)
        if start:
            self.random_dynamics = RandomMap(D, A)
        self.output_bn = RunningNorm(D, track_mean=False) if normalize else None
        self.delta = delta

    def members(self, state, context, action):
        scale = 1.0 if self.output_bn is None else self.output_bn.std()
        for net in self.nets:
            mean, std, weights, term_prob = net(state, context, action)
            yield mean * scale, std * scale, weights, term_prob

    def predict(self, state, context, action):
        mean, std, weights, term_prob = (
            torch.stack(x, 1) for x in zip(*self.members(state, context, action), strict=True)
        )
        if self.delta:
            mean = mean + state[:, None, None]
        return mean, weights, std, term_prob.mean(1)

    def log_prob(self, state, context, action, next_state, std, matrix):
        change = (next_state - state if self.delta else next_state) @ matrix
        densities = []
        for mean, _, weights, _ in self.members(state, context, action):
            z = (change[:, None] - mean @ matrix) / std
            log_density = (-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
            densities.append((weights.log() + log_density).logsumexp(-1))
        return torch.stack(densities).logsumexp(0) - math.log(len(densities))


class Product(nn.Module):
    """``nn.Linear`` without bias; that one warns of 0 outputs."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / n_in**0.5)

    def forward(self, x):
        return x @ self.weight.T


class LinearMaps(nn.Module):
    """``EncoderNet``."""

    def __init__(self, n_obs, D, C, standardize):
        super().__init__()
        self.input_bn = RunningNorm(n_obs) if standardize else None
        self.state_net, self.context_net = Product(n_obs, D), Product(n_obs, C)
        self.mask = fixed(torch.arange(n_obs) % 2 == 0)

    def forward(self, obs):
        if self.input_bn is not None:
            obs = (obs - self.input_bn.mean) / self.input_bn.std()
        return self.state_net(self.mask * obs), self.context_net(~self.mask * obs)


class Select(nn.Module):
    """``FixedEncoderNet``, which has no parameters, and with all dims ``IdentityEncoder``."""

    def __init__(self, latent_dims, context_dims):
        super().__init__()
        self.latent_dims, self.context_dims = latent_dims, context_dims

    def forward(self, obs):
        return obs[..., self.latent_dims], obs[..., self.context_dims]


class Whitener(nn.Module):
    """``Standardizer``: half the sum of the upper triangle and its transpose."""

    def __init__(self, D):
        super().__init__()
        self.mat = nn.Parameter(torch.eye(D) + 0.3 * torch.randn(D, D))

    def matrix(self):
        return 0.5 * (self.mat.triu() + self.mat.triu().T)


class LayeredRLPredictor(nn.Module):
    """``RewardPredictor`` of LayeredRL."""

    def __init__(
        self,
        encoder,
        D,
        C,
        A,
        *,
        n_models=2,
        n_modes=3,
        hidden=(7, 5),
        activation=nn.ReLU,
        normalize=True,
        delta=True,
        start=False,
        value="state",
        reward=True,
        whitener=True,
        **options,
    ):
        super().__init__()
        sizes = (D, C, A, n_models, n_modes, hidden, activation)
        self.model = Ensemble(*sizes, normalize, delta, start, **options)
        heads = {"hidden": hidden, "activation": activation}
        is_q = value == "q"
        n_value = D + C + (A if is_q else 0)
        self.val_func = ScalarNet(n_value, **heads, reads_action=is_q) if value else None
        self.rew_func = ScalarNet(D + C + A, **heads) if reward else None
        self.encoder = encoder
        self.register_buffer("_learn_counter", torch.tensor(9))
        self.target_val_func = ScalarNet(n_value, **heads, reads_action=is_q) if value else None
        if whitener:
            self.delta_standardizer = Whitener(D)
            self.delta_stand_inverse = fixed(torch.eye(D))
        self.eval()

    @torch.no_grad()
    def predict(self, obs, act):
        state, context = self.encoder(obs)
        mean, weights, std, term_prob = self.model.predict(state, context, act)
        reward = torch.zeros(len(obs))
        if self.rew_func is not None:
            reward = self.rew_func(state, context, act)
        return mean, weights, std, reward, term_prob

    @torch.no_grad()
    def value(self, obs, act, target=False):
        value = self.target_val_func if target else self.val_func
        assert value is not None
        return value(*self.encoder(obs), act)
