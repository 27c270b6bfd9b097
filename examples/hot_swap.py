"""Two deltas switched on one loaded model, and back to the base, to the last bit: `python examples/hot_swap.py`.

The bundled model is fine-tuned twice for a few steps, with LIFT, on sums and on differences. Each training leaves a
delta; neither leaves a model.
"""

import tempfile
import time
from itertools import cycle
from pathlib import Path

import torch

from lift_lightning import SelectionConfig, SparseAdamW, build_param_groups, refresh_masks
from lift_lightning.delta import Delta, ModelSource, attach, extract, open_folder
from lift_lightning.models import load_model, load_tokenizer

BASE = "lift-lightning/quickstart"


def fine_tuned(rows: list[str], steps: int = 6) -> torch.nn.Module:
    """The bundled model after a few steps on rows of text."""
    model, tokenizer = load_model(BASE).model, load_tokenizer(BASE)
    optimizer = SparseAdamW(build_param_groups(model), lr=1e-3)
    refresh_masks(optimizer, SelectionConfig(density=0.05, lra_rank=16))
    for _, row in zip(range(steps), cycle(rows), strict=False):
        ids = tokenizer(row, return_tensors="pt")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def same_bits(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    """Whether two models have the same weights to the last bit: float32 seen as integers."""
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32)) for a, b in pairs)


def main() -> None:
    torch.manual_seed(0)
    rows = {
        "sums": [f"{a} + {b} = {a + b}." for a in range(3) for b in range(2)],
        "differences": [f"{a + b} - {b} = {a}." for a in range(3) for b in range(2)],
    }
    base, model = load_model(BASE).model.eval(), load_model(BASE).model.eval()
    tuned, attached = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, texts in rows.items():
            tuned[name] = fine_tuned(texts)
            with open_folder(BASE) as source:
                delta = extract(source, ModelSource(tuned[name], source.names()), base_name=BASE)
            written = delta.save_pretrained(Path(folder) / name)
            size = sum(file.stat().st_size for file in written.iterdir())
            # Once for each delta: its checksums, and those of the base.
            attached[name] = attach(model, Delta.from_pretrained(written))
            print(f"{name}: {size / 2**10:.0f} KiB, of a model of {_nbytes(model) / 2**10:.0f} KiB")

    ids = torch.arange(10).unsqueeze(0)
    for name in ("sums", "differences", "sums"):
        start = time.perf_counter()
        attached[name].apply()
        on = time.perf_counter() - start
        equal = same_bits(model, tuned[name]) and torch.equal(model(ids).logits, tuned[name](ids).logits)
        start = time.perf_counter()
        attached[name].revert()
        off = time.perf_counter() - start
        back = same_bits(model, base) and torch.equal(model(ids).logits, base(ids).logits)
        print(
            f"{name}: on in {on * 1e3:.1f} ms, equal to the trained model: {equal}; "
            f"off in {off * 1e3:.1f} ms, equal to the base: {back}"
        )


def _nbytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


if __name__ == "__main__":
    main()
