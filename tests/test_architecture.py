"""The import rules of the house: a file imports only from the floors below its own.

No file imports from a test file: what tests share is in a helper module.

The rules are read off the source, nothing is imported. Each rule is a function that takes the
folder of a package and gives one line per breach, so that it can be tried on samples that break it.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "layeredrl_trl"
TESTS = Path(__file__).parent

# The floors from the ground up. Places on one floor are neighbours and do not import each other.
# The command line stands on the recipes it runs, and the package's own names on everything.
FLOORS = (
    ("checks", "functional", "keys", "ranks", "schedules", "signatures"),
    ("acceleration",),
    ("modules", "data"),
    ("objectives",),
    ("envs",),
    ("predictors",),
    ("planners", "diagnostics", "checkpoints", "bridges"),
    ("trainers",),
    ("recipes",),
    ("__main__",),
    ("__init__",),
)
FLOOR_OF = {place: floor for floor, places in enumerate(FLOORS, start=1) for place in places}

# What functional/ may import beside itself and the standard library.
PURE_MATHS = {"torch"}

# Only acceleration/ asks whether it is being compiled or recorded, or what can be read for nothing.
QUESTIONS = {
    "can_read",
    "is_compiling",
    "is_cuda",
    "is_current_stream_capturing",
    "without_reading",
}

TORCHRL_NAMES = {
    "CEMPlanner",
    "ImaginedEnv",
    "MPPIPlanner",
    "WorldModel",
    "WorldModelEnv",
    "WorldModelLoss",
}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class Import(NamedTuple):
    """One imported module: its line, its full dotted name, its file if it is the package's own."""

    line: int
    module: str
    file: Path | None


