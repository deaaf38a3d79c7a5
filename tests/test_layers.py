"""The import direction of the package is a contract (asset/docs/architecture.md); this test is its guard."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sana"

# Each layer -> the sana layers (or single modules of them) that it may import. Anything absent is forbidden.
ALLOWED = {
    "utils": set(),
    "config": {"utils", "resolution"},  # checks the names of the aspect-ratio tables
    "resolution": {"utils"},
    "shapes": {"utils"},
    "ops": {"utils"},
    "diffusion": {"utils"},
    "metrics": {"utils", "shapes"},
    "data": {"utils", "shapes", "config", "resolution"},
    "models": {"utils", "ops"},
    "runtime": {"utils", "ops", "models"},
    "loading": {"utils", "config", "models"},
    "pipeline": {"utils", "config", "resolution", "models", "diffusion", "runtime", "loading"},
    "generation": {"utils", "config", "resolution", "data.prompts", "runtime", "pipeline"},
    "inference": {"utils", "config", "resolution", "data.prompts", "models", "runtime", "loading"},
    "evaluation": {"utils", "config", "shapes", "metrics", "data.prompts", "generation", "pipeline"},
    "serving": {"utils", "config", "resolution", "runtime", "pipeline", "generation"},
    "training": {
        *("utils", "config", "resolution", "shapes", "data", "models", "diffusion", "runtime"),
        *("loading", "pipeline", "generation", "evaluation"),
    },
}
ALLOWED["benchmarks"] = set(ALLOWED) | {"data"}  # they measure all of it
ENTRY_POINTS = {"app", "scripts", "tools", "train_scripts", "integrations", "tests"}
ENTRY_FOLDERS = [ROOT / name for name in ("app", "scripts", "tools", "train_scripts", "integrations")]
ENVIRONMENT_READER = PACKAGE / "utils" / "distributed.py"


def imported_modules(tree: ast.Module) -> set[str]:
    """Dotted names of everything that the code imports, lazy imports included; a relative one starts with a dot."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from sana import ops` names a module only through its alias.
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def layer_violations(layer: str, tree: ast.Module) -> list[str]:
    """What a file of `layer` imports and must not."""
    found = []
    for module in sorted(imported_modules(tree)):
        head, _, rest = module.partition(".")
        if not head:
            found.append(f"relative import {module}")
        elif head in ENTRY_POINTS:
            found.append(f"the entry point {module}")
        elif head == "sana" and rest != "__version__":
            allowed = ALLOWED[layer] | {layer}
            if not any(f"{rest}.".startswith(f"{name}.") for name in allowed):
                found.append(f"{module}; a file of {layer} may import {sorted(allowed)}")
    return found


def import_effects(tree: ast.Module) -> list[str]:
    """Statements that reach outside when the file is imported: a bare call, a write into another module's object."""
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    found = []
    for node in tree.body:
        outside = []
        if isinstance(node, ast.Assign):
            outside = [t for t in node.targets if isinstance(t, ast.Attribute | ast.Subscript)]
        elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            outside = [node.value.func if isinstance(node.value, ast.Call) else node.value]
        if any(ast.unparse(target).split(".")[0] not in classes for target in outside):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def environment_reads(tree: ast.Module) -> list[str]:
    """Uses of os.environ, os.getenv and their kin."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os")
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names})
    ]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def python_files(*folders: Path) -> list:
    paths = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


@pytest.mark.parametrize("path", python_files(PACKAGE))
def test_package_file(path):
    tree = parsed(path)
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer != "__init__":  # the package's own __init__ only names where its public names live
        assert layer in ALLOWED, (
            f"{layer} is in no layer: add it to ALLOWED, with its reason in architecture.md"
        )
        assert layer_violations(layer, tree) == []
    assert import_effects(tree) == []
    if path != ENVIRONMENT_READER:
        assert environment_reads(tree) == []


@pytest.mark.parametrize("path", python_files(*ENTRY_FOLDERS))
def test_entry_point_imports_no_other(path):
    modules = imported_modules(parsed(path))
    assert not [m for m in modules if m.split(".")[0] in ENTRY_POINTS | {""}], "a script imports a script"


def test_third_party_packages_are_declared():
    """A package that is only there because another one brings it may be gone tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    declared = {re.split(r"[><=;\[ ]", line)[0].lower().replace("_", "-") for line in requirements}
    providers = importlib.metadata.packages_distributions()
    undeclared = {}
    for parameter in python_files(PACKAGE, *ENTRY_FOLDERS, ROOT / "tests"):
        for module in imported_modules(parsed(parameter.values[0])):
            head = module.split(".")[0]
            names = {name.lower().replace("_", "-") for name in providers.get(head, [head])}
            ours = head in sys.stdlib_module_names or head == "sana" or head in ENTRY_POINTS
            if head and not ours and not names & declared:
                undeclared.setdefault(head, []).append(parameter.id)
    assert not undeclared


def test_planted_violations_are_caught():
    """The guard itself: one line of each forbidden kind."""
    planted = {
        "import sana.models.zoo": "diffusion",
        "from sana import models": "diffusion",
        "from sana.models.zoo import build_transformer": "data",
        "def f():\n    from sana.config import load_config": "models",
        "from sana.models import *": "metrics",
        "from ..models import zoo": "training",
        "from scripts.inference import main": "pipeline",
        "from sana import SanaPipeline": "models",
        "import sana": "models",
        "from sana.data.loader import batches": "generation",
    }
    for code, layer in planted.items():
        assert layer_violations(layer, ast.parse(code)), f"{code!r} passed in {layer}"
    permitted = {
        "from sana.data.prompts import read_prompts": "generation",
        "from sana import __version__": "models",
        "import sana.utils.hub": "config",
        "from sana.diffusion import flow": "diffusion",
    }
    for code, layer in permitted.items():
        assert not layer_violations(layer, ast.parse(code)), f"{code!r} failed in {layer}"
    for code in (
        "import os\nos.environ['A'] = '1'",
        "print('hello')",
        "torch.backends.cudnn.benchmark = True",
    ):
        assert import_effects(ast.parse(code)), code
    for code in ("os.environ.get('RANK')", "os.getenv('RANK')", "from os import environ"):
        assert environment_reads(ast.parse(code)), code


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("sana, sana.config, sana.resolution", {"torch", "numpy"}),
        ("sana.models.zoo, sana.diffusion.solvers", {"diffusers", "transformers", "accelerate", "gradio"}),
    ],
)
def test_light_parts_stay_light(modules, unwanted):
    """Command-line help must not wait for torch, nor the core for the libraries around it."""
    code = f"import sys, {modules}; print(*sorted({unwanted!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
