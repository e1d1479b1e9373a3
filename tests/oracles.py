"""Slow, obvious references: Python loops, torch.distributions, closed forms, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from layeredrl_trl.modules import ProbabilisticEnsemble, RewardNet


def n_step_target(
    rewards: list[float],
    terminated: bool,
    j: int,
    n: int,
    gamma: float,
    *,
    state_values: list[float] | None = None,
    action_values: list[float] | None = None,
    planned: list[bool] | None = None,
    reached: list[bool] | None = None,
) -> float | None:
    """The n-step target of step j of an episode, from the list of all its rewards.

    Args:
        rewards: of the episode.
        terminated: whether its last step terminates; else it is truncated or unfinished.
        j: step of the episode.
        n: most rewards to sum.
        gamma: discount.
        state_values: value of the state *after* each step.
        action_values: value of each step's own (state, action).
        planned: of each step, whether its action was planned; None: all were.
        reached: of each step, whether it terminates for a goal that was put in afterwards.

    Returns:
        None where the step has no target.
    """
    length = len(rewards)
    last_summed = length - 1
    if action_values is not None and not terminated:
        last_summed = length - 2  # nothing to bootstrap with behind the last step
    target, discount, i = 0.0, 1.0, j
    while i <= last_summed and i < j + n:
        if planned is not None and i > j and not planned[i]:
            break
        target += discount * rewards[i]
        discount *= gamma
        i += 1
        if reached is not None and reached[i - 1]:
            return target
    if i == j:
        return None
    if terminated and i == length:
        return target
    bootstrap = state_values[i - 1] if action_values is None else action_values[i]
    return target + discount * bootstrap


def mixture(mean: Tensor, std: Tensor, weights: Tensor) -> MixtureSameFamily:
    """A mixture of diagonal Gaussians ``[..., K, D]`` in torch.distributions, in float64."""
    mean, std, weights = mean.double(), std.double(), weights.double()
    return MixtureSameFamily(
        Categorical(probs=weights), Independent(Normal(mean, std), 1), validate_args=False
    )


def even_mixture(mean: Tensor, std: Tensor, weights: Tensor) -> MixtureSameFamily:
    """The even mixture of members: ``mean`` and ``std [..., E, M, D]``, ``weights [..., E, M]``."""
    n_models = mean.shape[-3]
    return mixture(mean.flatten(-3, -2), std.flatten(-3, -2), weights.flatten(-2) / n_models)


def moments_of(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by N) of ``[N, D]``, one number after the other."""
    rows = samples.double().tolist()
    n, dims = len(rows), range(len(rows[0]))
    mean = [math.fsum(row[d] for row in rows) / n for d in dims]
    var = [math.fsum((row[d] - mean[d]) ** 2 for row in rows) / n for d in dims]
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(var, dtype=torch.float64)


def power_law_noise(beta: float, coefficients: list[float]) -> Tensor:
    """A sum of waves of power ``1 / f^beta`` (Timmer and König 1995), one step after the other.

    Args:
        beta: exponent.
        coefficients: standard normal, as many as steps: of the constant, of the cosines from the
            lowest frequency on, of the sines, and (even number of steps) of the highest frequency.

    Returns:
        Divided by its exact standard deviation, ``[steps]``.
    """
    steps = len(coefficients)
    pairs = (steps - 1) // 2
    constant, cosines = coefficients[0], coefficients[1 : 1 + pairs]
    sines = coefficients[1 + pairs : 1 + 2 * pairs]
    amplitude = [math.sqrt(2) * (k / steps) ** (-beta / 2) for k in range(1, pairs + 1)]
    lowest, highest = (1 / steps) ** (-beta / 2), 0.5 ** (-beta / 2)
    variance = lowest**2 + sum(a**2 for a in amplitude)
    if steps % 2 == 0:
        variance += highest**2
    values = []
    for t in range(steps):
        value = lowest * constant
        for k in range(1, pairs + 1):
            angle = 2 * math.pi * k * t / steps
            wave = cosines[k - 1] * math.cos(angle) - sines[k - 1] * math.sin(angle)
            value += amplitude[k - 1] * wave
        if steps % 2 == 0:
            value += (-1) ** t * highest * coefficients[-1]
        values.append(value / math.sqrt(variance))
    return torch.tensor(values, dtype=torch.float64)


