"""DynamicsModel: what follows from `predict_particles`, on a model with known answers."""

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from layeredrl_trl.functional import fold_index
from layeredrl_trl.modules import DynamicsModel, ParticlePrediction, SymmetryBreakingStart
from tests.oracles import even_mixture, member_alone, random_ensemble

NAN = float("nan")


class Shift(DynamicsModel):
    """Member e moves the latent state by `shifts[e]`, and terminates with `term_probs[e]`."""

    def __init__(self, shifts, std=0.5, term_probs=None, **keys):
        super().__init__(**keys)
        self.n_models, self.n_modes, self.n_particles_per_model = len(shifts), 1, 1
        self.latent_state_dim, self.context_dim, self.action_dim = 2, 0, 1
        self.register_buffer("shifts", torch.tensor(shifts))
        self.register_buffer("term_probs", torch.tensor(term_probs or [0.5] * len(shifts)))
        self.std = std

    def predict_particles(self, latent, context, action, member=None):
        mean = (latent + self.shifts[:, None, None]).unsqueeze(-2)
        logit = self.term_probs.logit()[:, None, None].expand_as(latent[..., :1])
        return ParticlePrediction(
            mean, torch.full_like(mean, self.std), torch.zeros_like(mean[..., 0]), logit
        )


def inputs(*batch, d=2, a=1):
    return torch.randn(*batch, d), torch.zeros(*batch, 0), torch.randn(*batch, a)


def batch_of(model, *batch):
    latent, context, action = inputs(*batch, d=model.latent_state_dim, a=model.action_dim)
    following = {"latent": torch.randn_like(latent), "terminated": torch.rand(*batch, 1) < 0.5}
    return TensorDict(
        {"latent": latent, "context": context, "action": action, "next": following},
        batch_size=batch,
    )


def test_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        DynamicsModel()


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_a_model_brings_one_method_and_gets_the_others(batch):
    model, args = Shift([1.0, 3.0], std=0.5, term_probs=[0.2, 0.4]), inputs(*batch)
    latent = args[0]
    mean, weights, std, term_prob = model.predict(*args)
    assert mean.shape == std.shape == (*batch, 2, 1, 2)
    torch.testing.assert_close(mean[..., 1, 0, :], latent + 3)
    assert (weights == 1).all() and weights.shape == (*batch, 2, 1)
    assert (std == 0.5).all()
    torch.testing.assert_close(term_prob, torch.full(batch, 0.3))
    log_prob, term_prob = model.log_prob(*args, latent + 1)
    near = math.exp(-0.0) / (2 * math.pi * 0.25)
    far = math.exp(-2 * 0.5 * (2 / 0.5) ** 2) / (2 * math.pi * 0.25)
    torch.testing.assert_close(log_prob, torch.full(batch, math.log((near + far) / 2)))
    torch.testing.assert_close(term_prob, torch.full(batch, 0.3))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_as_a_module_it_predicts_the_mean_of_the_even_mixture(batch):
    model, data = Shift([1.0, 3.0], term_probs=[0.2, 0.4]), batch_of(Shift([1.0]), *batch)
    out = model(data.exclude("next"))
    torch.testing.assert_close(out["next", "latent"], data["latent"] + 2)
    torch.testing.assert_close(out["next", "term_prob"], torch.full((*batch, 1), 0.3))
    latent, term_prob = model(data["latent"], data["context"], data["action"])
    torch.testing.assert_close(latent, data["latent"] + 2)
    assert term_prob.shape == (*batch, 1)


def test_as_a_module_with_tensors_of_equal_last_dims():
    # TensorDict would take a last dim that all inputs share for a batch dim
    latent, term_prob = random_ensemble(2, 2, 2)(*[torch.randn(4, 2)] * 3)
    assert latent.shape == (4, 2) and term_prob.shape == (4, 1)


def test_as_a_module_it_draws_when_exploring():
    model, n = Shift([1.0, 3.0], std=0.1), 4000
    data = TensorDict(
        latent=torch.zeros(n, 2), context=torch.zeros(n, 0), action=torch.zeros(n, 1), batch_size=n
    )
    with set_exploration_type(ExplorationType.RANDOM):
        drawn = model(data)["next", "latent"]
    assert (drawn[:, 0] < 2).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert ((drawn[:, 0] < 2) == (drawn[:, 1] < 2)).all()  # one member moves all dims
    assert drawn[drawn < 2].std().item() == pytest.approx(0.1, rel=0.1)


