# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A world model in ten minutes
#
# We learn a model of a real environment from random data and look at what it knows.
# You will learn
#
# 1. how to put a **predictor** together from its parts,
# 2. how **slices** leave a TorchRL replay buffer, and what their mask says,
# 3. how to **learn**, and how good one predicted step is on episodes never learned from,
# 4. how to **imagine**: the model is a TorchRL environment,
# 5. how an ensemble shows **what it does not know**.
#
# You need: TorchRL's words (`TensorDict`, collector, replay buffer). Run time: 1 to 2 minutes on
# two CPU cores, without a GPU.

# %%
import math
import os

import matplotlib.pyplot as plt
import torch
from tensordict import TensorDict
from torchrl import logger
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, StepCounter, TransformedEnv, check_env_specs

# %%
from layeredrl_trl import (
    IdentityEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    RewardPredictor,
    TransitionSliceSampler,
    ValueNet,
)

# %% [markdown]
# The tests run this tutorial in a smoke mode, with little data and few steps. Everything is seeded.
# The networks are small: a second thread would cost more than it brings.

# %%
SMOKE = os.environ.get("LAYEREDRL_TRL_SMOKE") == "1"
TRAIN_EPISODES, TEST_EPISODES = (6, 3) if SMOKE else (20, 10)
OPTIM_STEPS = 200 if SMOKE else 2000

logger.setLevel("WARNING")  # TorchRL tells of every storage it makes
torch.manual_seed(0)
torch.set_num_threads(1)

REAL, MODEL, GUESS = "#222222", "#2b6cb0", "#c05621"
style = {"figure.dpi": 110, "font.size": 9, "axes.titlesize": 10, "legend.frameon": False}
spines = {"axes.spines.top": False, "axes.spines.right": False}
plt.rcParams.update(style | spines | {"figure.constrained_layout.use": True})

# %% [markdown]
# ## Data: a random policy, one episode per batch
#
# Pendulum-v1 is a rod of 1 m that hangs from a motor too weak to lift it in one go. The observation
# is `(cos θ, sin θ, angular velocity)`: with θ = 0 upright, the first two are where the rod's tip
# is, in m. An episode is truncated after 200 steps of 0.05 s, so a batch of 200 frames is one
# episode. Whole episodes are held out: neighbouring steps are too much alike to test on.

# %%
env = TransformedEnv(GymEnv("Pendulum-v1"), StepCounter())
env.set_seed(0)
collector = Collector(
    env,
    None,  # no policy: random actions
    frames_per_batch=200,
    total_frames=200 * (TRAIN_EPISODES + TEST_EPISODES),
    auto_register_policy_transforms=False,  # given, since its default will change
)
episodes = torch.stack([batch.clone() for batch in collector])
train, test = episodes.split([TRAIN_EPISODES, TEST_EPISODES])
train.shape, test.shape

# %% [markdown]
# The training episodes go into a replay buffer, one step after the other. Its sampler is the one
# part that is not TorchRL's: `TransitionSliceSampler` draws slices of consecutive steps.

# %%
buffer = TensorDictReplayBuffer(
    storage=LazyTensorStorage(200 * TRAIN_EPISODES),
    sampler=TransitionSliceSampler(slice_len=4),
    batch_size=4 * 1000,
)
buffer.extend(train.reshape(-1))
slices = buffer.sample().reshape(1000, 4)  # flat, as TorchRL has it -> [B, T]
slices.shape, slices["observation"].shape, slices["collector", "mask"].shape

# %% [markdown]
# A slice may start at *any* stored step, the last of an episode included, so each step is learned
# from equally often. Where the episode ends before the slice does, the last real step repeats and
# the mask is False: every sample is rectangular, and no slice runs into the next episode.

# %%
length = slices["collector", "mask"].sum(1).squeeze(-1)
examples = {"whole": slices[length == 4][0], "padded": slices[(length > 1) & (length < 4)][0]}
for name, example in examples.items():
    print(name)
    for key in ("step_count", ("next", "reward"), ("next", "truncated"), ("collector", "mask")):
        print(f"    {key!s:24}", *(f"{x!s:>7.6}" for x in example[key].flatten().tolist()))

# %% [markdown]
# ## A predictor, put together
#
# Four parts. `B` is the batch, `E` the members of the ensemble, `M` the modes of a member's
# mixture; the observation has 3 dims, and so has the latent state.
#
# - **encoder**: `observation [B, 3]` → `latent [B, 3]`, `context [B, 0]`. Here the observation *is*
#   the latent state. The context is for what is constant in an episode, such as a goal: a pendulum
#   has none.
# - **model**: `latent`, `context`, `action [B, 1]` → next state, mean and std `[B, E, M, 3]`, and
#   the chance that the step terminates `[B]`. Five networks, each predicts a Gaussian (`M = 1`).
# - **reward**: `latent`, `context`, `action` → `[B, 1]`.
# - **value**: `latent`, `context` → `state_value [B, 1]`, the discounted reward still to come;
#   learned from `n_steps`-step returns and a target network.
#
# Each is a `TensorDictModule`, and any can be replaced by one of your own.


