"""A model that is exactly known, real buffers, and agents, for tests of imagined rows."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss

from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import DynamicsModel, IdentityEncoder, ParticlePrediction
from layeredrl_trl.trainers.imagined_buffer import ImaginedBuffer
from tests.problems import LinearGaussian

SYSTEM = LinearGaussian()
ACTIONS = Bounded(-1.0, 1.0, (1,))
ROLLOUTS = {"num_particles": 1, "propagation": "random_model", "termination": "sample"}


class KnownDynamics(DynamicsModel):
    """:class:`LinearGaussian`, predicted exactly by members that differ by a shift of dim 0."""

    n_modes = n_particles_per_model = 1
    context_dim, latent_state_dim, action_dim = 0, 2, 1

    def __init__(self, shifts: tuple[float, ...] = (0.0,), hazard: float | None = None) -> None:
        super().__init__()
        self.n_models, self.hazard = len(shifts), hazard
        self.register_buffer(
            "shift", torch.stack([torch.tensor(shifts), torch.zeros(len(shifts))], 1)
        )

    def predict_particles(self, latent, context, action, member=None):
        shift = self.shift[:, None] if member is None else self.shift[member][..., None, :]
        action = action[..., None, None, :].expand(*latent.shape[:-1], -1)
        mean = latent @ SYSTEM.A.T + action @ SYSTEM.B.T + shift
        chance = SYSTEM.hazard(latent) if self.hazard is None else latent[..., :1] * 0 + self.hazard
        std = SYSTEM.noise.expand_as(mean)
        weight = torch.zeros_like(mean[..., :1])
        return ParticlePrediction(
            mean.unsqueeze(-2), std.unsqueeze(-2), weight, chance.logit(eps=1e-12)
        )


def known_reward(latent: Tensor, context: Tensor, action: Tensor) -> Tensor:
    return latent[..., :1] + 2 * action


def known_env(dynamics: DynamicsModel | None = None, encoder=None, **options) -> PredictorEnv:
    dynamics = KnownDynamics() if dynamics is None else dynamics
    encoder = IdentityEncoder(2) if encoder is None else encoder
    return PredictorEnv(encoder, dynamics, known_reward, ACTIONS, **{**ROLLOUTS, **options})


def real_steps(n: int = 60, ends_every: int = 10, action: Tensor | None = None) -> TensorDict:
    """Steps of one env whose observation tells the row: ``(row / 100, 0)``; rewards are 100."""
    observation = torch.stack([torch.arange(n + 1) / 100, torch.zeros(n + 1)], -1)
    last = (torch.arange(n) % ends_every == ends_every - 1).unsqueeze(-1)
    no = torch.zeros(n, 1, dtype=torch.bool)
    flags = {"terminated": no.clone(), "truncated": no.clone(), "done": no.clone()}
    reached = {"terminated": last, "truncated": no.clone(), "done": last.clone()}
    steps = {
        "observation": observation[:-1],
        "action": torch.zeros(n, 1) if action is None else action,
        **flags,
        "next": {"observation": observation[1:], "reward": torch.full((n, 1), 100.0), **reached},
    }
    return TensorDict(steps, batch_size=[n])


def real_buffer(steps: TensorDict | None = None, size: int | None = None, **options):
    """A replay buffer with steps ``[n]``, or ``[N, T]`` in a storage of two dims."""
    steps = real_steps() if steps is None else steps
    ndim = steps.batch_dims
    options.setdefault("storage", LazyTensorStorage(size or 2 * steps.numel(), ndim=ndim))
    buffer = TensorDictReplayBuffer(**options)
    buffer.extend(steps)
    return buffer


def rows_of(observation: Tensor) -> Tensor:
    """Which of the rows of :func:`real_steps` observations ``[..., 2]`` are; -1 for none."""
    row = (observation[..., 0] * 100).round().long()
    exact = (row / 100 == observation[..., 0]) & (observation[..., 1] == 0)
    return torch.where(exact, row, -1)


def sac(obs_dim: int, action_spec) -> tuple[ProbabilisticActor, SACLoss]:
    """TorchRL's SAC, small."""
    actions = action_spec.shape[-1]
    net = nn.Sequential(MLP(obs_dim, 2 * actions, num_cells=[32]), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": action_spec.space.low, "high": action_spec.space.high},
        default_interaction_type=InteractionType.RANDOM,
        spec=action_spec,
    )
    critic = ValueOperator(MLP(obs_dim + actions, 1, num_cells=[32]), ["observation", "action"])
    loss = SACLoss(actor, critic, action_spec=action_spec)
    loss.make_value_estimator(gamma=0.9)
    return actor, loss


def imagined_buffer(env=None, policy=None, buffer=None, *, n=200, refills=1, **options):
    env = known_env() if env is None else env
    buffer = real_buffer() if buffer is None else buffer
    imagined = ImaginedBuffer(env, policy, buffer, num_starts=n, **options)
    for _ in range(refills):
        imagined.refill()
    return imagined


def branches_of(rows):
    """Cut rows into branches: each ends at its first ``done``."""
    ends = rows["next", "done"].flatten().nonzero().flatten().tolist()
    assert ends[-1] == len(rows) - 1
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [rows[start : end + 1] for start, end in zip(starts, ends, strict=True)]


def for_spec(spec, n=40):
    """A buffer of real steps with random actions of a spec, for ``make_env``."""
    steps = real_steps(n, action=spec.expand(n, *spec.shape).rand())
    for part in (steps, steps["next"]):
        part["observation"] = torch.randn(n, 3)
    return real_buffer(steps)


def plain(x):
    """Whether a state is made of plain values and tensors alone."""
    if isinstance(x, dict):
        return all(isinstance(key, str) and plain(value) for key, value in x.items())
    if isinstance(x, list):
        return all(map(plain, x))
    return x is None or type(x) in (int, float, str, bool, torch.Tensor)
