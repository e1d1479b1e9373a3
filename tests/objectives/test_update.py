"""Update: contract, oracle, property, errors."""

import copy
import warnings

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from layeredrl_trl.modules import DeltaStandardizer
from layeredrl_trl.objectives import ForeachSoftUpdate, RewardPredictorLoss, Update, total_loss
from tests.oracles_predictors import adam_oracle
from tests.small_predictors import small_parts

MASK = ("collector", "mask")


def make(value="state", lr=1e-2, learn_encoder=True, sgd=False, tau=0.1, **options):
    """An Update over everything that a predictor has, with the parts of the loss by name."""
    dynamics, value_net, reward, encoder = small_parts(value)
    loss = RewardPredictorLoss(
        encoder,
        dynamics,
        reward,
        value_net,
        standardizer=DeltaStandardizer(2),
        k_steps=2,
        learn_encoder=learn_encoder,
    )
    optimizer = (torch.optim.SGD if sgd else torch.optim.Adam)(loss.parameters(), lr)
    updater = SoftUpdate(loss, tau=tau) if value else None
    warm = [*encoder.parameters(), *reward.parameters()]
    update = Update(loss, optimizer, target_updater=updater, warm_up_params=warm, **options)
    return update, loss


def make_slices(n=8, k=2) -> TensorDict:
    return TensorDict(
        {
            "observation": torch.randn(n, k, 3),
            "action": torch.randn(n, k, 1),
            "next": {
                "observation": torch.randn(n, k, 3),
                "reward": torch.randn(n, k, 1),
                "terminated": torch.rand(n, k, 1) < 0.1,
            },
            "collector": {"mask": torch.ones(n, k, 1, dtype=torch.bool)},
        },
        batch_size=[n, k],
    )


def poisoned(key=("next", "reward")) -> TensorDict:
    slices = make_slices()
    slices[key][3, 0] = torch.nan
    return slices


def snapshot(update) -> dict:
    """All that a skipped step must leave alone."""
    loss = update.loss_module
    state = {f"param {key}": p.detach().clone() for key, p in loss.named_parameters()}
    state |= {f"buffer {key}": x.clone() for key, x in loss.named_buffers()}
    for i, entry in update.optimizer.state_dict()["state"].items():
        state |= {f"optimiser {i} {key}": x.clone() for key, x in entry.items()}
    return state


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {key for key in before if not torch.equal(before[key], after[key])}


def values(loss) -> list[torch.Tensor]:
    return [p.detach().clone() for p in loss.value_network_params.values(True, True)]


def targets(loss) -> list[torch.Tensor]:
    return [p.clone() for p in loss.target_value_network_params.values(True, True)]


# --- contract


@pytest.mark.parametrize("value", ["state", "q", None])
def test_one_step(value):
    update, loss = make(value)
    before = {key: p.detach().clone() for key, p in loss.named_parameters()}
    info = update(make_slices(k=3 if value == "q" else 2))
    assert set(info.keys()) == {*loss.out_keys, "loss", "grad_norm"}
    assert not any(x.requires_grad for x in info.values())
    terms = [x for key, x in info.items() if key.startswith("loss_")]
    torch.testing.assert_close(info["loss"], sum(terms))
    assert all(not torch.equal(p, before[key]) for key, p in loss.named_parameters())
    assert (update.steps, update.skipped) == (1, 0)


def test_gradients_do_not_add_up_over_steps():
    update, loss = make(lr=0.0)
    loss.eval()
    slices = make_slices()
    norms = [update(slices)["grad_norm"] for _ in range(3)]
    torch.testing.assert_close(norms[1:], [norms[0]] * 2)


# --- oracle


def test_clipping_is_by_the_norm_of_each_group():
    """With a single global norm, a large reward took the dynamics' steps away."""
    slices = make_slices()
    changes, norms = [], []
    for max_norm in (None, 0.05):
        torch.manual_seed(1)
        update, loss = make(sgd=True, lr=1.0, clip_grad_max_norm=max_norm)
        parts = {"reward": loss.reward, "model": loss.dynamics, "standardizer": loss.standardizer}
        groups = [{"params": list(part.parameters())} for part in parts.values()]
        update.optimizer = torch.optim.SGD(groups, 1.0)
        before = {
            name: torch.nn.utils.parameters_to_vector(part.parameters()).detach()
            for name, part in parts.items()
        }
        norms.append(update(slices)["grad_norm"])
        after = {
            name: torch.nn.utils.parameters_to_vector(part.parameters()).detach()
            for name, part in parts.items()
        }
        changes.append({name: after[name] - x for name, x in before.items()})
    free, clipped = changes
    norm = torch.cat(list(free.values())).norm()
    torch.testing.assert_close(norms, [norm, norm], rtol=1e-4, atol=0)
    sizes = {name: x.norm().item() for name, x in free.items()}
    assert max(sizes.values()) > 0.1
    for name, x in free.items():
        factor = min(1.0, 0.05 / sizes[name])
        torch.testing.assert_close(clipped[name], x * factor, rtol=1e-2, atol=1e-5)