def files_of(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def place_of(package: Path, file: Path) -> str:
    """The folder of the package that a file is in, or the name of a file of no folder."""
    return file.relative_to(package).with_suffix("").parts[0]


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def find_module(package: Path, module: str) -> Path | None:
    """The file of a module of the package by its dotted name, None for anything else."""
    base = package.parent.joinpath(*module.split("."))
    if base != package and package not in base.parents:
        return None
    candidates = (base / "__init__.py", base.with_suffix(".py"))
    return next((file for file in candidates if file.is_file()), None)


def absolute_name(package: Path, file: Path, node: ast.ImportFrom) -> str:
    """The dotted name that `from X import ...` means by X, relative dots resolved."""
    if not node.level:
        return node.module or ""
    folder = file.parents[node.level - 1].relative_to(package.parent)
    return ".".join([*folder.parts, *filter(None, [node.module])])


def imports_of(package: Path, file: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands.

    In `from X import y`, y is a module if there is such a file, else a name inside X.
    """
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, find_module(package, alias.name))
        elif isinstance(node, ast.ImportFrom):
            source = absolute_name(package, file, node)
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                found = find_module(package, submodule)
                if found:
                    yield Import(node.lineno, submodule, found)
                else:
                    yield Import(node.lineno, source, find_module(package, source))


def is_own(package: Path, imported: Import) -> bool:
    return imported.module.split(".")[0] == package.name


def unplaced(package: Path, file: Path) -> list[str]:
    """Files in no place that the table of floors knows."""
    place = place_of(package, file)
    return [] if place in FLOOR_OF else [f"{place} is on no floor"]


def upward_imports(package: Path, file: Path) -> list[str]:
    """Imports from the own floor or above, other than from the own folder."""
    own = place_of(package, file)
    breaches = []
    for imported in imports_of(package, file):
        if imported.file is None:
            if is_own(package, imported):
                breaches.append(f"line {imported.line}: there is no {imported.module}")
            continue
        place = place_of(package, imported.file)
        if place == own and imported.file.parent != package:
            continue
        if FLOOR_OF.get(place, len(FLOORS)) >= FLOOR_OF.get(own, 0):
            breaches.append(f"line {imported.line}: {own} imports {imported.module}")
    return breaches


def hidden_imports(package: Path, file: Path) -> list[str]:
    """Imports inside a function."""
    lines = {
        inner.lineno
        for function in ast.walk(parse(file))
        if isinstance(function, FUNCTIONS)
        for inner in ast.walk(function)
        if isinstance(inner, (ast.Import, ast.ImportFrom))
    }
    return [f"line {line}: import inside a function" for line in sorted(lines)]


def impure_imports(package: Path, file: Path) -> list[str]:
    """Imports of functional/ that are neither torch, the standard library nor its own."""
    if place_of(package, file) != "functional":
        return []
    allowed = PURE_MATHS | sys.stdlib_module_names
    return [
        f"line {imported.line}: functional imports {imported.module}"
        for imported in imports_of(package, file)
        if not is_own(package, imported) and imported.module.split(".")[0] not in allowed
    ]


def reused_names(package: Path, file: Path) -> list[str]:
    """Classes that bear a name of TorchRL's."""
    return [
        f"line {node.lineno}: {node.name} is a class of TorchRL"
        for node in ast.walk(parse(file))
        if isinstance(node, ast.ClassDef) and node.name in TORCHRL_NAMES
    ]


def questions_of_speed(package: Path, file: Path) -> list[str]:
    """Places outside of acceleration/ that ask how they are being run."""
    if place_of(package, file) == "acceleration":
        return []
    return [
        f"line {node.lineno}: {name} is for acceleration/ to ask"
        for node in ast.walk(parse(file))
        for name in _names_in(node)
        if name in QUESTIONS
    ]


def _names_in(node: ast.AST) -> list[str]:
    """The names that a piece of code uses: as such, as an attribute, imported, or as a string."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
            return [name]
        case ast.alias(name=name, asname=other):
            return [*name.split("."), *filter(None, [other])]
    return []


def inits_that_do_more(package: Path, file: Path) -> list[str]:
    """Statements of an `__init__` beside docstring, imports, `__all__` and `__version__`."""
    if file.name != "__init__.py":
        return []
    return [
        f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}"
        for position, node in enumerate(parse(file).body)
        if not _belongs_in_init(node, position)
    ]


def _belongs_in_init(node: ast.stmt, position: int) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom():
            return True
        case ast.Expr(value=ast.Constant(value=str())):
            return position == 0
        case ast.Assign(targets=[ast.Name(id="__all__" | "__version__")]):
            return True
    return False


def imports_of_tests(package: Path, file: Path) -> list[str]:
    """Imports from a test file."""
    return [
        f"line {imported.line}: {imported.module} is a test file"
        for imported in imports_of(package, file)
        if imported.file is not None and imported.file.name.startswith("test_")
    ]


def cycles(package: Path) -> list[str]:
    """A cycle of files that import each other, if there is one."""
    graph = {
        file: {imported.file for imported in imports_of(package, file) if imported.file}
        for file in files_of(package)
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(file.relative_to(package).as_posix() for file in error.args[1])]
    return []


FILE_RULES = (
    unplaced,
    upward_imports,
    hidden_imports,
    impure_imports,
    reused_names,
    questions_of_speed,
    inits_that_do_more,
)


@pytest.mark.parametrize(
    "file", files_of(PACKAGE), ids=lambda file: file.relative_to(PACKAGE).as_posix()
)
@pytest.mark.parametrize("rule", FILE_RULES, ids=lambda rule: rule.__name__)
def test_file_keeps_the_rule(rule, file):
    assert rule(PACKAGE, file) == []


@pytest.mark.parametrize(
    "file", files_of(TESTS), ids=lambda file: file.relative_to(TESTS).as_posix()
)
def test_what_tests_share_is_in_no_test_file(file):
    assert imports_of_tests(TESTS, file) == []


def test_no_import_cycles():
    assert cycles(PACKAGE) == []


# The rules themselves, on samples.


@pytest.fixture
def make_package(tmp_path):
    """A function that writes files, given by path and text, as a package and gives its folder."""

    def make(files: dict[str, str]) -> Path:
        package = tmp_path / "layeredrl_trl"
        for name, text in files.items():
            file = package / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return package

    return make


def breaches(package: Path) -> dict[str, list[str]]:
    """All breaches by the name of their rule."""
    found = {
        rule.__name__: [line for file in files_of(package) for line in rule(package, file)]
        for rule in (*FILE_RULES, imports_of_tests)
    }
    found["cycles"] = cycles(package)
    return {rule: lines for rule, lines in found.items() if lines}


def test_sample_that_keeps_the_rules(make_package):
    package = make_package(
        {
            "__init__.py": '"""Doc."""\n\nfrom .modules import Net\n\n__all__ = ["Net"]\n',
            "__main__.py": "from layeredrl_trl.recipes import main\n\nmain()\n",
            "keys.py": 'LATENT = "latent"\n',
            "functional/__init__.py": "from .maths import f\n",
            "functional/maths.py": "import math\n\nimport torch.nn.functional as F\n\nf = F.mish\n",
            "acceleration/__init__.py": "from .reads import can_read\n",
            "acceleration/reads.py": "import torch\n"
            "def can_read(x): return not (x.is_cuda or torch.compiler.is_compiling())\n",
            "modules/__init__.py": "from layeredrl_trl.modules.net import Net\n",
            "modules/mlp.py": '"""Not is_cuda."""\nimport numpy\nfrom layeredrl_trl import keys\n'
            "from layeredrl_trl.acceleration import check\nMLP = keys.is_cuda_too\n",
            "modules/net.py": "from ..functional import f\nfrom .mlp import MLP\nclass Net: ...\n",
            "recipes/__init__.py": "from .train import main\n",
            "recipes/train.py": "import layeredrl_trl.modules\ndef main(): ...\n",
        }
    )
    assert breaches(package) == {}


@pytest.mark.parametrize(
    ("rule", "files", "breach"),
    [
        pytest.param(
            "unplaced", {"utils/a.py": ""}, "utils is on no floor", id="folder-on-no-floor"
        ),
        pytest.param(
            "unplaced", {"helpers.py": ""}, "helpers is on no floor", id="file-on-no-floor"
        ),
        pytest.param(
            "upward_imports",
            {"modules/a.py": "import os\nfrom layeredrl_trl.envs.b import c", "envs/b.py": "c = 1"},
            "line 2: modules imports layeredrl_trl.envs.b",
            id="floor-above",
        ),
        pytest.param(
            "upward_imports",
            {"modules/a.py": "from ..envs import b", "envs/b.py": ""},
            "line 1: modules imports layeredrl_trl.envs.b",
            id="floor-above-relative",
        ),
        pytest.param(
            "upward_imports",
            {"modules/a.py": "import layeredrl_trl.envs.b as c", "envs/b.py": ""},
            "line 1: modules imports layeredrl_trl.envs.b",
            id="floor-above-renamed",
        ),
        pytest.param(
            "upward_imports",
            {"modules/a.py": "from ..data.b import c", "data/b.py": "c = 1"},
            "line 1: modules imports layeredrl_trl.data.b",
            id="neighbour",
        ),
        pytest.param(
            "upward_imports",
            {"functional/a.py": "from layeredrl_trl.keys import c", "keys.py": "c = 1"},
            "line 1: functional imports layeredrl_trl.keys",
            id="neighbour-on-the-ground",
        ),
        pytest.param(
            "upward_imports",
            {"envs/a.py": "from layeredrl_trl import Net", "__init__.py": ""},
            "line 1: envs imports layeredrl_trl",
            id="the-package-itself",
        ),
        pytest.param(
            "upward_imports",
            {
                "envs/a.py": "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n    from ..recipes.b import c",
                "recipes/b.py": "c = 1",
            },
            "line 3: envs imports layeredrl_trl.recipes.b",
            id="floor-above-for-types-only",
        ),
        pytest.param(
            "upward_imports",
            {"envs/a.py": "from layeredrl_trl.gone import c"},
            "line 1: there is no layeredrl_trl.gone",
            id="nothing-there",
        ),
        pytest.param(
            "hidden_imports",
            {"envs/a.py": "class A:\n    async def f(self):\n        import torch"},
            "line 3: import inside a function",
            id="import-in-a-method",
        ),
        pytest.param(
            "impure_imports",
            {"functional/a.py": "import torch, numpy.linalg"},
            "line 1: functional imports numpy.linalg",
            id="numpy-in-functional",
        ),
        pytest.param(
            "impure_imports",
            {"functional/a.py": "from tensordict import TensorDict"},
            "line 1: functional imports tensordict",
            id="tensordict-in-functional",
        ),
        pytest.param(
            "reused_names",
            {"planners/a.py": "class CEMPlanner: ..."},
            "line 1: CEMPlanner is a class of TorchRL",
            id="name-of-torchrl",
        ),
        pytest.param(
            "inits_that_do_more",
            {"envs/__init__.py": '"""Doc."""\nfrom os import path\ndef f(): ...'},
            "line 3: def f():",
            id="function-in-init",
        ),
        pytest.param(
            "inits_that_do_more",
            {"envs/__init__.py": "import os\nHERE = os.getcwd()"},
            "line 2: HERE = os.getcwd()",
            id="constant-in-init",
        ),
        pytest.param(
            "questions_of_speed",
            {"modules/a.py": "import torch\n\nA = 2 if torch.compiler.is_compiling() else 1"},
            "line 3: is_compiling is for acceleration/ to ask",
            id="asks-whether-it-is-compiled",
        ),
        pytest.param(
            "questions_of_speed",
            {"envs/a.py": "import torch\nA = torch.cuda.is_current_stream_capturing"},
            "line 2: is_current_stream_capturing is for acceleration/ to ask",
            id="asks-whether-it-is-recorded",
        ),
        pytest.param(
            "questions_of_speed",
            {"functional/a.py": "def f(x):\n    return x.sum() if x.is_cuda else x"},
            "line 2: is_cuda is for acceleration/ to ask",
            id="asks-for-the-device",
        ),
        pytest.param(
            "questions_of_speed",
            {"functional/a.py": "def f(x):\n    return getattr(x, 'is_cuda')"},
            "line 2: is_cuda is for acceleration/ to ask",
            id="asks-by-a-string",
        ),
        pytest.param(
            "questions_of_speed",
            {
                "acceleration/reads.py": "can_read = 1",
                "data/a.py": "from layeredrl_trl.acceleration.reads import can_read as can",
            },
            "line 1: can_read is for acceleration/ to ask",
            id="imports-the-question",
        ),
        pytest.param(
            "questions_of_speed",
            {
                "acceleration/reads.py": "without_reading = 1",
                "planners/a.py": "from layeredrl_trl.acceleration import reads\n"
                "with reads.without_reading():\n    A = 1",
            },
            "line 2: without_reading is for acceleration/ to ask",
            id="forbids-reading",
        ),
        pytest.param(
            "upward_imports",
            {"acceleration/a.py": "from ..modules import b", "modules/b.py": ""},
            "line 1: acceleration imports layeredrl_trl.modules.b",
            id="acceleration-that-knows-what-it-speeds-up",
        ),
        pytest.param(
            "imports_of_tests",
            {
                "envs/test_a.py": "from layeredrl_trl.envs.test_b import c",
                "envs/test_b.py": "c = 1",
            },
            "line 1: layeredrl_trl.envs.test_b is a test file",
            id="test-that-imports-from-a-test",
        ),
        pytest.param(
            "imports_of_tests",
            {"envs/a.py": "import os\nfrom . import test_b", "envs/test_b.py": ""},
            "line 2: layeredrl_trl.envs.test_b is a test file",
            id="helper-that-imports-a-test",
        ),
        pytest.param(
            "cycles",
            {"envs/a.py": "from .b import c", "envs/b.py": "from . import a\nc = 1"},
            "envs/a.py <- envs/b.py <- envs/a.py",
            id="two-files-in-a-circle",
        ),
        pytest.param(
            "cycles",
            {
                "envs/__init__.py": "from .a import b",
                "envs/a.py": "from layeredrl_trl.envs import c",
            },
            "envs/__init__.py <- envs/a.py <- envs/__init__.py",
            id="file-that-imports-its-own-folder",
        ),
    ],
)
def test_sample_that_breaks_a_rule(make_package, rule, files, breach):
    found = breaches(make_package(files))
    assert list(found) == [rule]
    assert found[rule] == [breach]