def test_other_and_nested_keys():
    model = Shift([1.0], in_keys=[("m", "z"), "c", "a"], out_keys=["z_next", ("m", "p")])
    data = TensorDict(
        {("m", "z"): torch.zeros(4, 2), "c": torch.zeros(4, 0), "a": torch.zeros(4, 1)}, [4]
    )
    out = model(data)
    assert (out["z_next"] == 1).all() and out["m", "p"].shape == (4, 1)


def test_log_prob_with_transform_is_that_of_the_transformed_change():
    model, args = random_ensemble(3, 0, 2, n_modes=2), inputs(5, d=3, a=2)
    latent, following = args[0], torch.randn(5, 3)
    transform, std = torch.randn(3, 3), torch.rand(3) + 0.5
    mean, weights, _, term_prob = model.predict(*args)
    means = torch.stack(
        [
            torch.stack([torch.stack([transform @ (m - s) for m in modes]) for modes in members])
            for members, s in zip(mean, latent, strict=True)
        ]
    )
    target = torch.stack([transform @ (f - s) for f, s in zip(following, latent, strict=True)])
    expected = even_mixture(means, std.expand_as(means), weights).log_prob(target.double())
    found, probs = model.log_prob(*args, following, std=std, transform=transform)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(probs, term_prob)
    plain, _ = model.log_prob(*args, following, std=std)
    eye, _ = model.log_prob(*args, following, std=std, transform=torch.eye(3))
    torch.testing.assert_close(eye, plain, rtol=1e-4, atol=1e-4)


def test_loss_is_the_mean_over_real_steps():
    model = random_ensemble(2, 0, 1)
    data, mask = batch_of(model, 4, 3), torch.rand(4, 3, 1) < 0.6
    mask[0, 0] = True
    args = [data[key] for key in ("latent", "context", "action")]
    nll, bce = model.negative_log_likelihood(
        *args, data["next", "latent"], data["next", "terminated"]
    )
    assert nll.shape == bce.shape == (4, 3, 1)
    torch.testing.assert_close(model.loss(data), (nll + bce).mean())
    data["collector", "mask"] = mask
    torch.testing.assert_close(model.loss(data), (nll + bce)[mask].mean())


def weighted_oracle(model, data, weights):
    """``sum w l / sum w``, one transition and one member after the other."""
    total, loss = 0.0, 0.0
    for b in range(len(data)):
        row = data[b]
        for e in range(model.n_models):
            alone = member_alone(model, e)
            args = [row[key] for key in ("latent", "context", "action")]
            nll, bce = alone.negative_log_likelihood(*args, *row["next"].values())
            weight = weights[b, e % weights.shape[1]].item()
            loss, total = loss + weight * (nll + bce).item(), total + weight
    return loss / total


@pytest.mark.parametrize("each_member", [False, True])
def test_weights_count_once_and_not_again_for_each_member(each_member):
    model = random_ensemble(2, 0, 1)
    data, weights = batch_of(model, 6), torch.rand(6, 3 if each_member else 1)
    data["weight"] = weights
    assert model.loss(data).item() == pytest.approx(weighted_oracle(model, data, weights), rel=1e-4)
    args = [data[key] for key in ("latent", "context", "action", ("next", "latent"))]
    plain = model.negative_log_likelihood(*args, data["next", "terminated"])
    halved = model.negative_log_likelihood(
        *args, data["next", "terminated"], weight=torch.full_like(weights, 0.5)
    )
    for x, y in zip(halved, plain, strict=True):
        torch.testing.assert_close(x, 0.5 * y)