# %%
def make_predictor(val_func, **options):
    return RewardPredictor(
        model=ProbabilisticEnsemble(3, 0, 1, n_models=5, n_particles_per_model=20),
        val_func=val_func,
        rew_func=RewardNet(3, 0, 1),
        encoder=IdentityEncoder(3),
        latent_state_dim=3,
        context_dim=0,
        **options,
    )


rates = {"model_lr": 1e-3, "reward_lr": 1e-3, "value_lr": 1e-3}
rest = {"learn_encoder": False, "delta_standardizer": False}  # no encoder to learn, no skills
predictor = make_predictor(ValueNet(3, 0), gamma=0.9, tau=0.02, n_steps=3, **rates, **rest)

# %% [markdown]
# ## Learning
#
# `learn` takes optimisation steps on batches that it draws from the buffer: `batch_size` slices for
# reward and value, `model_batch_size` single transitions for the model. (It brings its own slices;
# from the buffer it needs only the data.) It returns the mean of every term of the loss;
# the model's, `loss_consistency`, is the likelihood of the next state plus that of termination.

# %%
history = []
for _ in range(OPTIM_STEPS // 40):
    loss, info = predictor.learn(
        buffer, n_steps=40, batch_size=256, model_batch_size=256, n_total_env_steps=len(buffer)
    )
    history.append(info)
{name: round(value, 4) for name, value in info.items() if not name.startswith("lr_")}

# %% [markdown]
# The curves should fall and level off. The model's term is a negative log-likelihood of a density,
# so it goes below zero as the predictions sharpen. Errors have units that do not depend on that of
# the reward: the variance of the reward (at 1 nothing of it is explained), for the value that of a
# discounted sum of such rewards, if they were independent. The value is last to fall: at first it
# learns from a target network that itself knows nothing yet.

# %%
terms = {
    "nll": ("Model: next state", "negative log-likelihood (nats)", "linear"),
    "loss_reward": ("Reward", "error² (share of variance)", "log"),
    "loss_value": ("Value", "error² (in units of a return)", "log"),
}
fig, axes = plt.subplots(1, 3, figsize=(9, 2.6), sharex=True)
optim_steps = 40 * torch.arange(1, len(history) + 1)
for ax, (name, (title, label, scale)) in zip(axes, terms.items(), strict=True):
    ax.plot(optim_steps, [info[name] for info in history], color=MODEL)
    ax.set(title=title, xlabel="optimisation steps", ylabel=label, yscale=scale)

# %% [markdown]
# ## One step ahead, on held-out episodes
#
# `predict` gives what every member expects: the mean of its next state, the weights of its modes
# (one here), its own standard deviation; and the reward. The prediction of the ensemble is the mean
# over members.

# %%
real = test.reshape(-1)
with torch.no_grad():
    mean, weights, std, reward, term_prob = predictor.predict(real["observation"], real["action"])
predicted = mean.mean((1, 2))
mean.shape, predicted.shape, reward.shape

# %% [markdown]
# Consecutive states are alike, so a small error alone says little. The yardstick is the
# **persistence guess**: nothing changes. Its error in the state is the size of the change itself.


# %%
def rms(error):
    return error.square().mean(0).sqrt()


now, following = real["observation"], real["next", "observation"]
rewards = test["next", "reward"]
model_rmse = [*rms(predicted - following), rms(reward - rewards.flatten())]
guess_rmse = [*rms(now - following), rms((rewards[:, 1:] - rewards[:, :-1]).flatten())]
names = ["cos θ", "sin θ", "angular velocity", "reward"]
units = ["m", "m", "rad/s", ""]
print(f"{'RMSE of one step':24}{'model':>10}{'persistence':>14}{'ratio':>8}")
for name, unit, ours, guess in zip(names, units, model_rmse, guess_rmse, strict=True):
    print(f"{name + f' ({unit})' * bool(unit):24}{ours:10.4f}{guess:14.4f}{ours / guess:8.3f}")

# %% [markdown]
# Every dot below is a held-out step: the change that happened against the one predicted. A perfect
# model puts all dots on the diagonal, the persistence guess on the horizontal line. Look for what
# is off the diagonal: in the velocity, steps that ran into its limit of 8 rad/s, as 1 in 100 do; in
# the reward, which is -θ² and smaller terms, the kink at -π² where the rod hangs straight down.

# %%
fig, axes = plt.subplots(1, 4, figsize=(11, 2.9))
pairs = [*zip((following - now).T, (predicted - now).T, strict=True), (rewards.flatten(), reward)]
for i, (ax, (x, y)) in enumerate(zip(axes, pairs, strict=True)):
    ends = [x.min(), x.max()]
    ax.plot(ends, ends, color=REAL, lw=0.8, zorder=0, label="perfect")
    if i < 3:
        ax.axhline(0, color=GUESS, lw=1, zorder=0, label="persistence")
    ax.scatter(x, y, s=3, color=MODEL, alpha=0.4, lw=0)
    what = f"change of {names[i]} ({units[i]})" if i < 3 else "reward"
    ax.set(xlabel=f"real {what}", ylabel="" if i else "predicted")
    ax.set_title(f"error {model_rmse[i] / guess_rmse[i]:.1%} of persistence")
_ = axes[0].legend(loc="upper left")

# %% [markdown]
# ## Imagining
#
# `rollout` imagines what given actions lead to. Each of the 5 members carries 20 **particles**,
# and each particle draws its next state from its member, so a rollout is a cloud of 100 futures.
# The layout is TorchRL's, batch `[B, H]`, with member and particle before the features.

# %%
horizon, starts = 60, torch.arange(3)
with torch.no_grad():
    imagined, context = predictor.rollout(
        test["observation"][starts, 0], test["action"][starts, :horizon]
    )
for key in ("action", "latent", ("next", "latent"), ("next", "reward"), ("next", "alive")):
    print(f"{key!s:22}{list(imagined[key].shape)}")

# %% [markdown]
# Three held-out episodes, 60 steps (3 s) from their start, open loop: the model sees the first
# observation and the actions, nothing else. The line is the mean of the cloud, the band holds 90%
# of it. The real path should stay in the band; and the band should widen with time, most where the
# pendulum passes the top slowly and a small difference decides on which side it falls.

# %%
time = 0.05 * torch.arange(1, horizon + 1)
cloud = imagined["next", "latent"].flatten(2, 3)  # [B, H, 100, 3]
low, high = cloud.quantile(torch.tensor([0.05, 0.95]), dim=2)
fig, axes = plt.subplots(2, 3, figsize=(9, 4.2), sharex=True, sharey="row")
for row, (dim, label) in enumerate([(0, "height of the tip (m)"), (2, "angular velocity (rad/s)")]):
    for b, ax in enumerate(axes[row]):
        ax.fill_between(time, low[b, :, dim], high[b, :, dim], color=MODEL, alpha=0.25, lw=0)
        ax.plot(time, cloud[b, :, :, dim].mean(-1), color=MODEL, label="imagined, 90% band")
        ax.plot(time, test["next", "observation"][b, :horizon, dim], "--", color=REAL, label="real")
        axes[0, b].set_title(f"held-out episode {b + 1}")
    axes[row, 0].set_ylabel(label)
fig.legend(*axes[0, 0].get_legend_handles_labels(), ncols=2, loc="outside upper center")
_ = fig.supxlabel("time since the only observation (s)", fontsize=9)

# %% [markdown]
# The same model is a TorchRL environment, for any policy, planner or collector that takes one.
# `initial_state` turns real observations into imagined states.

# %%
imagined_env = predictor.env(env.action_spec)
check_env_specs(imagined_env)
start = TensorDict({"observation": test["observation"][:, 0]}, batch_size=[TEST_EPISODES])
with torch.no_grad():
    start = imagined_env.initial_state(start)
    rollout = imagined_env.rollout(15, tensordict=start, auto_reset=False)  # random actions
rollout.shape, rollout["next", "latent"].shape, rollout["next", "reward"].shape

# %% [markdown]
# ## What the ensemble does not know
#
# Members agree where data taught them the same, and guess differently where there was none. The
# variance of their means is the **epistemic** variance. To see it, a second predictor learns from
# the same buffer without the steps in which the pendulum turned counter-clockwise (angular velocity
# above 0). What is left is no longer consecutive, so this one learns no value: with `n_steps=1` its
# slices are single steps.

# %%
clockwise = train.reshape(-1)
clockwise = clockwise[clockwise["observation"][:, 2] < 0]
clockwise_buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(clockwise)))
clockwise_buffer.extend(clockwise)
one_sided = make_predictor(None, n_steps=1, **rates, **rest)
one_sided.learn(
    clockwise_buffer,
    n_steps=OPTIM_STEPS,
    batch_size=256,
    model_batch_size=256,
    n_total_env_steps=len(buffer),
)
f"{len(clockwise)} of {len(buffer)} transitions are left"

