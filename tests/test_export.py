"""The export command: a checkpoint of a fit becomes a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch
from tiny import tiny_llama
from transformers import (
    AutoModelForCausalLM,
)

from lift_lightning.export import export
from lift_lightning.models import (
    ModelUnavailableError,
    load_tokenizer,
)
from lift_lightning.module import LiftLightningModule


@pytest.fixture
def checkpoint(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """What a Trainer in bf16-true saves, as far as `export` reads it, with weights that are not those of the folder."""
    module = LiftLightningModule(str(tiny_model_dir), gradient_checkpointing=True)
    module.configure_model()
    module.hf_model.load_state_dict(tiny_llama(seed=1).state_dict())
    module.to(torch.bfloat16)
    path = tmp_path / "last.ckpt"
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save({**content, "pytorch-lightning_version": lightning.__version__}, path)
    return path


def test_a_checkpoint_becomes_a_folder_that_transformers_loads(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(export(str(checkpoint), str(tmp_path / "out")))
    assert model.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    expected = tiny_llama(seed=1).state_dict()
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in model.state_dict().items())
    assert model.config.use_cache  # which training with gradient checkpointing turns off
    assert load_tokenizer(tmp_path / "out").eos_token_id == 2


def test_a_model_that_has_moved_can_be_named(checkpoint: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint)
    content["hyper_parameters"]["model_name_or_path"] = "/gone"
    torch.save(content, checkpoint)
    with pytest.raises(ModelUnavailableError, match=r"'/gone': there is no such folder.* --model_name_or_path /path"):
        export(str(checkpoint), str(tmp_path / "out"))
    assert export(str(checkpoint), str(tmp_path / "out"), model_name_or_path=str(tiny_model_dir)).is_dir()
    with pytest.raises(FileExistsError, match="out is not empty"):
        export(str(checkpoint), str(tmp_path / "out"))


def test_export_names_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint file '/no/last\.ckpt'"):
        export("/no/last.ckpt", str(tmp_path / "out"))
    (tmp_path / "text.ckpt").write_text("text")
    with pytest.raises(ValueError, match=r"text\.ckpt' is no checkpoint of a training run"):
        export(str(tmp_path / "text.ckpt"), str(tmp_path / "out"))
    torch.save({"state_dict": {"weight": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt' holds no weights of a model"):
        export(str(tmp_path / "other.ckpt"), str(tmp_path / "out"))
