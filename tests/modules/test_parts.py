"""Parts of a world model that do not fit together are refused where they are put together."""

import pytest
import torch
from torch import nn
from torchrl.data import Bounded

from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import (
    DeltaStandardizer,
    DynamicsModel,
    IdentityEncoder,
    LinearEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    SelectEncoder,
    SymmetryBreakingStart,
    ValueNet,
)
from layeredrl_trl.objectives import RewardPredictorLoss
from layeredrl_trl.predictors import RewardPredictor

SMALL = {"hidden_sizes": (4,)}


def make_loss(encoder, dynamics, reward=None, value=None, **options):
    return RewardPredictorLoss(encoder, dynamics, reward, value, **options)


def make_env(encoder, dynamics, reward=None, value=None):
    return PredictorEnv(encoder, dynamics, reward, Bounded(-1, 1, (2,)))


def make_predictor(encoder, dynamics, reward=None, value=None):
    return RewardPredictor(dynamics, value, reward, encoder, 3, 1)


def parts():
    return {
        "encoder": SelectEncoder(4, [0, 1, 2], [3]),
        "dynamics": ProbabilisticEnsemble(3, 1, 2, **SMALL),
        "reward": RewardNet(3, 1, 2, **SMALL),
        "value": ValueNet(3, 1, **SMALL),
    }


every_owner = pytest.mark.parametrize("make", [make_loss, make_env, make_predictor])


@every_owner
def test_parts_that_fit_are_taken(make):
    make(**parts())
    make(**parts() | {"reward": lambda latent, context, action: latent[..., :1], "value": None})
    make(**parts() | {"dynamics": SymmetryBreakingStart(parts()["dynamics"], 10)})


@every_owner
def test_encoder_and_dynamics_swapped_are_named(make):
    """It was an IndexError."""
    given = parts()
    given["encoder"], given["dynamics"] = given["dynamics"], given["encoder"]
    text = r"(encoder|model|dynamics): expected a (Encoder|DynamicsModel), got"
    with pytest.raises(TypeError, match=text):
        make(**given)


@pytest.mark.parametrize("make", [make_loss, make_env])
@pytest.mark.parametrize(
    ("encoder", "text"),
    [
        (IdentityEncoder(4), "encoder has 4 latent dims, dynamics 3"),
        (IdentityEncoder(3), "encoder has 0 context dims, dynamics 1"),
    ],
)
def test_encoder_of_other_dims_than_the_dynamics(make, encoder, text):
    with pytest.raises(ValueError, match=text):
        make(**parts() | {"encoder": encoder})


@every_owner
@pytest.mark.parametrize(
    ("dims", "text"),
    [((4, 1, 2), "4 latent"), ((3, 0, 2), "0 context"), ((3, 1, 5), "5 action")],
)
def test_a_reward_of_other_dims_is_named_at_construction(make, dims, text):
    with pytest.raises(ValueError, match=rf"(reward|rew_func) reads {text} dims, the dynamics"):
        make(**parts() | {"reward": RewardNet(*dims, **SMALL)})


@pytest.mark.parametrize("make", [make_loss, make_predictor])
@pytest.mark.parametrize(("dims", "text"), [((4, 1), "4 latent"), ((3, 0), "0 context")])
def test_a_value_of_other_dims_is_named_at_construction(make, dims, text):
    with pytest.raises(ValueError, match=rf"(value|val_func) reads {text} dims, the dynamics"):
        make(**parts() | {"value": ValueNet(*dims, **SMALL)})
    with pytest.raises(ValueError, match="reads 3 action dims, the dynamics have 2"):
        make(**parts() | {"value": ValueNet(3, 1, action_dim=3, **SMALL)})


@pytest.mark.parametrize("make", [make_loss, make_predictor])
def test_reward_and_value_swapped_were_accepted(make):
    given = parts()
    given["reward"], given["value"] = given["value"], given["reward"]
    with pytest.raises(TypeError, match=r"(rew|val).*: expected a (reward|value), .* Swap it with"):
        make(**given)


@pytest.mark.parametrize("standardizer", [True, nn.Linear(3, 3)])
def test_a_standardizer_that_is_none(standardizer):
    with pytest.raises(TypeError, match="standardizer: expected a DeltaStandardizer, got"):
        make_loss(**parts(), standardizer=standardizer)