# %% [markdown]
# `uncertainty=True` makes the imagined environment report both variances at each step. We take
# those of the tip's two coordinates together: the standard deviation of where it will be, in mm.


# %%
def tip_std(predictor, observation, action):
    imagined_env = predictor.env(env.action_spec, num_particles=5, uncertainty=True)
    start = TensorDict({"observation": observation}, batch_size=observation.shape[:1])
    with torch.no_grad():
        step = imagined_env.imagine(imagined_env.initial_state(start), action.unsqueeze(1))
    return 1000 * step["next", "epistemic_var"][:, 0, :2].sum(-1).sqrt()


angle, velocity = torch.linspace(-math.pi, math.pi, 91), torch.linspace(-8, 8, 81)
a, v = torch.meshgrid(angle, velocity, indexing="ij")
grid = torch.stack([a.cos(), a.sin(), v], -1).reshape(-1, 3)
maps = [
    tip_std(p, grid, torch.zeros(len(grid), 1)).reshape(a.shape) for p in (predictor, one_sided)
]

# %% [markdown]
# Each dot is a transition learned from; the darker the background, the more the members differ
# about the next step. Left: random actions never bring the pendulum to the top at speed, and the
# ensemble knows that it has not been there. Right: the same, and the upper half, which it was
# not shown, should be the darker the further from the data.

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
titles = ["Learned from all: sure where data are", "Learned from clockwise only: unsure beyond"]
norm, ticks = plt.matplotlib.colors.LogNorm(0.5, 50), [0.5, 1, 2, 5, 10, 20, 50]
for ax, seen, std_map, title in zip(
    axes, (train.reshape(-1), clockwise), maps, titles, strict=True
):
    mesh = ax.pcolormesh(a, v, std_map, norm=norm, cmap="Blues", shading="gouraud", rasterized=True)
    obs = seen["observation"]
    ax.scatter(torch.atan2(obs[:, 1], obs[:, 0]), obs[:, 2], s=1.5, color=GUESS, alpha=0.5, lw=0)
    ax.set(title=title, xlabel="angle θ (rad; 0 is upright)", xlim=(-math.pi, math.pi))
