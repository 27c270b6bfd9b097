from pathlib import Path

import pytest
from tiny import save_tiny_llama, write_sums


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with a byte-level tokenizer, as a local folder."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def dropout_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with attention dropout, for what depends on random numbers during training."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama-dropout"), attention_dropout=0.2)


@pytest.fixture(scope="session")
def sums_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows in the columns of MATH-10K."""
    return write_sums(tmp_path_factory.mktemp("sums") / "sums.json")