def random_ensemble(
    latent_dim: int = 3, context_dim: int = 0, action: object = 2, **options: object
) -> ProbabilisticEnsemble:
    """An ensemble with spread-out outputs and running moments of their own in every dim."""
    options = {"n_models": 3, "hidden_sizes": (8,), **options}
    model = ProbabilisticEnsemble(latent_dim, context_dim, action, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
        for moments in (model.input_moments, model.target_moments):
            moments.mean.normal_()
            moments.var.uniform_(0.5, 2.0)
        if model.n_modes > 1:
            model.mode_start.normal_()
    return model


def random_reward(model: ProbabilisticEnsemble) -> RewardNet:
    dims = model.latent_state_dim, model.context_dim, model.action_dim
    return RewardNet(*dims, hidden_sizes=(8,), in_keys=model.in_keys)


def member_alone(model: ProbabilisticEnsemble, member: int, **options: object):
    """An ensemble of one that is a member of another."""
    alone = ProbabilisticEnsemble(
        model.latent_state_dim,
        model.context_dim,
        model.action_dim,
        1,
        model.n_modes,
        hidden_sizes=[w.shape[-1] for w in model.net.weights][:-1],
        predict_delta=model.predict_delta,
        condition_on_context=model.condition_on_context,
        learn_std_bounds=model.learn_std_bounds,
        **options,
    )
    state = {
        key: x[member : member + 1] if key.startswith(("net.", "termination_net.")) else x
        for key, x in model.state_dict().items()
    }
    alone.load_state_dict(state)
    return alone


def _perceptron(net, member: int, x: Tensor) -> Tensor:
    for i, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        x = x @ weight[member].double() + bias[member, 0].double()
        if i < len(net.weights) - 1:
            x = x / (1 + torch.exp(-x))
    return x


@torch.no_grad()
def member_prediction(
    model: ProbabilisticEnsemble, member: int, latent: Tensor, context: Tensor, action: Tensor
) -> tuple[Tensor, Tensor, Tensor, float]:
    """What one member says of one transition, by its own weights, in float64.

    Args:
        model: the ensemble, with SiLU nets.
        member: which one.
        latent: ``[D]``.
        context: ``[C]``.
        action: ``[A]``, or an index ``[]``.

    Returns:
        ``mean [M, D]``, ``std [M, D]``, ``weights [M]``, and the termination probability.
    """
    if action.ndim == 0:
        action = torch.eye(model.action_dim)[action.long()]
    seen = [latent, context, action] if model.condition_on_context else [latent, action]
    x = torch.cat([part.double() for part in seen])
    x = (x - model.input_moments.mean.double()) / model.input_moments.var.double().sqrt()
    x = torch.cat([_perceptron(net, member, x) for net in (model.net, model.termination_net)])
    n_modes, dim = model.n_modes, model.latent_state_dim
    bounds = model.log_std_bounds.double().exp().reshape(2, -1).expand(2, dim)
    scale = model.target_moments.var.double().sqrt()
    mean, std = torch.zeros(n_modes, dim).double(), torch.zeros(n_modes, dim).double()
    for m in range(n_modes):
        for d in range(dim):
            start, log_std_start = model.mode_start[:, m, d].double()
            change = (start + x[m * dim + d]) * scale[d] + model.target_moments.mean[d].double()
            mean[m, d] = change + latent[d].double() if model.predict_delta else change
            raw = math.exp(log_std_start + x[n_modes * dim + m * dim + d])
            # both soft bounds without logarithms: 1/(1/raw + 1/high), then + low
            low, high = bounds[:, d]
            std[m, d] = scale[d] * (low + 1 / (1 / raw + 1 / high))
    logits = x[2 * n_modes * dim : 2 * n_modes * dim + n_modes]
    weights = logits.exp() / logits.exp().sum()
    return mean, std, weights, 1 / (1 + math.exp(-x[-1]))


@torch.no_grad()
def imagine_one(
    model: ProbabilisticEnsemble,
    reward: torch.nn.Module | None,
    latent: Tensor,
    context: Tensor,
    actions: Tensor,
    members: list[int],
    propagation: str = "fixed_model",
) -> list[dict[str, Tensor]]:
    """Imagine one env deterministically with soft termination, particle by particle.

    Args:
        model: the ensemble.
        reward: ``f(latent, context, action)``, or None.
        latent: where every particle starts, ``[D]``.
        context: ``[C]``.
        actions: ``[H, A]`` or indices ``[H]``.
        members: the member of each particle.
        propagation: ``"fixed_model"`` or ``"expectation"``.

    Returns:
        For each step the entries under ``"next"``, each ``[particles, ...]``.
    """
    particles = [latent.double()] * len(members)
    alive = [1.0] * len(members)
    steps = []
    for action in actions:
        rewards, probs, following = [], [], []
        for particle, own in zip(particles, members, strict=True):
            r = 0.0 if reward is None else reward(particle.float(), context, action).item()
            rewards.append(r)
            asked = range(model.n_models) if propagation == "expectation" else [own]
            means, terms = [], []
            for e in asked:
                mean, _, weights, term = member_prediction(model, e, particle, context, action)
                means.append(sum(w * m for w, m in zip(weights, mean, strict=True)))
                terms.append(term)
            following.append(sum(means) / len(means))
            probs.append(sum(terms) / len(terms))
        total = sum(a * r for a, r in zip(alive, rewards, strict=True)) / len(members)
        alive = [a * (1 - p) for a, p in zip(alive, probs, strict=True)]
        particles = following
        steps.append(
            {
                "latent": torch.stack(particles),
                "alive": torch.tensor(alive),
                "particle_reward": torch.tensor(rewards),
                "term_prob": torch.tensor(probs),
                "reward": torch.tensor(total),
            }
        )
    return steps


def gaussian_mixture_cdf(mean: Tensor, std: Tensor, weights: Tensor, value: Tensor) -> float:
    """The distribution function of a mixture of ``[K]`` Gaussians of one dim, at a number."""
    parts = zip(weights.tolist(), mean.tolist(), std.tolist(), strict=True)
    return sum(w * 0.5 * math.erfc((m - value.item()) / s / math.sqrt(2)) for w, m, s in parts)


def area_under_roc(prob: list[float], happened: list[bool]) -> float:
    """Of all pairs of an event and a non-event, how many are in order; ties count half."""
    events = [p for p, y in zip(prob, happened, strict=True) if y]
    others = [p for p, y in zip(prob, happened, strict=True) if not y]
    if not events or not others:
        return math.nan
    in_order = sum(1.0 if e > o else 0.5 if e == o else 0.0 for e in events for o in others)
    return in_order / len(events) / len(others)


def open_loop_errors(
    episodes: list[tuple[Tensor, Tensor]], step, horizon: int
) -> tuple[list[float], list[float]]:
    """Errors per step of a deterministic model and of the guess that nothing changes.

    From every stored step the model goes on with the stored actions to the end of the episode.

    Args:
        episodes: observations ``[T + 1, D]`` and actions ``[T, A]`` of each.
        step: next state from a state ``[D]`` and an action ``[A]``.
        horizon: most steps.
    """
    data = torch.cat([obs[:-1] for obs, _ in episodes]).double()
    scale = data.std(0, correction=0)
    squares = [([], []) for _ in range(horizon)]
    for obs, act in episodes:
        for start in range(len(act)):
            state = obs[start]
            for h in range(min(horizon, len(act) - start)):
                state = step(state, act[start + h])
                real = obs[start + h + 1]
                for guess, found in zip((state, obs[start]), squares[h], strict=True):
                    found.append((((guess - real) / scale) ** 2).mean().item())
    return tuple(
        [math.sqrt(sum(found[which]) / len(found[which])) if found[which] else math.nan
         for found in squares]
        for which in (0, 1)
    )  # fmt: skip


# --- rollouts


def roll_out(model, latent, context, actions, member=None, *, deterministic=False):
    """Move particles ``[N, E, P, D]`` by ``model`` under actions ``[N, H, ...]``, step by step.

    Returns:
        latent states after each step ``[N, H, E, P, D]`` and termination logits
        ``[N, H, E, P, 1]``.
    """
    latents, term_logits = [], []
    for action in actions.unbind(1):
        prediction = model.predict_particles(latent, context, action, member)
        latent = prediction.next_latent(deterministic)
        latents.append(latent)
        term_logits.append(prediction.term_logit)
    return torch.stack(latents, 1), torch.stack(term_logits, 1)


def variances_at(model, particles, context, action):
    """Epistemic and aleatoric variance ``[D]`` over members, a mean over particles ``[K, D]``.

    Every member is asked for every particle.
    """
    epistemic, aleatoric = [], []
    for particle in particles:
        each = []
        for e in range(model.n_models):
            mean, std, weights, _ = member_prediction(model, e, particle, context, action)
            each.append(mixture(mean, std, weights))
        centre = sum(m.mean for m in each) / len(each)
        epistemic.append(sum((m.mean - centre) ** 2 for m in each) / len(each))
        aleatoric.append(sum(m.variance for m in each) / len(each))
    return sum(epistemic) / len(epistemic), sum(aleatoric) / len(aleatoric)