@pytest.mark.parametrize("each_member", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equal_weights_change_nothing(each_member, masked):
    model = random_ensemble(2, 0, 1)
    data = batch_of(model, 4, 3)
    if masked:
        data["collector", "mask"] = (torch.arange(12) % 2 == 0).reshape(4, 3, 1)
    expected = model.loss(data)
    data["weight"] = torch.full((4, 3, 3 if each_member else 1), 0.7).double()
    torch.testing.assert_close(model.loss(data), expected)


def test_a_weight_of_2_is_a_transition_that_is_there_twice():
    model = random_ensemble(2, 0, 1)
    data = batch_of(model, 3)
    twice = torch.cat([data, data[:1]])
    data["weight"] = torch.tensor([[2.0], [1.0], [1.0]])
    torch.testing.assert_close(model.loss(data), model.loss(twice))


def test_weights_of_0_alone_give_0_and_no_nan():
    model = random_ensemble(2, 0, 1)
    data = batch_of(model, 4)
    data["weight"] = torch.zeros(4, 3)
    loss = model.loss(data)
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_a_transition_of_weight_0_may_hold_anything():
    model = random_ensemble(2, 0, 1)
    data = batch_of(model, 4)
    data["weight"] = torch.tensor([[1.0], [0.0], [2.0], [0.0]])
    expected = model.loss(data[::2])
    data["latent"][1::2], data["next", "latent"][1::2] = NAN, float("inf")
    loss = model.loss(data)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


class Picky(Shift):
    """Its first member sees every other transition."""

    def transition_weights(self, index):
        return torch.stack([(index % 2).float(), torch.ones(index.shape)], -1)


@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("placed", [False, True])
def test_all_that_weighs_is_multiplied(placed, weighted, masked, batch):
    model, expected = Picky([1.0, 3.0]), torch.ones(*batch, 1)
    given = {}
    if placed:
        given["index"] = torch.randint(9, batch)
        expected = expected * model.transition_weights(given["index"])
    if weighted:
        given["weight"] = torch.rand(*batch, 1)
        expected = expected * given["weight"]
    if masked:
        given["mask"] = torch.rand(*batch, 1) < 0.5
        expected = expected * given["mask"]
    found = model.joint_weight(batch, **given)
    if not given:
        assert found is None
    else:
        torch.testing.assert_close(found, expected)


def test_the_weight_of_padding_may_be_nan():
    mask, weight = torch.tensor([[True], [False]]), torch.tensor([[2.0], [NAN]])
    assert Shift([1.0]).joint_weight((2,), mask=mask, weight=weight).tolist() == [[2.0], [0.0]]


def test_where_all_weigh_alike_there_is_no_weight():
    """A model that picks no transitions, such as an ensemble without bootstrap."""
    assert Shift([1.0]).joint_weight((6,), index=torch.arange(6)) is None


def test_weights_by_storage_position():
    model, data = Picky([1.0, 3.0]), batch_of(Shift([1.0]), 6)
    plain = Shift([1.0, 3.0])
    data["index"] = torch.arange(6)
    torch.testing.assert_close(plain.loss(data), plain.loss(data.exclude("index")))
    data["weight"] = torch.rand(6, 1)
    expected = data.exclude("index")
    expected["weight"] = data["weight"] * model.transition_weights(data["index"])
    torch.testing.assert_close(model.loss(data), plain.loss(expected))
    data["index"] = torch.stack([torch.arange(6), torch.arange(6) % 2], -1)  # storage of two dims
    folded = data.clone().set("index", fold_index(data["index"]))
    torch.testing.assert_close(model.loss(data), model.loss(folded))


@pytest.mark.parametrize("garbage", [NAN, float("inf"), 1e30])
def test_garbage_on_padding_changes_neither_loss_nor_gradient(garbage):
    model = random_ensemble(2, 0, 1)
    data, mask = batch_of(model, 4, 3), torch.rand(4, 3) < 0.6
    mask[0, 0] = True
    model.loss(data[mask]).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for key in ("latent", "action", ("next", "latent")):
        data[key] = torch.where(mask[..., None], data[key], garbage)
    data["collector", "mask"] = mask[..., None]
    loss = model.loss(data)
    loss.backward()
    torch.testing.assert_close(loss, model.loss(data.exclude("collector")[mask]))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_loss_of_padding_alone_is_0():
    model = random_ensemble(2, 0, 1)
    data = batch_of(model, 4)
    data["collector", "mask"] = torch.zeros(4, 1).bool()
    assert model.loss(data) == 0


def test_loss_with_indices_of_discrete_actions_and_a_mask():
    model = random_ensemble(2, 0, 3)
    data = batch_of(model, 4)
    data["action"] = torch.randint(3, (4,))
    expected = model.loss(data)
    data["collector", "mask"] = torch.ones(4, 1).bool()
    torch.testing.assert_close(model.loss(data), expected)


def test_regularization_is_added():
    class Regularized(Shift):
        def regularization(self):
            return torch.tensor(7.0)

    data = batch_of(Shift([1.0]), 4)
    torch.testing.assert_close(Regularized([1.0]).loss(data), Shift([1.0]).loss(data) + 7)


def test_a_model_without_statistics_takes_them():
    model, args = Shift([1.0]), inputs(4)
    assert model.update_statistics(*args, args[0]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"next_latent": (5, 1)}, r"next_latent: expected shape \[5, 2\], got \[5, 1\]"),
        ({"next_latent": (1, 2)}, r"next_latent: expected shape \[5, 2\], got \[1, 2\]"),
        ({"terminated": (5,)}, r"terminated: expected shape \[5, 1\], got \[5\]"),
        ({"terminated": (1, 1)}, r"terminated: expected shape \[5, 1\], got \[1, 1\]"),
    ],
)
def test_likelihood_does_not_broadcast(changes, message):
    shapes = {"next_latent": (5, 2), "terminated": (5, 1)} | changes
    with pytest.raises(ValueError, match=message):
        Shift([1.0]).negative_log_likelihood(*inputs(5), *map(torch.zeros, shapes.values()))


