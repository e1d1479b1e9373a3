"""Small predictors of every kind of part, with statistics that are not those of a new one."""

from __future__ import annotations

import torch

from layeredrl_trl.modules import (
    IdentityEncoder,
    LinearEncoder,
    MLPEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    RunningMoments,
    SelectEncoder,
    ValueNet,
)
from layeredrl_trl.predictors import RewardPredictor

OBS, ACT = 3, 2
HIDDEN = {"hidden_sizes": (8,)}
ENCODERS = {
    "identity": lambda: IdentityEncoder(OBS),
    "select": lambda: SelectEncoder(OBS, [2, 0], [1]),
    "linear": lambda: LinearEncoder(OBS, 2, 1),
    "mlp": lambda: MLPEncoder(OBS, 2, 2, **HIDDEN),
}


def make_predictor(
    encoder="identity", n_models=2, n_modes=2, *, value="state", reward=True, wrap=None, **options
):
    """A ``RewardPredictor``; ``wrap`` puts a model around the ensemble, ``options`` are of that."""
    encoder = ENCODERS[encoder]()
    dims = encoder.latent_state_dim, encoder.context_dim
    counts = {"n_models": n_models, "n_modes": n_modes}
    model = ProbabilisticEnsemble(*dims, ACT, **counts, **HIDDEN, **options)
    values = {
        None: lambda: None,
        "state": lambda: ValueNet(*dims, **HIDDEN),
        "q": lambda: ValueNet(*dims, action_dim=ACT, **HIDDEN),
    }
    reward = RewardNet(*dims, ACT, **HIDDEN) if reward else None
    model = model if wrap is None else wrap(model)
    predictor = RewardPredictor(model, values[value](), reward, encoder, *dims, encoder_warm_up=0)
    for part in predictor.modules():
        if isinstance(part, RunningMoments):
            part.mean.normal_()
            part.var.uniform_(0.2, 3.0)
            part.count.fill_(5.0)
        if isinstance(part, LinearEncoder | MLPEncoder):
            part.changes.copy_(torch.tensor([True, False, True]))
            part.seen.fill_(True)
    return predictor
