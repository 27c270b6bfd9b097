"""The layout holds: imports point one way, the root folders load under one name only, the metadata is right."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import lift_lightning

ROOT = Path(__file__).parents[1]

# A module may import modules of its own level and below. The longest matching prefix counts, so that a folder has one
# entry and a file in it may have its own. A new file needs a line here: that is the moment to think where it belongs.
LEVELS = {
    # 0: torch and the standard library only
    "lift_lightning.lowrank": 0,
    "lift_lightning.subspace": 0,
    "lift_lightning.threads": 0,
    "lift_lightning.indices": 0,
    "lift_lightning.functional": 0,
    "lift_lightning.errors": 0,
    "lift_lightning.prompts": 0,
    "lift_lightning.collate": 0,
    "lift_lightning.configs": 0,
    "lift_lightning.losses": 0,
    "lift_lightning.monitoring": 0,
    "lift_lightning.rng": 0,
    "lift_lightning.evaluation.scoring": 0,
    "lift_lightning.evaluation.tasks": 0,
    "lift_lightning.selection_config": 1,
    "lift_lightning.criteria": 1,
    "lift_lightning.allocation": 1,
    "lift_lightning.selection": 1,
    "lift_lightning.plan": 1,
    "lift_lightning.param_groups": 1,
    "lift_lightning.sharding": 1,
    "lift_lightning.eight_bit": 1,
    "lift_lightning.sparse_state": 1,
    "lift_lightning.optimizer": 2,
    "lift_lightning.gradients": 2,
    "lift_lightning.shares": 2,
    "lift_lightning.schedules": 2,
    "lift_lightning.reduction": 2,
    "lift_lightning.refresh": 2,
    "lift_lightning.summary": 2,
    "lift_lightning.delta": 2,
    "lift_lightning.delta.coding": 0,
    "lift_lightning.delta.bits": 0,
    "lift_lightning.adapters": 2,
    "lift_lightning.models": 2,
    "lift_lightning.inference": 2,
    "lift_lightning.weight_files": 2,
    "lift_lightning.evaluation": 2,
    "lift_lightning.analysis": 2,
    # 3: Lightning from here up
    "lift_lightning.strategies": 3,
    "lift_lightning.support": 3,
    "lift_lightning.rivals": 3,
    "lift_lightning.module": 3,
    "lift_lightning.callbacks": 3,
    "lift_lightning.datamodules": 3,
    "lift_lightning.quickstart": 3,
    # What stands above the parts: the command line and the tools beside it
    "lift_lightning.quickstart.run": 4,
    "lift_lightning.quickstart.compare": 4,
    "lift_lightning.quickstart.methods": 4,
    "lift_lightning.quickstart.__main__": 4,
    "lift_lightning.cli": 4,
    "lift_lightning.export": 4,
    "lift_lightning.evaluate": 4,
    "lift_lightning.humaneval": 4,
    "lift_lightning.perplexity": 4,
    "lift_lightning.predict": 4,
    "lift_lightning.sweep": 4,
    "lift_lightning.__main__": 4,
    "lift_lightning.show_data": 4,
    "lift_lightning.consolidate": 4,
    "lift_lightning.delta_commands": 4,
    "lift_lightning.analyze_commands": 4,
    "main": 4,
}
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
ONLY_DISTRIBUTED = "lift_lightning.sharding"

# Where the package's folders lie, as in pyproject.toml.
FOLDERS = {
    "lift_lightning": ROOT / "lift_lightning",
    "lift_lightning.callbacks": ROOT / "callbacks",
    "lift_lightning.datamodules": ROOT / "datamodules",
    "lift_lightning.configs": ROOT / "configs",
}


def source_files() -> dict[str, Path]:
    """Every module of the project by its installed name; a package stands for its __init__.py."""
    found = {"main": ROOT / "main.py"} if (ROOT / "main.py").exists() else {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [*package.split("."), *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = source_files()


def level(module: str) -> int | None:
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((LEVELS[prefix] for prefix in prefixes if prefix in LEVELS), None)


def without_type_checking(tree: ast.AST) -> list[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`, which never run."""
    nodes, queue = [], [tree]
    while queue:
        node = queue.pop()
        nodes.append(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            queue += node.orelse
        else:
            queue += ast.iter_child_nodes(node)
    return nodes


def imported(nodes: list[ast.AST], module: str, *, is_package: bool) -> set[str]:
    """Dotted names that the nodes import, relative ones resolved; `from a import b` counts as a.b."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                drop = node.level - 1 if is_package else node.level
                parts = module.split(".")
                base = ".".join([*parts[: len(parts) - drop], *([base] if base else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def broken_rules(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What the source of one module does that its level does not allow, one line each."""
    own = level(module)
    if own is None:
        return [f"{module} has no level: add it to LEVELS"]
    may_distribute = f"{module}.".startswith(f"{ONLY_DISTRIBUTED}.")
    tree = ast.parse(source)
    running = without_type_checking(tree)
    broken = []
    for name in sorted(imported(list(ast.walk(tree)), module, is_package=is_package)):
        if name.split(".")[0] != "lift_lightning" or name.startswith("lift_lightning.__"):
            continue
        other = level(name)
        if other is None:
            broken.append(f"{module} imports {name}: name the module that defines it, or add it to LEVELS")
        elif other > own:
            broken.append(f"{module} (level {own}) imports {name} (level {other})")
    for name in sorted(imported(running, module, is_package=is_package)):
        top = name.split(".")[0]
        if own == 0 and top not in {"torch", "numpy", "lift_lightning", "__future__", *sys.stdlib_module_names}:
            broken.append(f"{module} (level 0) imports {name}: torch, numpy and the standard library only")
        elif own < 3 and top in LIGHTNING:
            broken.append(f"{module} (level {own}) imports {name}: Lightning starts at level 3")
        if f"{name}.".startswith("torch.distributed.") and not may_distribute:
            broken.append(f"{module} imports {name}: only {ONLY_DISTRIBUTED} may")
    uses = {ast.unparse(node) for node in running if isinstance(node, ast.Attribute)}
    if not may_distribute and "torch.distributed" in uses:
        broken.append(f"{module} uses torch.distributed: only {ONLY_DISTRIBUTED} may")
    return broken


# The package's own __init__ is exempt: it exports names of every level, each loaded at its first use.
@pytest.mark.parametrize("module", sorted(set(MODULES) - {"lift_lightning"}))
def test_imports_point_one_way(module: str):
    path = MODULES[module]
    assert broken_rules(module, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("lift_lightning.brand_new", "", "no level"),
        ("lift_lightning.indices", "import scipy", "standard library only"),
        ("lift_lightning.indices", "def f():\n    from transformers import AutoModel", "standard library only"),
        ("lift_lightning.indices", "from lift_lightning.selection import select", "(level 1)"),
        ("lift_lightning.indices", "from . import selection", "(level 1)"),
        ("lift_lightning.indices", "from lift_lightning import selection", "(level 1)"),
        ("lift_lightning.indices", "from lift_lightning import SparseAdamW", "name the module"),
        ("lift_lightning.evaluation.metrics", "from ..module import LiftLightningModule", "(level 3)"),
        ("lift_lightning.evaluation", "from .. import cli", "(level 4)"),
        ("lift_lightning.optimizer", "import lightning.pytorch as pl", "starts at level 3"),
        ("lift_lightning.callbacks.mask_refresh", "from lift_lightning.cli import main", "(level 4)"),
        ("lift_lightning.callbacks.mask_refresh", "from torch import distributed", "lift_lightning.sharding may"),
        ("lift_lightning.module", "from torch.distributed.tensor import DTensor", "lift_lightning.sharding may"),
        ("lift_lightning.module", "import torch\ntorch.distributed.barrier()", "lift_lightning.sharding may"),
        (
            "lift_lightning.indices",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .module import X",
            "(level 3)",
        ),
    ],
)
def test_the_import_rules_can_fail(module: str, source: str, message: str):
    (line,) = broken_rules(module, source, is_package=module == "lift_lightning.evaluation")
    assert message in line


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lift_lightning.indices", "import math\nimport torch\nfrom torch.optim.adamw import adamw"),
        ("lift_lightning.selection", "import transformers\nfrom . import indices, lowrank"),
        ("lift_lightning.sharding", "import torch.distributed as dist\nfrom torch.distributed.tensor import DTensor"),
        ("lift_lightning.sharding.ranks", "import torch.distributed as dist"),
        ("lift_lightning.module", "import lightning\nfrom lift_lightning import __version__"),
        (
            "lift_lightning.prompts",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import AutoTokenizer",
        ),
    ],
)
def test_the_import_rules_let_pass(module: str, source: str):
    assert broken_rules(module, source) == []


def run_python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("folder", ["callbacks", "datamodules"])
def test_the_bare_folder_name_is_refused(folder: str):
    """At the root, `import callbacks` found the folder: a second copy, whose classes are not the package's."""
    result = run_python(f"import {folder}")
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert f"lift_lightning.{folder}" in result.stderr


def test_the_core_loads_without_lightning():
    """What the import rules say of the sources holds when they run, third-party packages included."""
    low = [name for name in MODULES if (own := level(name)) is not None and own < 3]
    code = f"""
import importlib, sys
for name in {low!r}:
    importlib.import_module(name)
print(sorted({LIGHTNING!r} & sys.modules.keys()))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["[]"]


def test_installed_metadata():
    installed = metadata.metadata("lift-lightning")
    assert installed["Version"] == lift_lightning.__version__
    assert installed["License-Expression"] == "Apache-2.0"
    assert installed["Requires-Python"] == ">=3.10"
    assert set(installed.get_all("Provides-Extra")) >= {"dev", "baselines", "analysis"}


def test_console_script_loads():
    (script,) = metadata.entry_points(group="console_scripts", name="lift-lightning")
    assert script.value == "lift_lightning.cli:main"
    assert callable(script.load())