def test_small_gradients_are_not_clipped():
    slices = make_slices()
    results = []
    for max_norm in (None, 1e6):
        torch.manual_seed(1)
        update, _ = make(sgd=True, lr=1.0, clip_grad_max_norm=max_norm)
        update(slices)
        results.append(snapshot(update))
    assert not changed(*results)


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
def test_target_is_the_polyak_average_of_the_values(tau):
    update, loss = make(tau=tau)
    expected = values(loss)
    for _ in range(4):
        update(make_slices())
        expected = [
            (1 - tau) * old + tau * new for old, new in zip(expected, values(loss), strict=True)
        ]
        torch.testing.assert_close(targets(loss), expected)


def test_parameters_follow_adam():
    update, loss = make()
    bias = loss.reward.module.layers[-1].bias
    before, seen = bias.detach().clone(), []
    for _ in range(5):
        update(make_slices())
        seen.append(bias.grad.clone())
    torch.testing.assert_close(
        (bias.detach() - before).double(), adam_oracle(seen, 1e-2), rtol=1e-4, atol=1e-7
    )


# --- property: a bad batch changes nothing


@pytest.mark.parametrize(
    "key", ["observation", "action", ("next", "observation"), ("next", "reward")]
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_batch_with_non_finite_gradients_changes_nothing(key, bad):
    update, _ = make(clip_grad_max_norm=1.0)
    update(make_slices())
    before = snapshot(update)
    slices = poisoned(key)
    slices[key][3, 0] = bad
    with pytest.warns(UserWarning, match="non-finite gradients and was skipped"):
        info = update(slices)
    assert not changed(before, snapshot(update))
    assert not info["grad_norm"].isfinite()
    assert (update.steps, update.skipped) == (2, 1)


def test_a_skipped_batch_is_counted_each_time_and_warned_of_once():
    update, _ = make()
    with pytest.warns(UserWarning, match="skipped"):
        update(poisoned())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            update(poisoned())
    assert update.skipped == 3


def test_learning_goes_on_after_a_skipped_batch():
    """The same steps with and without a bad batch in between end in the same place."""
    batches = [make_slices() for _ in range(3)]
    bad = poisoned()
    results = []
    for sequence in (batches, [batches[0], bad, *batches[1:]]):
        torch.manual_seed(1)
        update, _ = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch in sequence:
                update(batch)
        results.append(snapshot(update))
    assert not changed(*results)


def test_target_rests_in_a_skipped_step():
    update, loss = make()
    update(make_slices())
    before = targets(loss)
    with pytest.warns(UserWarning):
        update(poisoned())
    torch.testing.assert_close(targets(loss), before, rtol=0, atol=0)
    update(make_slices())
    assert not torch.equal(targets(loss)[0], before[0])


def test_a_batch_is_skipped_for_gradients_that_the_warm_up_drops():
    update, loss = make(warm_up=3)
    update(make_slices())
    before = snapshot(update)

    def compute(batch):
        losses = loss(batch)
        value_params = list(loss.value_network_params.values(True, True))
        return losses.set("loss_value", losses["loss_value"] + torch.nan * value_params[0].sum())

    update.compute = compute
    with pytest.warns(UserWarning, match="skipped"):
        info = update(make_slices())
    assert not info["grad_norm"].isfinite() and not changed(before, snapshot(update))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_raises_changes_nothing(where):
    update, loss = make()
    update(make_slices())
    before, steps = snapshot(update), update.steps

    def fail(*_):
        raise RuntimeError("in the middle")

    def compute(batch):
        losses = loss(batch)  # moves the running statistics
        if where == "forward":
            fail()
        losses.get("loss_value").register_hook(fail)
        return losses

    update.compute = compute
    with pytest.raises(RuntimeError, match="in the middle"):
        update(make_slices())
    assert not changed(before, snapshot(update)) and update.steps == steps


@pytest.mark.parametrize("shape", [(), (3,), (3, 1)])
def test_the_total_is_the_sum_of_all_terms(shape):
    terms = {"loss_a": torch.rand(shape), "loss_b": torch.rand(shape), "nll": torch.rand(shape)}
    expected = sum(x.sum() for key, x in terms.items() if key.startswith("loss_"))
    assert total_loss(terms).shape == () and total_loss(terms) == pytest.approx(expected.item())


def test_terms_of_several_shapes_are_not_broadcast():
    with pytest.raises(RuntimeError, match="equal size"):
        total_loss({"loss_a": torch.rand(3, 1), "loss_b": torch.rand(3)})


def test_a_buffer_that_the_loss_replaces_is_put_back():
    update, loss = make()

    def replace(module, args):
        module.register_buffer("seen", module.seen + 1)

    loss.register_buffer("seen", torch.zeros(()))
    update = Update(loss, update.optimizer, target_updater=update.target_updater)
    loss.register_forward_pre_hook(replace)
    update(make_slices())
    assert loss.seen == 1
    with pytest.warns(UserWarning, match="skipped"):
        update(poisoned())
    assert loss.seen == 1


def test_a_skipped_batch_had_ruined_the_statistics_of_the_value():
    """They are kept with its parameters, beside the targets."""

    class Value(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1)

        def forward(self, latent, context):
            return self.out(self.norm(latent.flatten(0, -2))).reshape(*latent.shape[:-1], 1)

    dynamics, _, reward, encoder = small_parts(None)
    loss = RewardPredictorLoss(encoder, dynamics, reward, Value(), k_steps=2)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2, fused=True)
    update = Update(loss, optimizer, target_updater=ForeachSoftUpdate(loss, 0.1))
    update(make_slices())
    before = snapshot(update)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        update(poisoned("observation"))
        assert update.skipped == 1
    assert not changed(before, snapshot(update))