axes[1].axhline(0, color=REAL, lw=0.8, ls="--")
axes[0].set_ylabel("angular velocity (rad/s)")
_ = fig.colorbar(mesh, ax=axes, label="epistemic std of the tip (mm)", ticks=ticks, format="%g")

# %% [markdown]
# Is it right to be unsure? Both predictors on the held-out steps: the spread of the members, and
# the error that their mean really makes. Where it never learned, the one-sided predictor should
# have much more of both.


# %%
def spread_and_error(predictor, steps):
    with torch.no_grad():
        mean = predictor.predict(steps["observation"], steps["action"])[0].mean((1, 2))
    error = 1000 * (mean - steps["next", "observation"])[:, :2].norm(dim=-1)
    std = tip_std(predictor, steps["observation"], steps["action"])
    return rms(std).item(), rms(error).item()


seen = real["observation"][:, 2] < 0
print(f"{'RMS over held-out steps (mm)':44}{'spread':>8}{'error':>8}")
spread = {}
for name, p in (("all", predictor), ("clockwise", one_sided)):
    for kind, chosen in (("clockwise", seen), ("counter-clockwise", ~seen)):
        spread[name, kind], error = spread_and_error(p, real[chosen])
        print(f"learned {name + ', tested ' + kind:36}{spread[name, kind]:8.2f}{error:8.2f}")

# %% [markdown]
# The spread rises where the error does, but less: members that extrapolate alike are wrong alike.
# It tells *that* the model does not know, not how wrong it is.

# %% [markdown]
# ## What should be learned is learned
#
# The numbers this tutorial stands on, checked. (In smoke mode only that learning beats guessing.)

# %%
ratios = torch.tensor(model_rmse) / torch.tensor(guess_rmse)
unsure = spread["clockwise", "counter-clockwise"]
inside, with_data = spread["clockwise", "clockwise"], spread["all", "counter-clockwise"]
print("one-step error / persistence:", [round(x, 3) for x in ratios.tolist()])
print(f"spread without data: {unsure / inside:.1f} x inside, {unsure / with_data:.1f} x with data")
assert (ratios[:3] < (0.8 if SMOKE else 0.1)).all()
if not SMOKE:
    assert ratios[3] < 0.5
    assert unsure > 4 * inside
    assert unsure > 2 * with_data

# %% [markdown]
# ## What to read next
#
# - [`README.md`](../README.md): the composition example, with a planner that acts through this
#   environment and a loop of collecting and learning.
# - [Planning](02_planning.ipynb), the second tutorial: with
#   `TensorDictSequential(imagined_env.initial_state, planner)` the model acts in the real pendulum.
# - [`layeredrl_trl/keys.py`](../layeredrl_trl/keys.py): the names of all entries and the letters
#   of all shapes. Every part takes other names by `in_keys`, `out_keys` and `set_keys`.
# - `predictor.loss_module` is a TorchRL `LossModule`, for a training loop of your own.
