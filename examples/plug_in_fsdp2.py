"""LIFT in a Lightning project of one's own whose model is split over several processes by FSDP2.

    torchrun --nproc-per-node 2 examples/plug_in_fsdp2.py

On the CPU where there is no GPU. Beside what `plug_in.py` shows, `configure_model` shards the model and the strategy is
`fsdp2`. A project that has a `ModelParallelStrategy` of its own keeps it.
"""

import lightning as L
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lift_lightning import SparseAdamW, build_param_groups
from lift_lightning.callbacks import MaskRefreshCallback
from lift_lightning.strategies import FSDP2Strategy


class DigitClassifier(L.LightningModule):
    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return  # Lightning may ask again
        backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.net = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(128, 10)})
        mesh = self.device_mesh["data_parallel"]
        for part in self.net.values():
            fully_shard(part, mesh=mesh)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        logits = self.net["head"](self.net["backbone"](inputs))
        self.log("accuracy", (logits.argmax(dim=1) == labels).float().mean(), prog_bar=True, sync_dist=True)
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
        strategy=FSDP2Strategy(),
        devices=2,
        max_epochs=4,
        gradient_clip_val=1.0,
        callbacks=[refresh],
        logger=False,
        enable_checkpointing=False,
        accelerator="auto",
    )
    trainer.fit(module, DataLoader(clusters(), batch_size=16, shuffle=True))
    if trainer.is_global_zero:
        print(f"accuracy of the last batch: {trainer.callback_metrics['accuracy']:.0%}")
        for step, report in refresh.history:
            print(f"selected before step {step}: {report.selected:,} of {report.entries:,} entries")


if __name__ == "__main__":
    main()