def test_a_fused_optimiser_that_took_over_a_plain_state_can_clip():
    update, loss = make(clip_grad_max_norm=1e-3)
    fused = torch.optim.Adam(loss.parameters(), 1e-2, fused=True)
    fused.load_state_dict(update.optimizer.state_dict())
    update.optimizer = fused
    update(make_slices())
    assert update.steps == 1


# --- gradients: who learns when


@pytest.mark.parametrize("warm_up", [1, 3])
def test_only_encoder_and_reward_learn_in_the_warm_up_and_they_do(warm_up):
    """LayeredRL's warm-up let nothing learn."""
    update, loss = make(warm_up=warm_up)
    for step in range(warm_up + 1):
        before = {key: p.detach().clone() for key, p in loss.named_parameters()}
        update(make_slices())
        learned = {
            key.split(".")[0]
            for key, p in loss.named_parameters()
            if not torch.equal(p, before[key])
        }
        everyone = {"encoder", "reward", "dynamics", "standardizer", "value_network_params"}
        assert learned == ({"encoder", "reward"} if step < warm_up else everyone)
        untouched = [key for key, p in loss.named_parameters() if torch.equal(p, before[key])]
        assert not any(key.startswith(("encoder", "reward")) for key in untouched)


def test_the_optimiser_of_what_waits_starts_after_the_warm_up():
    """Zero gradients in the warm-up would have aged Adam's moments."""
    update, loss = make(warm_up=3)
    for _ in range(4):
        update(make_slices())
    state = update.optimizer.state[loss.standardizer.raw]
    assert state["step"] == 1
    assert update.optimizer.state[loss.encoder.net.weight]["step"] == 4


def test_clipping_in_the_warm_up_regards_what_learns():
    torch.manual_seed(1)
    update, loss = make(warm_up=1, sgd=True, lr=1.0)
    before = {key: p.detach().clone() for key, p in loss.named_parameters()}
    norm = update(make_slices())["grad_norm"]
    moved = torch.cat([(p - before[key]).flatten() for key, p in loss.named_parameters()])
    torch.testing.assert_close(norm, moved.norm(), rtol=1e-4, atol=1e-6)


def test_nothing_to_learn_from_is_no_error():
    dynamics, _, _, encoder = small_parts(None)
    loss = RewardPredictorLoss(encoder, dynamics, None, None)
    update = Update(loss, torch.optim.Adam(loss.parameters()), warm_up=1, warm_up_params=[])
    before = snapshot(update)
    assert update(make_slices(k=1))["grad_norm"] == 0
    assert all(key.startswith("buffer") for key in changed(before, snapshot(update)))


