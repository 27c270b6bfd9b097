"""Readable twins of what the core does fast: plain torch operations, dense tensors, float64, dictionaries.

Letters: M, N rows and columns of one matrix; K selected entries; R rank of the low-rank approximation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(weight: Tensor, rank: int) -> Tensor:
    """(M, N) float64: the best rank-R approximation, from the full SVD."""
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def stable_top_k(scores: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """(K,) ascending flat indices; a stable sort keeps equal scores in the order of their indices."""
    order = torch.sort(scores.reshape(-1), descending=largest, stable=True).indices
    return order[:k].sort().values


def assert_same_choice(ours: Tensor, scores: Tensor, k: int, *, largest: bool = True) -> int:
    """`ours` is the top k of float64 `scores`, but for entries within 1e-6 relative of the threshold.

    Returns how many entries differ from the stable sort.
    """
    flat = scores.reshape(-1)
    theirs = stable_top_k(flat, k, largest=largest)
    assert ours.dtype == torch.int64
    assert ours.shape == (k,)
    assert bool((ours[1:] > ours[:-1]).all()), "not ascending, or an index twice"
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[ours] = True
    wanted = torch.zeros_like(chosen)
    wanted[theirs] = True
    threshold = flat[theirs].min() if largest else flat[theirs].max()
    differing = flat[chosen ^ wanted]
    assert bool(((differing - threshold).abs() <= 1e-6 * threshold).all()), (differing, threshold)
    return differing.numel()


def carry_by_dict(old: list[int], values: list[float], new: list[int], fill: float = 0.0) -> list[float]:
    """The value of every new index: what it had, or `fill`."""
    known = dict(zip(old, values, strict=True))
    return [known.get(index, fill) for index in new]


class MaskedAdamW:
    """Dense AdamW whose gradient, moments and update are masked: what SparseAdamW must equal, step by step.

    `masters` keeps a dense copy in a wider dtype, as SparseAdamW does for the selected entries of bfloat16 weights.
    A parameter without a mask is trained whole.
    """

    def __init__(self, weights, *, lr, betas, eps, weight_decay=0.0, max_norm=None, masters=None):
        self.weights: dict[str, Tensor] = {name: w.detach().clone() for name, w in weights.items()}
        self.masters = {n: w.to(masters) if masters else w for n, w in self.weights.items()}
        self.exp_avg = {n: torch.zeros_like(w) for n, w in self.masters.items()}
        self.exp_avg_sq = {n: torch.zeros_like(w) for n, w in self.masters.items()}
        self.masks = {n: torch.ones(w.shape, dtype=torch.bool) for n, w in self.weights.items()}
        self.t = dict.fromkeys(self.weights, 0)
        self.lr, self.betas, self.eps, self.weight_decay, self.max_norm = lr, betas, eps, weight_decay, max_norm
        self.norm = torch.tensor(0.0)

    def set_mask(self, name: str, indices: Tensor) -> None:
        """Entries in both masks keep their moments, all others have none (Algorithm 1)."""
        mask = torch.zeros(self.weights[name].numel(), dtype=torch.bool)
        mask[indices.long()] = True
        mask = mask.view(self.weights[name].shape)
        kept = self.masks[name] & mask
        zero = torch.zeros_like(self.masters[name])
        self.exp_avg[name] = torch.where(kept, self.exp_avg[name], zero)
        self.exp_avg_sq[name] = torch.where(kept, self.exp_avg_sq[name], zero)
        current = self.weights[name].to(zero.dtype)
        self.masters[name] = torch.where(kept, self.masters[name], current)
        self.masks[name] = mask

    def step(self, gradients: dict[str, Tensor]) -> None:
        masked = {
            n: torch.where(self.masks[n], g.to(self.masters[n].dtype), torch.zeros_like(self.masters[n]))
            for n, g in gradients.items()
        }
        self.norm = torch.stack([g.square().sum() for g in masked.values()]).sum().sqrt()
        if self.max_norm is not None:
            factor = min(1.0, self.max_norm / (float(self.norm) + 1e-6))
            masked = {n: g * factor for n, g in masked.items()}
        for name, gradient in masked.items():
            self._update(name, gradient)

    def _update(self, name: str, gradient: Tensor) -> None:
        (beta1, beta2), mask, old = self.betas, self.masks[name], self.masters[name]
        self.t[name] += 1
        m = self.exp_avg[name] = beta1 * self.exp_avg[name] + (1 - beta1) * gradient
        v = self.exp_avg_sq[name] = beta2 * self.exp_avg_sq[name] + (1 - beta2) * gradient.square()
        m_hat, v_hat = m / (1 - beta1 ** self.t[name]), v / (1 - beta2 ** self.t[name])
        new = old * (1 - self.lr * self.weight_decay) - self.lr * m_hat / (v_hat.sqrt() + self.eps)
        self.masters[name] = torch.where(mask, new, old)
        weight = self.weights[name]
        self.weights[name] = torch.where(mask, self.masters[name].to(weight.dtype), weight)