WRONG = {
    "mean without its modes": lambda p: p._replace(mean=p.mean.squeeze(-2)),
    "mean of one dim": lambda p: p._replace(mean=p.mean[..., :1]),
    "mean of one env": lambda p: p._replace(mean=p.mean[:1]),
    "mean of one member": lambda p: p._replace(mean=p.mean[..., :1, :, :, :]),
    "std of every dim": lambda p: p._replace(std=p.std[0, 0, 0, 0]),
    "std without its modes": lambda p: p._replace(std=p.std.squeeze(-2)),
    "log_weights of two modes": lambda p: p._replace(log_weights=p.log_weights.expand(5, 2, 1, 2)),
    "log_weights without a dim": lambda p: p._replace(log_weights=p.log_weights.squeeze(-1)),
    "term_logit without a dim": lambda p: p._replace(term_logit=p.term_logit.squeeze(-1)),
    "term_logit of each dim": lambda p: p._replace(term_logit=p.term_logit.expand(5, 2, 1, 2)),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_a_prediction_of_the_wrong_shape_is_not_broadcast(change, request):
    class Wrong(Shift):
        def predict_particles(self, *args):
            return change(super().predict_particles(*args))

    model, args = Wrong([1.0, 3.0]), inputs(5)
    field = request.node.callspec.id.split()[0]
    calls = (
        lambda: model.predict(*args),
        lambda: model.log_prob(*args, args[0]),
        lambda: model.negative_log_likelihood(*args, args[0], torch.zeros(5, 1)),
        lambda: model(*args),
        lambda: model.particles(args[0][:, None, None].expand(5, 2, 1, 2), *args[1:]),
        lambda: SymmetryBreakingStart(model, 10).predict(*args),
    )
    for call in calls:
        with pytest.raises(ValueError, match=rf"Wrong.predict_particles: {field} must have shape"):
            call()


def test_a_prediction_for_one_member_has_one_row():
    class Wrong(Shift):
        def predict_particles(self, latent, context, action, member=None):
            return super().predict_particles(latent.expand(-1, 2, -1, -1), context, action)

    given = torch.zeros(5, 1, 3, 2), torch.zeros(5, 0), torch.zeros(5, 1)
    text = r"mean must have shape \[5, 1, 3, 1, 2\], got \[5, 2, 3, 1, 2\]"
    with pytest.raises(ValueError, match=text):
        Wrong([1.0, 3.0]).particles(*given, torch.zeros(5, 1).long())


@pytest.mark.parametrize("change", [tuple, lambda p: p.mean, lambda p: p._replace(std=0.1)])
def test_a_prediction_of_the_wrong_kind(change):
    class Wrong(Shift):
        def predict_particles(self, *args):
            return change(super().predict_particles(*args))

    with pytest.raises(TypeError, match=r"Wrong.predict_particles.* must "):
        Wrong([1.0, 3.0]).predict(*inputs(5))


@pytest.mark.parametrize(
    ("position", "shape", "name"),
    [(0, (5, 1), "latent"), (1, (1, 0), "context"), (2, (1, 1), "action"), (2, (1,), "action")],
)
def test_inputs_of_a_model_of_your_own_are_not_broadcast(position, shape, name):
    args = list(inputs(5))
    args[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"{name}: expected shape \[5, "):
        Shift([1.0, 3.0]).predict(*args)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 2), (5, 2, 1)])
@pytest.mark.parametrize("which", [0, 1])
def test_scores_of_the_members_are_not_broadcast(which, shape):
    class Scored(Shift):
        def score_members(self, *args):
            out = [torch.zeros(5, 2), torch.zeros(5, 2)]
            out[which] = torch.zeros(shape)
            return tuple(out)

    args = inputs(5)
    with pytest.raises(ValueError, match=r"Scored.score_members must have shape \[5, 2\], got"):
        Scored([1.0, 3.0]).negative_log_likelihood(*args, args[0], torch.zeros(5, 1))


@pytest.mark.parametrize("shape", [(5,), (1, 1), (1, 2), (5, 3), ()])
def test_weights_of_stored_transitions_are_not_broadcast(shape):
    class Weighed(Shift):
        def transition_weights(self, index):
            return torch.ones(shape)

    data = batch_of(Shift([1.0]), 5)
    data["index"] = torch.arange(5)
    with pytest.raises(ValueError, match=r"Weighed.transition_weights must have shape \[5, "):
        Weighed([1.0, 3.0]).loss(data)


