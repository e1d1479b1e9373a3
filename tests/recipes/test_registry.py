"""Ids: modules that register them, packages that are missing, and what wrong ids get."""

import sys

import gymnasium
import pytest

from layeredrl_trl.recipes import RecipeError, make_env, registry
from layeredrl_trl.recipes.environments import max_episode_steps
from tests.extras import needs_dm_control, needs_gymnasium_robotics
from tests.recipes.odd_envs import EPISODE_LENGTH, odd


@pytest.mark.parametrize("module", ["", "tests.recipes.odd_envs:"])
def test_max_episode_steps_of_an_id_with_a_module(module):
    """Gymnasium's spec() knew no such ids, so that runs died in their evaluation."""
    assert max_episode_steps(f"{module}odd/Good-v3") == EPISODE_LENGTH
    assert max_episode_steps(f"{module}Old-v0") == 1000


def test_an_id_with_a_module_that_is_not_imported_yet(monkeypatch):
    monkeypatch.delitem(sys.modules, "tests.recipes.odd_envs")
    monkeypatch.delitem(gymnasium.registry, "odd/Good-v3")
    monkeypatch.delitem(gymnasium.registry, "Good-v0")
    env = make_env("tests.recipes.odd_envs:odd/Good-v3", num_envs=2)
    assert env.rollout(3)["observation"].shape == (2, 3, 2)


@needs_gymnasium_robotics
def test_a_maze_without_its_prefix(monkeypatch):
    """The package was imported for the prefix only, though it was installed."""
    monkeypatch.delitem(sys.modules, "gymnasium_robotics", raising=False)
    for env_id in [env_id for env_id in gymnasium.registry if "PointMaze" in env_id]:
        monkeypatch.delitem(gymnasium.registry, env_id)
    assert make_env("PointMaze_UMaze-v3").observation_spec["observation"].shape == (8,)


def test_what_a_package_prints_when_it_is_imported_is_not_shown(tmp_path, monkeypatch, capsys):
    """A notice of gymnasium_robotics was a second line beside an error."""
    (tmp_path / "printing_module.py").write_text("import sys; print('notice', file=sys.stderr)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERING", {"printing_module": ("Print",)})
    with pytest.raises(RecipeError):
        make_env("Printing-v0")
    assert sys.modules.pop("printing_module") and capsys.readouterr().err == ""


def test_other_ids_import_no_package(monkeypatch):
    imported = []
    monkeypatch.setattr(registry, "_import", imported.append)
    make_env("Pendulum-v1")
    assert imported == []
    with pytest.raises(RecipeError):
        make_env("Pendlum-v1")
    assert imported == ["gymnasium_robotics", "ale_py"]


@pytest.mark.parametrize(
    ("env_id", "error", "text"),
    [
        ("PointMaze_Moon-v1", None, r"not installed: pip install 'layeredrl_trl\[robotics\]'"),
        ("ALE/Moon-v1", None, "not installed: pip install ale-py"),
        ("PointMaze_Moon-v1", ValueError("two\nlines"), "is broken .ValueError.*two lines"),
        ("Pendlum-v1", ValueError("broken"), "similar: Pendulum-v1"),
    ],
)
def test_a_package_that_cannot_be_imported(env_id, error, text, monkeypatch):
    def import_module(name):
        raise error or ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(registry, "_import", import_module)
    with pytest.raises(RecipeError, match=text):
        make_env(env_id)


@pytest.mark.parametrize(
    ("env_id", "text"),
    [
        ("Pendlum-v1", "no environment 'Pendlum-v1'; similar: Pendulum-v1"),
        ("Pendulum-v0", "no environment 'Pendulum-v0'; similar: Pendulum-v1"),
        ("LunarLander-v2", "similar: LunarLander-v3"),
        ("Pendulum", "similar: Pendulum-v1"),
        ("Pendulum-v1 ", "similar: Pendulum-v1"),
        ("Pendulum-v1\0", r"no environment 'Pendulum-v1\\x00'"),
        ("Pendulum-v1\n", r"no environment 'Pendulum-v1\\n'"),
        ("", "no environment ''; an id looks like"),
        ("\0", "an id looks like"),
        ("../../x", "an id looks like"),
        ("x" * 100_000, "no environment 'xxx.*xxx'"),
        (":", "module '' of the id ':' cannot be one; an id looks like"),
        ("a:b:c", "module 'a:b' of the id 'a:b:c' cannot be one; an id looks like"),
        ("no_such_module:Pendulum-v1", "module 'no_such_module' .* is not found; .* PYTHONPATH"),
        ("tests.no_such_module:Pendulum-v1", "is not found"),
        (".odd_envs:Pendulum-v1", "cannot be imported .TypeError"),
        (odd("Nowhere"), "no environment 'tests.recipes.odd_envs:Nowhere-v0'"),
        (odd("Nothing"), "cannot be made .ValueError at odd_envs.py:.*two lines"),
        (odd("NoClass"), "cannot be made .AttributeError"),
        (odd("NoEnv"), "cannot be made .TypeError"),
        (odd("NoModule"), "needs a package that is not installed .*'no_such_module'.; install it"),
        (odd("Old"), "fails in its first steps"),
        (odd("Seedless"), "fails in its first steps"),
        (odd("Shapeless"), "fails in its first steps"),
        ("Blackjack-v1", "no observation made of vectors"),
        *(
            pytest.param(env_id, text, marks=needs_dm_control)
            for env_id, text in [
                ("dm_control/cartpole-swngup", "no task.*similar: dm_control/cartpole-swingup"),
                ("dm_control/cartpole-swingup-x", "no task"),
                ("dm_control/", "no task .*its domains are acrobot, .*, walker"),
                ("dm_control/../../x", "no task"),
                ("dm_control/lqr-lqr_2_1", "unbounded actions"),
            ]
        ),
    ],
)
def test_an_id_that_will_not_do(env_id, text):
    with pytest.raises(RecipeError, match=text) as error:
        make_env(env_id)
    assert str(error.value).startswith("env: ") and len(str(error.value)) < 800
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "body", ["raise RuntimeError('two\\nlines')", "raise SystemExit(3)", "def f(:", "import nope"]
)
def test_a_module_that_cannot_be_imported(body, tmp_path, monkeypatch):
    (tmp_path / "bad_module.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_module", raising=False)
    with pytest.raises(RecipeError, match=r"'bad_module' .* cannot be imported .*; mend"):
        make_env("bad_module:Pendulum-v1")


def test_an_old_version_that_needs_a_package_of_its_time():
    with pytest.raises(RecipeError, match=r"not installed .*; a newer version is Hopper-v5"):
        make_env("Hopper-v2")
