"""LIFT in a bare PyTorch loop: select, train, select again. Runs in a second: `python examples/plain_pytorch.py`."""

import torch
from torch import nn

from lift_lightning import SelectionConfig, SparseAdamW, build_param_groups, refresh_masks


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 1))
    x = torch.randn(512, 64)
    y = x[:, :8].sum(dim=1, keepdim=True).sin()

    groups = build_param_groups(model, target_modules=r"^0\.weight", modules_to_train=r"^2\.")
    optimizer = SparseAdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    config = SelectionConfig(density=0.05, lra_rank=8)
    report = refresh_masks(optimizer, config)  # the first selection
    before = model[0].weight.detach().clone()

    for step in range(1, 201):
        if step % 50 == 0:  # Algorithm 1: before the gradient of step t
            report = refresh_masks(optimizer, config, bases=report.bases)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()  # dense gradients of selected matrices are gathered and dropped here
        norm = optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 50 == 0:
            overlap = "" if report.overlap is None else f", overlap of the last refresh {report.overlap:.1%}"
            print(f"step {step:3d}: loss {loss:.4f}, gradient norm {norm:.3f}{overlap}")

    changed = (model[0].weight != before).double().mean()
    print(f"{report.density:.1%} of the first matrix is selected, {changed:.1%} has changed in {step} steps")


if __name__ == "__main__":
    main()