def test_one_weight_of_a_stored_transition_is_that_of_all_members():
    class Weighed(Shift):
        def transition_weights(self, index):
            return index.unsqueeze(-1)

    data = batch_of(Shift([1.0]), 5)
    data["index"] = torch.arange(5)
    expected = Shift([1.0, 3.0]).loss(data.copy().set("weight", torch.arange(5.0)[:, None]))
    torch.testing.assert_close(Weighed([1.0, 3.0]).loss(data), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_a_regularization_for_each_member_is_not_broadcast(masked):
    class Regularized(Shift):
        def regularization(self):
            return torch.ones(2)

    data = batch_of(Shift([1.0]), 5)
    if masked:
        data["collector", "mask"] = torch.ones(5, 1).bool()
    with pytest.raises(ValueError, match=r"regularization must have shape \[\], got \[2\]"):
        Regularized([1.0, 3.0]).loss(data)


@pytest.mark.parametrize("shape", [(3, 4, 1), (3, 4), (12,), (4, 3, 2)])
def test_a_mask_of_other_steps_is_not_reshaped(shape):
    mask = torch.ones(shape).bool()
    with pytest.raises(ValueError, match=r"mask: expected shape \[4, 3, 1\], got"):
        Shift([1.0]).joint_weight((4, 3), mask=mask)


@pytest.mark.parametrize(
    ("keys", "error", "text"),
    [
        ({"in_keys": "zca"}, TypeError, "in_keys must be a sequence of keys, as in"),
        ({"out_keys": "zp"}, TypeError, "out_keys must be a sequence of keys, as in"),
        ({"in_keys": ["z", "c"]}, ValueError, r"in_keys must hold 3 key\(s\), got 2"),
        ({"out_keys": ["z"]}, ValueError, r"out_keys must hold 2 key\(s\), got 1"),
    ],
)
def test_keys_that_are_a_string_are_not_split_into_letters(keys, error, text):
    with pytest.raises(error, match=f"Shift: {text}"):
        Shift([1.0], **keys)


@pytest.mark.parametrize("shape", [(5,), (1, 1), (5, 3), (5, 2, 1)])
def test_weights_do_not_broadcast(shape):
    model, data = Shift([1.0, 3.0]), batch_of(Shift([1.0]), 5)
    message = r"weight: expected shape \[5, 1\] or \[5, 2\], got"
    args = data["latent"], data["context"], data["action"], *data["next"].values()
    with pytest.raises(ValueError, match=message):
        model.negative_log_likelihood(*args, torch.ones(shape))
    if shape[0] == 5:
        data["weight"] = torch.ones(shape)
        with pytest.raises(ValueError, match=message):
            model.loss(data)


@pytest.mark.parametrize("shape", [(5, 2, 2), (5, 1, 1)])
def test_positions_that_do_not_fit(shape):
    data = batch_of(Shift([1.0]), 5)
    data["index"] = torch.zeros(shape).long()
    with pytest.raises(ValueError, match=r"index: expected shape \[5\], got \[5, "):
        Shift([1.0]).loss(data)


@pytest.mark.parametrize(
    ("next_latent", "options", "message"),
    [
        ((5, 1), {}, r"next_latent: expected shape \[5, 2\], got \[5, 1\]"),
        ((5, 2), {"transform": torch.eye(2)}, "transform needs a fixed std"),
        (
            (5, 2),
            {"transform": torch.ones(1, 2), "std": torch.ones(2)},
            r"transform: expected shape \[2, 2\], got \[1, 2\]",
        ),
    ],
)
def test_log_prob_errors(next_latent, options, message):
    with pytest.raises(ValueError, match=message):
        Shift([1.0]).log_prob(*inputs(5), torch.zeros(next_latent), **options)


@pytest.mark.parametrize("name", ["latent", "context", "action"])
def test_missing_entry_names_what_there_is(name):
    model, data = Shift([1.0]), batch_of(Shift([1.0]), 4).exclude(name)
    for call in (model, model.loss):
        with pytest.raises(KeyError, match=f"{name}.* not found .*next"):
            call(data)


@pytest.mark.parametrize("name", ["latent", "terminated"])
def test_missing_target(name):
    data = batch_of(Shift([1.0]), 4).exclude(("next", name))
    with pytest.raises(KeyError, match=f"{name}.* not found"):
        Shift([1.0]).loss(data)
