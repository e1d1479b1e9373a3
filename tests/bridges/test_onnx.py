"""ONNX models of a predictor's parts, run by onnxruntime, against the predictor itself."""

import importlib.util
import random
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from layeredrl_trl.bridges import export_onnx, from_layeredrl
from layeredrl_trl.modules import (
    Encoder,
    IdentityEncoder,
    ProbabilisticEnsemble,
    SymmetryBreakingStart,
)
from layeredrl_trl.predictors import StaticPredictor
from tests.bridges.layeredrl_modules import LayeredRLPredictor, Select
from tests.bridges.predictors_of_kinds import ACT, OBS, make_predictor
from tests.small_predictors import snapshot

onnxruntime = pytest.importorskip("onnxruntime")


def started(model):
    start = SymmetryBreakingStart(model, 100)
    start.advance(75)  # half learned, half random
    return start


def layeredrl():
    theirs = LayeredRLPredictor(Select([*range(OBS)], []), OBS, 0, ACT, value=None)
    return from_layeredrl(theirs.state_dict(), ACT, IdentityEncoder(OBS))


KINDS = {
    "identity, E = M = 1": (lambda: make_predictor("identity", 1, 1, value=None), False),
    "linear, E = 3, M = 2": (
        lambda: make_predictor("linear", 3, 2, condition_on_context=True, value="q"),
        False,
    ),
    "mlp, indices": (lambda: make_predictor("mlp", 2, 1, bootstrap=True), True),
    "start": (
        lambda: make_predictor("select", 2, 2, value=None, reward=False, wrap=started),
        False,
    ),
    "networks of layeredrl": (layeredrl, False),
}


