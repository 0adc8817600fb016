"""What import-linter cannot see: which lines call Ray, what loads what, which names and calls are forbidden."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ("orchestrator", "actors", "jobs", "cluster")
TIERS = ("unit", "services", "ray", "chaos", "journeys")
VAGUE_NAMES = ("util", "manager", "handler", "helper")
HEAVY = (
    "ray",
    "torch",
    "sqlalchemy",
    "alembic",
    "psycopg",
    "mlflow",
    "redis",
    "pynvml",
    "hydra",
    "omegaconf",
    "pandas",
)


def modules(*folders: str) -> list[Path]:
    return sorted(
        path.relative_to(ROOT)
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "_application" not in path.parts
    )


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def dotted(node: ast.expr) -> str:
    """`a.b.c` for an attribute chain or a name; a chain that starts at an expression starts with `?`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def imports(module: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported dotted name with its line; `from a.b import c` gives `a.b.c`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def top_level_imports(module: ast.Module) -> Iterator[tuple[str, int]]:
    """Imports that run when the module is imported: not those in functions or under `if TYPE_CHECKING`."""
    waiting: list[ast.stmt] = list(module.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imports(node)
        elif isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            waiting += [child for child in ast.walk(node) if isinstance(child, (ast.Import, ast.ImportFrom))]


def calls(module: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(module) if isinstance(node, ast.Call))


def is_ray_call(call: ast.Call) -> bool:
    """`handle.method.remote(…)` or `ray.get(…)`; `ray.remote(…)` makes a class an actor and starts nothing."""
    name = dotted(call.func)
    return name in ("ray.get", "ray.wait") or (name.endswith(".remote") and name != "ray.remote")


def dangers(module: ast.AST) -> Iterator[tuple[str, int]]:
    """Calls that run code found in data, or hand a string to a shell."""
    unpickling = {
        f"{name}.{verb}" for name in ("pickle", "cloudpickle", "dill", "marshal") for verb in ("load", "loads")
    }
    forbidden = unpickling | {"joblib.load", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    forbidden |= {"eval", "exec", "os.system", "os.popen"}
    for call in calls(module):
        name = dotted(call.func)
        if name in forbidden:
            yield f"{name}()", call.lineno
        for keyword in call.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg, value) in (("shell", True), ("allow_pickle", True), ("weights_only", False)):
                yield f"{name}({keyword.arg}={value})", call.lineno
    for name, line in imports(module):
        if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "marshal", "shelve"):
            yield f"import {name}", line


def test_ray_is_called_only_in_actors_and_in_handles() -> None:
    allowed = {Path("orchestrator/execution/handles.py")}
    wrong = [
        f"{path}:{call.lineno}"
        for path in modules("orchestrator", "jobs", "cluster")
        if path not in allowed
        for call in calls(tree(path))
        if is_ray_call(call)
    ]
    assert wrong == [], "put the call into actors/ or orchestrator/execution/handles.py"


def test_pyarrow_fs_is_imported_only_by_store_and_backends() -> None:
    wrong = [
        f"{path}:{line}"
        for path in modules(*PROGRAM)
        if path.parts[:2] not in (("orchestrator", "store"), ("orchestrator", "backends"))
        for name, line in imports(tree(path))
        if f"{name}.".startswith("pyarrow.fs.")
    ]
    assert wrong == [], "open the file system through orchestrator.backends"


def test_services_import_nothing_heavy_at_the_top() -> None:
    """A handle lookup imports the actor's class in the caller."""
    light = {*sys.stdlib_module_names, "numpy", "pyarrow", "orchestrator"}
    wrong = [
        f"{path}:{line} {name}"
        for path in modules("orchestrator")
        if path.name == "service.py"
        for name, line in top_level_imports(tree(path))
        if name.split(".")[0] not in light
    ]
    assert wrong == [], "open it in __init__ through backends.open_*"


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps([n.partition('.')[0] for n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_services_loads_nothing_heavy() -> None:
    services = [path for path in modules("orchestrator") if path.name == "service.py"]
    names = [".".join(path.with_suffix("").parts) for path in services]
    assert names, "there is no service"
    assert loaded_by("\n".join(f"import {name}" for name in names)) & set(HEAVY) == set()


def test_importing_orchestrator_loads_nothing_heavy() -> None:
    assert loaded_by("import orchestrator") & set(HEAVY) == set()


def test_orchestrator_has_few_public_names() -> None:
    code = "import orchestrator\nprint(*[n for n in dir(orchestrator) if not n.startswith('_')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    names = [name for name in done.stdout.split() if name != "annotations"]
    assert len(names) <= 15, names


def test_every_part_of_the_library_has_its_layer() -> None:
    """A package that the contract does not name could import anything."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["id"] == "layers")
    named = {module.strip("() ") for layer in layers for module in re.split(r"[|:]", layer)}
    parts = {".".join(path.with_suffix("").parts[:2]) for path in modules("orchestrator") if path.name != "__init__.py"}
    assert parts - named == set()


@pytest.mark.parametrize("folder", [*PROGRAM, "tests"])
def test_names_say_what_is_inside(folder: str) -> None:
    vague = [
        str(path)
        for path in modules(folder)
        if any(word.rstrip("s") in VAGUE_NAMES for part in path.with_suffix("").parts for word in part.split("_"))
    ]
    assert vague == [], "name it after the thing in it"


@pytest.mark.parametrize("folder", PROGRAM)
def test_nothing_runs_code_found_in_data(folder: str) -> None:
    wrong = [f"{path}:{line} {what}" for path in modules(folder) for what, line in dangers(tree(path))]
    assert wrong == []


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import pickle", "import pickle"),
        ("pickle.loads(b'')", "pickle.loads()"),
        ("torch.load('x')", "torch.load()"),
        ("yaml.load('x')", "yaml.load()"),
        ("eval('1')", "eval()"),
        ("subprocess.run('ls', shell=True)", "subprocess.run(shell=True)"),
        ("numpy.load('x', allow_pickle=True)", "numpy.load(allow_pickle=True)"),
    ],
)
def test_the_search_for_dangerous_calls_finds_them(code: str, what: str) -> None:
    assert what in [found for found, _ in dangers(ast.parse(code))]


@pytest.mark.parametrize("code", ["model.eval()", "yaml.safe_load('x')", "subprocess.run(['ls'], shell=False)"])
def test_the_search_for_dangerous_calls_leaves_harmless_ones(code: str) -> None:
    assert list(dangers(ast.parse(code))) == []


def test_the_search_for_ray_calls_tells_a_start_from_a_declaration() -> None:
    found = [is_ray_call(call) for call in calls(ast.parse("ray.get(x); handle.push.remote(1); ray.remote(Tracker)"))]
    assert found == [True, True, False]


def test_every_module_annotates_lazily() -> None:
    """One form of annotation everywhere; a module that defines nothing has none."""
    trees = {str(path): tree(path) for path in modules(*PROGRAM)}
    wrong = [
        path for path, module in trees.items() if defines_something(module) and not any(map(is_future, module.body))
    ]
    assert wrong == [], "start with: from __future__ import annotations"


def defines_something(module: ast.Module) -> bool:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.AnnAssign)
    return any(isinstance(node, kinds) for node in ast.walk(module))


def is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


@pytest.mark.parametrize("folder", [*PROGRAM, "tests"])
def test_every_top_folder_explains_itself(folder: str) -> None:
    assert (ROOT / folder / "README.md").read_text().startswith("#")


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_has_tests(tier: str) -> None:
    assert list((ROOT / "tests" / tier).rglob("test_*.py"))
