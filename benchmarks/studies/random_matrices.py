"""Study 2: noise on a random matrix (App. C.1, Fig. 8). `python -m benchmarks.studies.random_matrices`, 15 minutes.

Square matrices of independent standard normal entries, of 128 to 2,048 rows; normal noise of one and of four standard
deviations on 5% of the entries: the ones that LIFT picks at three ranks, the smallest of the same approximation (the
released code), the largest in magnitude, random ones. What of the noise reaches the spectral norm, and how far does
the top eigenspace turn? The paper prints neither scale nor density of this experiment; these are ours.

What was expected, written before the first run: noise on LIFT's entries raises the spectral norm most at small ranks,
since there they lie in a few rows and columns, and the effect shrinks with the size; random entries do nearly nothing
at one standard deviation (the norm of that noise alone is sqrt(0.05) of the matrix's).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.progress import track

from benchmarks.studies.records import Run, Store, significant
from lift_lightning import SelectionConfig, select_indices
from lift_lightning.analysis.spectra import alignment_score, leading_right_vectors

STUDY = "random_matrices"
SIZES = (128, 256, 512, 1024, 2048)
SEEDS = tuple(range(5))
DENSITY, SCALES = 0.05, (1.0, 4.0)
# name: label, settings; the rank of the approximation as a share of the size
CHOICES: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "lift-64th": ("LIFT, R = N/64", {"criterion": "lift"}, 1 / 64),
    "lift-16th": ("LIFT, R = N/16", {"criterion": "lift"}, 1 / 16),
    "lift-4th": ("LIFT, R = N/4", {"criterion": "lift"}, 1 / 4),
    "smallest-16th": ("LIFT smallest, R = N/16", {"criterion": "lift", "keep": "smallest"}, 1 / 16),
    "magnitude": ("magnitude", {"criterion": "magnitude"}, None),
    "random": ("random", {"criterion": "random"}, None),
}


def perturb(size: int, seed: int) -> Run:
    """One matrix, and every choice of entries."""
    generator = torch.Generator().manual_seed(1000 * size + seed)
    matrix = torch.randn(size, size, generator=generator)
    noise = torch.randn(size * size, generator=generator)
    k = size // 16
    norm, top = float(torch.linalg.matrix_norm(matrix, 2)), leading_right_vectors(matrix, k)
    found: dict[str, dict[str, Any]] = {}
    for name, (_, settings, share) in CHOICES.items():
        rank = {} if share is None else {"lra_rank": max(1, round(share * size))}
        chosen = select_indices(matrix, SelectionConfig(density=DENSITY, seed=seed, **settings, **rank))
        found[name] = {"busiest_row": significant(float((chosen // size).bincount(minlength=size).max()) / size)}
        for scale in SCALES:
            noisy = matrix.clone()
            noisy.view(-1)[chosen] += scale * noise[: chosen.numel()]
            found[name][f"{scale:g}"] = {
                "spectral_norm_ratio": significant(float(torch.linalg.matrix_norm(noisy, 2)) / norm),
                "alignment": significant(alignment_score(top, leading_right_vectors(noisy, k))),
            }
    return {"size": size, "k": k, "spectral_norm": significant(norm), "choices": found}


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    store = Store(STUDY)
    for size, seed in track([(size, seed) for size in SIZES for seed in SEEDS], "Random matrices"):
        name = f"size{size}-seed{seed}"
        if not store.has(name):
            store.save(name, "python -m benchmarks.studies.random_matrices", seed, perturb(size, seed))


if __name__ == "__main__":
    main()
