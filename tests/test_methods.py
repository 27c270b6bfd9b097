"""The command that trains every method: some of them for real, and that it finds what is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lift_lightning.errors import ConfigError
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.quickstart import methods

SOME = ["lift-adaptive", "spiel", "s2ft", "full-8bit", "pissa", "spectral"]


def test_some_methods_train_and_come_back(tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "methods.json"
    status = methods.main(["--steps", "6", "--batch_size", "4", "--output", str(output), "--methods", *SOME])
    assert status == 0
    found = {one["method"]: one for one in json.loads(output.read_text())}
    assert list(found) == SOME
    for one in found.values():
        assert one["after"] < one["before"]
        assert one["forbidden"] == 0
    for name in ("lift-adaptive", "spiel", "s2ft", "full-8bit", "spectral"):
        assert found[name]["difference"] == 0
    assert found["pissa"]["difference"] < 1e-3
    assert found["spiel"]["changed"] == found["spiel"]["trained"] == found["lift-adaptive"]["trained"] == 143_360
    assert found["spectral"]["trained"] == 143_360
    printed = capsys.readouterr().out
    assert all(name in printed for name in SOME)


def test_a_method_that_changes_what_it_must_not_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = SparseAdamW.step

    def leaking(self, closure=None):
        real(self, closure)
        with torch.no_grad():
            for _, parameter, _ in self.sparse_parameters():
                parameter.view(-1)[:2] += 1e-3

    monkeypatch.setattr(SparseAdamW, "step", leaking)
    found = methods.check_method("random", 2, tmp_path, batch_size=2)
    assert found.forbidden > 0


def test_every_method_has_a_file_that_says_its_command():
    assert len(methods.METHODS) >= 20
    for name in methods.METHODS:
        text = (methods.FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        assert f" python main.py fit --config configs/quickstart.yaml --config configs/methods/{name}.yaml\n" in text


def test_unknown_methods_are_refused():
    with pytest.raises(ConfigError, match="there is no method 'prompt': choose from dora, "):
        methods.main(["--methods", "prompt"])
