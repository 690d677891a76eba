"""What importing loads, and which module may know which."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import feature_cache

PACKAGE = Path(feature_cache.__file__).parent
LAYERS = [
    {"errors", "system"},
    {"command_errors", "forks", "hashing", "output_files", "units"},
    {"regions", "memo"},
    {"pooling"},
    {"spec", "movies"},
    {"augment", "backbones", "normalize", "pooling_torch"},
    {"key", "train_options"},
    {"store", "rounding"},
    {"explain"},
    {"engine"},
    {"recompute"},
    {"cache"},
    {"warm", "token_geometry", "doctor", "service", "batch"},
    {"dataset", "evaluation"},
    {"report"},
    {"trackastra"},
    {"cli"},
]
EXEMPT = {"testing", "__init__"}
EXAMINE = "from feature_cache.doctor import examine"
HEAVY = {"torch", "zarr", "timm", "transformers", "sam2", "trackastra", "tensorstore", "obstore"}


STEPS = {
    "from feature_cache.cli import app; app(['warm', '--help'], standalone_mode=False)": (
        HEAVY | {"numpy", "dask", "scipy", "jinja2", "imagecodecs"}
    ),
    "import feature_cache": {"torch", "zarr", "scipy", "trackastra", "timm"},
    "import feature_cache.cli": {"torch", "zarr", "jinja2", "imagecodecs"},
    "import feature_cache.backbones": {"torch", "zarr", "timm"},
    f"{EXAMINE}_backbone as look, list_backbones; [*map(look, list_backbones())]": HEAVY,
    f"{EXAMINE}_job as look; look('', ('trackastra', 'bench', 'remote'))": HEAVY,
    "import feature_cache.augment": {"torch", "zarr"},
    "import feature_cache.normalize": {"torch", "zarr"},
    "import feature_cache.store": {"torch", "timm", "trackastra"},
    "import feature_cache.cache, feature_cache.engine": {"timm", "trackastra"},
    "import feature_cache.backbones.efficientnet": {"timm"},
    "import feature_cache.report": {"jinja2", "timm", "trackastra"},
}
"""One after the other, and what none of them until then loads."""


def test_importing_is_light():
    code = "import json, sys\nfor step in json.loads(sys.argv[1]):\n    exec(step)\n"
    code += "    print('\\nloaded', *sys.modules)\n"
    command = [sys.executable, "-c", code, json.dumps([*STEPS])]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loaded = [line.split() for line in out.splitlines() if line.startswith("loaded ")]
    for (step, absent), modules in zip(STEPS.items(), loaded, strict=True):
        assert not absent & {*modules}, step


def test_all_public_names_exist_and_are_sorted_in_the_stub():
    names = feature_cache.__all__
    for name in names:
        assert getattr(feature_cache, name) is not None
    assert set(names) <= set(dir(feature_cache))
    with pytest.raises(AttributeError, match="no_such_name"):
        feature_cache.no_such_name  # noqa: B018


def imported_by(file: Path) -> set[str]:
    """Name the top modules of the package that a file imports when it runs or is type-checked."""
    depth = len(file.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("feature_cache"):
            found |= set((node.module or "").split(".")[1:2])
    return found


def test_imports_go_downward_only():
    rank = {name: level for level, names in enumerate(LAYERS) for name in names}
    for file in PACKAGE.rglob("*.py"):
        module = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module in EXEMPT:
            continue
        for other in imported_by(file) - {module}:
            assert rank[other] < rank[module], f"{module} imports {other}"


def module_imports() -> dict[str, set[str]]:
    """Which module of the package imports which, those for types alone and in functions too."""
    files = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file
        for file in PACKAGE.rglob("*.py")
        if file.name != "__init__.py"
    }
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            above = name.split(".")[: -node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            found[name] |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        found[name] &= files.keys()
    return found


def test_no_modules_import_each_other_in_a_circle():
    graph = module_imports()
    assert sum(map(len, graph.values())) > 500
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_no_two_files_and_no_two_public_classes_share_a_name():
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    assert [name for name, n in Counter(file.name for file in files).items() if n > 1] == []
    classes = Counter(
        node.name
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, n in classes.items() if n > 1] == []


def test_the_wings_never_see_each_other():
    for file in (PACKAGE / "store").glob("*.py"):
        assert not {"backbones", "engine"} & imported_by(file)
        assert "torch" not in file.read_text().replace("nothing of torch", "")
    for file in (PACKAGE / "backbones").glob("*.py"):
        assert not {"store", "cache", "engine"} & imported_by(file)


def test_only_one_package_imports_trackastra():
    def imports_it(node: ast.AST) -> bool:
        if isinstance(node, ast.ImportFrom):
            return not node.level and (node.module or "").split(".")[0] == "trackastra"
        return isinstance(node, ast.Import) and any(
            alias.name.split(".")[0] == "trackastra" for alias in node.names
        )

    users = {
        file.relative_to(PACKAGE).parts[0]
        for file in PACKAGE.rglob("*.py")
        if any(map(imports_it, ast.walk(ast.parse(file.read_text()))))
    }
    assert users == {"trackastra"}