SLOW = ("start", "networks of layeredrl")
CASES = [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in KINDS]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function from a kind to the predictor and a function that runs a part of it in ONNX."""

    @cache
    def export(kind):
        torch.manual_seed(0)
        make, indices = KINDS[kind]
        predictor = make()
        paths = export_onnx(predictor, tmp_path_factory.mktemp("onnx"), action_indices=indices)
        options = {"providers": ["CPUExecutionProvider"]}
        sessions = {k: onnxruntime.InferenceSession(p, **options) for k, p in paths.items()}

        def run(part, **inputs):
            session = sessions[part]
            feed = {x.name: inputs[x.name].numpy() for x in session.get_inputs()}
            names = [x.name for x in session.get_outputs()]
            return dict(zip(names, map(torch.from_numpy, session.run(None, feed)), strict=True))

        return predictor.eval(), sessions, run

    return export


def examples(predictor, n, indices):
    act = torch.randint(ACT, (n,)) if indices else torch.randn(n, ACT)
    return torch.randn(n, OBS) * 2, act


# ---- contract


@pytest.mark.parametrize("kind", CASES)
def test_names_and_shapes(exported, kind):
    predictor, sessions, _ = exported(kind)
    model, indices = predictor.model, KINDS[kind][1]
    D, C, E, M = (
        model.latent_state_dim,
        model.context_dim,
        model.n_models,
        model.n_modes,
    )
    state, action = {"latent": [D], "context": [C]}, {"action": [] if indices else [ACT]}
    mixture = {"s_mean": [E, M, D], "weights": [E, M], "s_std": [E, M, D], "term_prob": []}
    expected = {
        "encoder": ({"observation": [OBS]}, state),
        "dynamics": (state | action, mixture),
    }
    if predictor.rew_func is not None:
        expected["reward"] = (state | action, {"reward": []})
    if predictor.val_func is not None:
        is_q = "action" in predictor.val_func.in_keys
        expected["value"] = (state | action if is_q else state, {"value": []})
    assert sessions.keys() == expected.keys()
    for name, session in sessions.items():
        for ends, shapes in zip(
            (session.get_inputs(), session.get_outputs()), expected[name], strict=True
        ):
            assert {x.name: x.shape[1:] for x in ends} == shapes, name
            assert all(isinstance(x.shape[0], str) for x in ends)  # any number of rows
            kinds = {x.name: x.type for x in ends}
            assert kinds.pop("action", "") in ("", f"tensor({'int64' if indices else 'float'})")
            assert set(kinds.values()) <= {"tensor(float)"}


# ---- oracle


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_predicts_what_the_predictor_does(exported, kind, n):
    predictor, sessions, run = exported(kind)
    obs, act = examples(predictor, n, KINDS[kind][1])
    with torch.no_grad():
        latent, context = predictor.encode(obs)
        mean, weights, std, reward, term_prob = predictor.predict(obs, act)
    expected = {
        "encoder": {"latent": latent, "context": context},
        "dynamics": {"s_mean": mean, "weights": weights, "s_std": std, "term_prob": term_prob},
        "reward": {"reward": reward},
    }
    if predictor.val_func is not None:
        expected["value"] = {"value": predictor.value(obs, act).detach()}
    for name in sessions:
        got = run(name, observation=obs, latent=latent, context=context, action=act)
        assert got.keys() == expected[name].keys()
        for key, x in expected[name].items():
            torch.testing.assert_close(
                got[key], x, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: k + m
            )


def test_a_rollout_of_many_steps(exported):
    predictor, _, run = exported("linear, E = 3, M = 2")
    obs, actions = torch.randn(4, OBS), torch.randn(6, 4, ACT)
    state = run("encoder", observation=obs)
    latent, context = predictor.encode(obs)
    for action in actions:
        out = run("dynamics", action=action, **state)
        mean = (out["s_mean"] * out["weights"].unsqueeze(-1)).sum(2).mean(1)
        state = {"latent": mean, "context": state["context"]}
        with torch.no_grad():
            mean, weights, *_ = predictor.model.predict(latent, context, action)
        latent = (mean * weights.unsqueeze(-1)).sum(2).mean(1)
    torch.testing.assert_close(state["latent"], latent, rtol=1e-4, atol=1e-5)


# ---- nothing changes


def test_the_predictor_stays_as_it_is_and_files_are_replaced(tmp_path):
    folder = tmp_path / "of" / "models"
    predictor = make_predictor("linear", 2, 1, value=None, reward=False)
    predictor.model.net.eval()  # modes of parts, too
    modes = [part.training for part in predictor.modules()]
    wants = [p.requires_grad for p in predictor.parameters()]
    before = snapshot(predictor)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    paths = export_onnx(predictor, str(folder))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert [part.training for part in predictor.modules()] == modes
    assert [p.requires_grad for p in predictor.parameters()] == wants
    for name, x in snapshot(predictor).items():
        assert torch.equal(x, before[name]), name

    assert paths == {name: folder / f"{name}.onnx" for name in ("encoder", "dynamics")}
    first = paths["dynamics"].read_bytes()
    predictor.model.net.biases[0].data.fill_(3.0)
    assert export_onnx(predictor, folder) == paths
    assert paths["dynamics"].read_bytes() != first
    assert {path.name for path in folder.iterdir()} == {"encoder.onnx", "dynamics.onnx"}


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"predictor": nn.Linear(1, 1)}, TypeError, "predictor: expected a Predictor, got Linear"),
        ({"folder": None}, TypeError, "folder: expected a path, got NoneType"),
        ({"folder": __file__}, FileExistsError, "is a file"),
        ({"action_indices": 1}, TypeError, "action_indices must be True or False"),
    ],
    ids=["predictor", "folder", "file", "flag"],
)
def test_bad_arguments(change, error, text, tmp_path):
    arguments = {"predictor": make_predictor(), "folder": tmp_path / "models"} | change
    with pytest.raises(error, match=f"export_onnx: .*{text}"):
        export_onnx(arguments.pop("predictor"), arguments.pop("folder"), **arguments)
    assert not (tmp_path / "models").exists()


def test_continuous_actions_have_no_indices(tmp_path):
    parts = ProbabilisticEnsemble(OBS, 0, 1), None, None, IdentityEncoder(OBS)
    with pytest.raises(ValueError, match="action_indices is set, but the actions are continuous"):
        export_onnx(StaticPredictor(*parts, OBS, 0), tmp_path, action_indices=True)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "layeredrl_trl.bridges.onnx.find_spec", lambda name: None if name == package else real(name)
    )
    with pytest.raises(
        ModuleNotFoundError, match=rf"needs {package}: pip install 'layeredrl_trl\["
    ):
        export_onnx(make_predictor(), tmp_path)


class OneBatchSize(Encoder):
    """An encoder of a user that counts rows in Python."""

    def __init__(self):
        super().__init__(OBS, OBS, 0)

    def embed(self, observation):
        return observation / len(observation), observation[..., :0]


def test_a_part_for_one_batch_size_is_refused_and_nothing_written(tmp_path):
    parts = ProbabilisticEnsemble(OBS, 0, ACT), None, None, OneBatchSize()
    folder = tmp_path / "models"
    with pytest.raises(ValueError, match=r"the encoder \(OneBatchSize\) cannot be traced for batc"):
        export_onnx(StaticPredictor(*parts, OBS, 0), folder)
    assert not folder.exists()