# --- errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"clip_grad_max_norm": 0.0}, "clip_grad_max_norm must be positive, got 0.0"),
        ({"clip_grad_max_norm": -1.0}, "clip_grad_max_norm"),
        ({"clip_grad_max_norm": float("nan")}, "clip_grad_max_norm must be positive, got nan"),
        ({"warm_up": -1}, "warm_up must be at least 0, got -1"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        make(**options)


def test_an_error_changes_nothing():
    update, _ = make()
    before = snapshot(update)
    with pytest.raises(KeyError, match="reward"):
        update(make_slices().exclude(("next", "reward")))
    with pytest.raises(ValueError, match="action"):
        update(make_slices().set("action", torch.zeros(8, 2, 7)))
    assert not changed(before, snapshot(update))
    assert update.steps == 0


# --- state


def make_learned(seed=0, n=4, **options):
    """An Update of parts in groups of their own, after some steps."""
    torch.manual_seed(seed)
    update, loss = make(**options)
    parts = {"reward": loss.reward, "encoder": loss.encoder}
    groups = [{"params": [*part.parameters()], "name": name} for name, part in parts.items()]
    update.optimizer = torch.optim.Adam(groups, 1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(n):
            update(poisoned() if i == n - 1 else make_slices())
    return update, loss


def test_a_loaded_update_goes_on_as_the_saved_one():
    update, loss = make_learned()
    other, other_loss = make_learned(seed=1, n=1)
    other_loss.load_state_dict(loss.state_dict())
    saved = copy.deepcopy(update.state_dict())
    other.load_state_dict(saved)
    assert (other.steps, other.skipped) == (4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in (poisoned(), make_slices(), make_slices()):
            update(batch)
            other(batch)
    assert not changed(snapshot(update), snapshot(other))
    assert update.state_dict()["skipped"] == other.state_dict()["skipped"] == 2
    assert not same_moments(saved, update.state_dict())  # the saved one is no part of the update


def same_moments(one, other) -> bool:
    pairs = zip(
        one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True
    )
    return all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in pairs)


def test_the_number_skipped_in_a_row_is_kept():
    """A run that is resumed all the time had never warned that nothing is learned any more."""
    update, _ = make_learned()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(8):
            update(poisoned())
    other, _ = make_learned(n=1)
    other.load_state_dict(update.state_dict())
    with pytest.warns(UserWarning, match="the last 10 batches"):
        other(poisoned())


def test_a_state_of_an_earlier_version_is_loaded():
    update, _ = make_learned()
    state = copy.deepcopy(update.state_dict())
    for name in ("parameters", "n_states", "skipped_in_a_row"):
        del state[name]
    other, _ = make_learned(n=1)
    other.load_state_dict(state)
    assert same_moments(state, other.state_dict()) and other.steps == 4


def test_an_update_that_has_not_learned_has_a_state():
    update, _ = make()
    other, _ = make_learned(n=1)
    other.optimizer = torch.optim.Adam(other.loss_module.parameters(), 1e-2)
    other.load_state_dict(update.state_dict())
    assert other.steps == 0 and other.optimizer.state_dict()["state"] == {}


def moment(state) -> dict:
    return state["optimizer"]["state"][2]


def group(state) -> dict:
    return state["optimizer"]["param_groups"][1]


FAULTS = {
    "half precision": (
        lambda s: moment(s).update(exp_avg=moment(s)["exp_avg"].half()),
        ValueError,
        "expected 'exp_avg' .* of torch.float32, got torch.float16",
    ),
    "integers": (
        lambda s: moment(s).update(exp_avg=moment(s)["exp_avg"].int()),
        ValueError,
        "int32",
    ),
    "nan": (lambda s: moment(s)["exp_avg"].fill_(torch.nan), ValueError, "'exp_avg' .* is finite"),
    "inf": (lambda s: moment(s)["exp_avg_sq"][:1].fill_(torch.inf), ValueError, "is finite"),
    "negative square": (
        lambda s: moment(s)["exp_avg_sq"].sub_(1),
        ValueError,
        "'exp_avg_sq' .* finite and at least 0",
    ),
    "negative step": (lambda s: moment(s)["step"].fill_(-1), ValueError, "'step' .* at least 0"),
    "step of another kind": (lambda s: moment(s).update(step="x"), TypeError, "'step' .* a number"),
    "no moment": (lambda s: moment(s).pop("exp_avg"), ValueError, r"has no \['exp_avg'\]"),
    "no state": (
        lambda s: s["optimizer"]["state"].pop(2),
        ValueError,
        "optimiser's state of 6 parameters, got it of 5",
    ),
    "state of nobody": (
        lambda s: s["optimizer"]["state"].update({99: moment(s)}),
        ValueError,
        "of the parameters 0 to 5",
    ),
    "no numbers": (lambda s: group(s).pop("params"), ValueError, "numbers of parameters"),
    "one number twice": (
        lambda s: group(s)["params"].__setitem__(0, group(s)["params"][1]),
        ValueError,
        "numbers of parameters",
    ),
    "no entries": (
        lambda s: s["optimizer"]["state"].update({2: 0.5}),
        ValueError,
        "entries by name",
    ),
    "rate": (lambda s: group(s).update(lr="x"), TypeError, "lr of .* 'encoder' must be a number"),
    "infinite rate": (lambda s: group(s).update(lr=torch.inf), ValueError, "lr .* must be finite"),
    "negative rate": (lambda s: group(s).update(lr=-1.0), ValueError, "lr .* at least 0, got -1"),
    "no rate": (lambda s: group(s).pop("lr"), ValueError, "lr of .* is missing"),
    "beta": (lambda s: group(s).update(betas=(0.9, "x")), TypeError, "betas .* a number, got 'x'"),
    "betas": (lambda s: group(s).update(betas=(0.9,)), ValueError, "betas .* must be 2 numbers"),
    "beta of 1": (lambda s: group(s).update(betas=(0.9, 1.0)), ValueError, r"betas .* \[0, 1\)"),
    "eps": (lambda s: group(s).update(eps=torch.nan), ValueError, "eps .* must be finite"),
    "flag": (lambda s: group(s).update(amsgrad="x"), TypeError, "amsgrad .* True, False or None"),
    "name": (lambda s: group(s).update(name="x"), ValueError, "name .* must be 'encoder', got 'x'"),
    "steps": (lambda s: s.update(steps=-1), ValueError, "steps must be at least 0, got -1"),
    "in a row": (
        lambda s: s.update(skipped_in_a_row=0.5),
        TypeError,
        "skipped_in_a_row must be an",
    ),
    "entries": (lambda s: s.pop("steps"), ValueError, "with the entries .* got"),
    "parameters": (lambda s: s.update(parameters=5), ValueError, "parts 5 learn"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_state_is_refused_and_changes_nothing(fault):
    damage, error, text = FAULTS[fault]
    update, _ = make_learned()
    other, _ = make_learned(seed=1, n=2)
    before, steps = snapshot(other), other.steps
    state = copy.deepcopy(update.state_dict())
    damage(state)
    with pytest.raises(error, match=text):
        other.load_state_dict(state)
    assert not changed(before, snapshot(other)) and other.steps == steps
    other.load_state_dict(update.state_dict())


@pytest.mark.parametrize(
    "kind",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, torch.tensor(0.1), amsgrad=True),
        lambda p: torch.optim.AdamW(p, 0.1),
        lambda p: torch.optim.RMSprop(p, 0.1, centered=True),
        lambda p: torch.optim.Adagrad(p, 0.1),
        lambda p: torch.optim.NAdam(p, 0.1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_of_any_optimiser_is_loaded(kind, dtype):
    """Also where parameters have another precision by now."""
    update, other = make()[0], make()[0]
    for one in (update, other):
        one.optimizer = kind(one.loss_module.parameters())
    update(make_slices())
    other.loss_module.to(dtype)
    other.load_state_dict(update.state_dict())
    for one, x in zip(
        other.optimizer.state_dict()["state"].values(),
        update.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert one.keys() == x.keys()
        for name in one:
            torch.testing.assert_close(one[name], x[name], check_dtype=False)


# --- ForeachSoftUpdate


def soft_updates(tau):
    """TorchRL's updater and ours on two equal losses."""
    torch.manual_seed(0)
    _, theirs = make()
    ours = copy.deepcopy(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        updater = SoftUpdate(theirs, eps=1.0)
        updater.eps = 1 - tau  # the constructor warns of a tau above 0.5
        return (theirs, updater), (ours, ForeachSoftUpdate(ours, tau=tau))


def disturb(loss):
    torch.manual_seed(1)
    for parameter in loss.value_network_params.values(True, True):
        parameter.data = parameter.data + torch.randn_like(parameter)  # of another storage


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_foreach_soft_update_is_torchrls(tau):
    pairs = soft_updates(tau)
    for _ in range(3):
        for loss, updater in pairs:
            disturb(loss)
            updater.step()
        targets = [loss.target_value_network_params for loss, _ in pairs]
        before = pairs[1][0].value_network_params
        for key, one in targets[0].items(True, True):
            torch.testing.assert_close(one, targets[1][key])
            assert torch.equal(targets[1][key], before[key]) or tau < 1


def test_foreach_soft_update_follows_parameters_that_change_their_type():
    _, (loss, updater) = soft_updates(1.0)
    updater.step()
    loss.double()
    disturb(loss)
    updater.step()
    for key, target in loss.target_value_network_params.items(True, True):
        torch.testing.assert_close(target, loss.value_network_params[key].data)
