"""LIFT in a Lightning project of one's own, automatic optimization and no language model: `python examples/plug_in.py`.

Two things are ours: the optimizer that `configure_optimizers` returns, and the callback.
"""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lift_lightning import SparseAdamW, build_param_groups
from lift_lightning.callbacks import MaskRefreshCallback


class DigitClassifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        logits = self.head(self.backbone(inputs))
        self.log("accuracy", (logits.argmax(dim=1) == labels).float().mean(), prog_bar=True)
        return nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self) -> SparseAdamW:
        groups = build_param_groups(self, target_modules=r"backbone\.\d\.weight", modules_to_train="head")
        return SparseAdamW(groups, lr=3e-3, weight_decay=0.01)


def clusters(rows: int = 2000) -> TensorDataset:
    """Ten noisy points in 64 dimensions."""
    labels = torch.arange(rows) % 10
    return TensorDataset(torch.randn(10, 64)[labels] + 0.8 * torch.randn(rows, 64), labels)


def main() -> None:
    L.seed_everything(0)
    module = DigitClassifier()
    refresh = MaskRefreshCallback(interval=50, density=0.05, lra_rank=16)
    trainer = L.Trainer(
        max_epochs=4,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[refresh],
        logger=False,
        enable_checkpointing=False,
        accelerator="auto",
        devices=1,
    )
    trainer.fit(module, DataLoader(clusters(), batch_size=16, shuffle=True))
    print(f"accuracy of the last batch: {trainer.callback_metrics['accuracy']:.0%}")
    for step, report in refresh.history:
        print(
            f"selected before step {step}: {report.selected:,} of {report.entries:,} entries, overlap {report.overlap}"
        )


if __name__ == "__main__":
    main()
