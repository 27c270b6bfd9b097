"""Study 3: noise on selected entries of SmolLM2 (Sec. 4, Fig. 2). About an hour on one core.

    LIFT_SMOLLM2_DIR=... LIFT_DATA_DIR=... python -m benchmarks.studies.perturbation

What `python main.py analyze perturb` does, on SmolLM2-135M-Instruct, whose weights are those of a 4-bit file: normal
noise of three absolute sizes on 5% of the entries of every matrix; LIFT's at three ranks, the smallest ones of
the same approximation (which the released code takes), the largest in magnitude, random ones; three seeds each.
Perplexity on the first 1,024 tokens of WikiText-2's test text, P(" Spain" | "Madrid is located in the country of"),
accuracy on the first 50 questions of ARC-Easy by the likeliest option (a standard error of 7 points: only large effects
show).

What was expected, written before the first run, from a trial at noise 0.1 with one seed on another text: the smallest
entries hurt by far the most, then LIFT at small ranks, then random ones; LIFT at rank 64 and magnitude least. The paper
finds LIFT's largest the most sensitive.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rich.progress import track

from benchmarks.studies.records import Store, significant
from lift_lightning.analysis.noise import Probes, ask, perturbation
from lift_lightning.analysis.probes import read_choice
from lift_lightning.analyze_commands import perturbed_selections
from lift_lightning.inference import load_for_inference

STUDY = "perturbation"
RANKS = (8, 32, 128)
DENSITY = 0.05
SCALES = (0.01, 0.03, 0.1)
SEEDS = (0, 1, 2)
QUESTIONS, TOKENS = 50, 1024
PROMPT, ANSWER = "Madrid is located in the country of", " Spain"


def probes(data: Path) -> Probes:
    """What the model is asked."""
    rows = json.loads((data / "llm_adapters/ARC-Easy/test.json").read_text(encoding="utf-8"))[:QUESTIONS]
    return Probes(
        text=(data / "wikitext2/test.txt").read_text(encoding="utf-8"),
        max_tokens=TOKENS,
        window=TOKENS,
        prompt=PROMPT,
        answer=ANSWER,
        choices=[read_choice(row, f"row {i}") for i, row in enumerate(rows)],
    )


def name_of(label: str, seed: int) -> str:
    """Of a run: `LIFT smallest R=8` is `lift-smallest-8`."""
    return f"{label.lower().replace(' ', '-').replace('r=', '')}-seed{seed}"


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    missing = [name for name in ("LIFT_SMOLLM2_DIR", "LIFT_DATA_DIR") if not os.environ.get(name)]
    if missing:
        sys.exit(f"this study needs SmolLM2 and its data: set {' and '.join(missing)}")
    store, asked = Store(STUDY), probes(Path(os.environ["LIFT_DATA_DIR"]))
    model, tokenizer = load_for_inference(os.environ["LIFT_SMOLLM2_DIR"], "cpu", "float32")
    command = "python -m benchmarks.studies.perturbation"
    if not store.has("none"):
        found = {key: significant(value) for key, value in ask(model, tokenizer, asked).items()}
        store.save("none", command, None, {"rows": [{"selection": "none", "scale": 0.0, "seed": 0, **found}]})
    selections = perturbed_selections(DENSITY, RANKS)
    cases = [(label, seed) for seed in SEEDS for label in selections]
    for label, seed in track(cases, "Perturbing"):
        name = name_of(label, seed)
        if not store.has(name):
            one = {label: selections[label]}
            rows = perturbation(model, tokenizer, asked, one, SCALES, [seed], before=False)
            rounded = [{k: significant(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
            store.save(name, command, seed, {"rows": rounded})


if __name__ == "__main__":
    main()