def test_a_standardizer_of_other_dims():
    with pytest.raises(ValueError, match="standardizer has 2 latent dims, the dynamics have 3"):
        make_loss(**parts(), standardizer=DeltaStandardizer(2))


def test_integers_of_a_continuous_action_were_taken_for_indices():
    """Of a model with one action dim they all became the action 1.0."""
    for space in (1, Bounded(-1, 1, (1,))):
        model = ProbabilisticEnsemble(3, 0, space, **SMALL)
        model = SymmetryBreakingStart(model, 10)
        reward = RewardNet(3, 0, 1, **SMALL)
        predictor = RewardPredictor(model, None, reward, IdentityEncoder(3), 3, 0)
        action = torch.zeros(4, dtype=torch.long)
        for call in (predictor.predict, predictor.predict_reward):
            with pytest.raises(ValueError, match=r"action: expected shape \[4, 1\], got \[4\]"):
                call(torch.zeros(4, 3), action)
        with pytest.raises(ValueError, match=r"actions: expected shape \[4, H, 1\]"):
            predictor.rollout(torch.zeros(4, 3), torch.zeros(4, 5, dtype=torch.long))


class Own(DynamicsModel):
    """A model that sets the numbers it is given, and predicts nothing."""

    def __init__(self, **numbers):
        super().__init__()
        for name, number in numbers.items():
            setattr(self, name, number)

    def predict_particles(self, latent, context, action, member=None):
        raise AssertionError


NUMBERS = {"latent_state_dim": 3, "context_dim": 1, "action_dim": 2}
NUMBERS |= {"n_models": 1, "n_modes": 1, "n_particles_per_model": 1}


@every_owner
@pytest.mark.parametrize(
    ("name", "number", "error", "text"),
    [
        ("n_models", 1.0, TypeError, "must be an integer, got 1.0"),
        ("n_modes", True, TypeError, "must be an integer, got True"),
        ("n_particles_per_model", 0, ValueError, "must be at least 1, got 0"),
        ("action_dim", 2.0, TypeError, "must be an integer, got 2.0"),
        ("context_dim", True, TypeError, "must be an integer, got True"),
    ],
)
def test_a_number_of_a_users_model_that_is_none(make, name, number, error, text):
    given = parts() | {"reward": None, "value": None}
    make(**given | {"dynamics": Own(**NUMBERS)})
    with pytest.raises(error, match=f"{name} of Own {text}"):
        make(**given | {"dynamics": Own(**NUMBERS | {name: number})})


@every_owner
def test_a_number_that_a_users_model_lacks_is_named(make):
    numbers = {name: number for name, number in NUMBERS.items() if name != "n_modes"}
    with pytest.raises(TypeError, match=r"Own must set n_modes, see layeredrl_trl.DynamicsModel"):
        make(**parts() | {"dynamics": Own(**numbers)})


@every_owner
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_part_of_half_precision_failed_in_a_matrix_product(make, dtype):
    dynamics = parts()["dynamics"].to(dtype)
    with pytest.raises(
        TypeError, match=rf"(dynamics|model) must be of float32 or float64, .* of {dtype}"
    ):
        make(**parts() | {"dynamics": dynamics})
    encoder = LinearEncoder(4, 3, 1).to(dtype)
    with pytest.raises(
        TypeError, match=r"encoder must be of float32 or float64, but moments.mean is of"
    ):
        make(**parts() | {"encoder": encoder})
    make(**parts() | {"dynamics": dynamics.float(), "encoder": encoder.float()})


@every_owner
def test_a_network_of_the_user_may_be_of_another_dtype(make):
    def network(n_in, n_out):
        return nn.Linear(n_in, n_out, dtype=torch.float64)

    make(**parts() | {"dynamics": ProbabilisticEnsemble(3, 1, 2, network=network)})


@pytest.mark.parametrize("make", [RewardNet, ValueNet])
def test_heads_and_standardizer_refuse_half_precision(make):
    for part in (make(3, 1, action_dim=2), DeltaStandardizer(3)):
        before = {name: x.clone() for name, x in part.state_dict().items()}
        for convert in ("half", "bfloat16"):
            with pytest.raises(TypeError, match="computes in float32"):
                getattr(part, convert)()
        for name, x in part.state_dict().items():
            assert x.dtype is torch.float32 and torch.equal(x, before[name])
        assert part.double().float() is part and part.to("cpu") is part
