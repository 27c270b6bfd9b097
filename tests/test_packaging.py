"""The wheel holds the folders of the root inside the package, and nothing beside it; and it works alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it along
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGED = ["lift_lightning", "callbacks", "datamodules", "configs"]


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build in the tree would leave a build/ folder, and deleted files would live on in it."""
    copy = tmp_path_factory.mktemp("tree")
    skip = shutil.ignore_patterns("__pycache__")
    for name in PACKAGED:
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ["tests", "benchmarks", "examples", "docs"]:  # must not get into the wheel
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(copy)])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def installed_path(path: Path) -> str:
    """Where a file or folder of the tree lies in the wheel."""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts if parts[0] == "lift_lightning" else ("lift_lightning", *parts))


SUFFIXES = ("py", "yaml", "typed", "json", "csv", "safetensors")


def test_every_source_config_and_model_is_in_the_wheel(contents: set[str]):
    files = [p for name in PACKAGED for suffix in SUFFIXES for p in (ROOT / name).rglob(f"*.{suffix}")]
    assert {installed_path(path) for path in files} <= contents
    assert {"lift_lightning/py.typed", "lift_lightning/callbacks/__init__.py"} <= contents
    assert "lift_lightning/configs/math10k.yaml" in contents
    assert any(name.startswith("lift_lightning/configs/models/") for name in contents)
    assert "lift_lightning/quickstart/model/model.safetensors" in contents


def test_every_package_folder_is_listed():
    """`packages` is a list by hand, because of the mapping: a folder that is forgotten there is missing in silence."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    files = [p for name in PACKAGED for p in (ROOT / name).rglob("*") if p.suffix in {".py", ".yaml", ".safetensors"}]
    packages = {installed_path(file.parent).replace("/", "."): file.parent for file in files}
    assert set(setuptools["packages"]) == set(packages)
    for package, folder in setuptools["package-dir"].items():
        assert packages[package] == ROOT / folder


def test_the_wheel_installs_one_top_level_package(contents: set[str]):
    """A top-level `callbacks` would meet every other project's."""
    tops = {name.split("/")[0] for name in contents}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lift_lightning"}
    assert not any(name.startswith("lift_lightning/tests") for name in contents)


def test_the_wheel_carries_its_licence_and_its_command(wheel: Path, contents: set[str]):
    info = next(name.split("/")[0] for name in contents if ".dist-info/" in name)
    with zipfile.ZipFile(wheel) as archive:
        assert "lift-lightning = lift_lightning.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()


@pytest.mark.slow
def test_the_wheel_works_alone(wheel: Path, tmp_path: Path):
    """Installed into a folder of its own and run from elsewhere, nothing is taken from the source tree."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)])
    alone = {**os.environ, "PYTHONPATH": str(site)}
    code = """
from importlib import resources
import lift_lightning, lift_lightning.callbacks, lift_lightning.datamodules
print(lift_lightning.__file__, lift_lightning.callbacks.__file__, lift_lightning.datamodules.__file__, sep="\\n")
print(resources.files("lift_lightning.configs") / "math10k.yaml")
from lift_lightning.models import load_model
assert load_model("lift-lightning/quickstart").model.config.vocab_size == 1536
"""
    places = run([sys.executable, "-c", code], cwd=tmp_path, env=alone).split()
    assert len(places) == 4
    assert all(Path(place).is_relative_to(site) and Path(place).exists() for place in places)
    help_text = run([sys.executable, str(site / "bin" / "lift-lightning"), "--help"], cwd=tmp_path, env=alone)
    assert "fit" in help_text
