"""One step of training and of validation, as Lightning takes them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from roadfuse_core.models import LOSSES, Network, deep_loss
from roadfuse_core.training._augment import Prepared, prepare
from roadfuse_core.training._recipe import Recipe
from roadfuse_core.training._windows import Batch

__all__ = ["RoadModule", "confusion_sums"]

PATIENCE = 3  # epochs without progress before a plateau divides the rate


class RoadModule(LightningModule):
    """A network under a recipe, for one of its stages.

    Args:
        network: What learns.
        recipe: How.
        stage: Number of the stage.
    """

    def __init__(self, network: Network, recipe: Recipe, stage: int) -> None:
        super().__init__()
        self.network, self.recipe, self.stage, self.view = network, recipe, stage, recipe.view()
        self.steps = recipe.stages[stage].epochs * recipe.epoch_steps
        self.free_steps = round(self.steps * (1 - recipe.freeze_norm))  # after these, batch norms are frozen
        self.counts = torch.zeros(4, dtype=torch.int64)
        self.score = 0.0  # g_iou of the last validation
        self.earlier_s = 0.0  # of the runs before the state from which this one goes on
        self.began_s = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time of this stage so far, of all the runs of which its state is made."""
        return self.earlier_s + time.perf_counter() - self.began_s

    def on_fit_start(self) -> None:
        """The watch starts."""
        self.began_s = time.perf_counter()

    def train(self, mode: bool = True) -> RoadModule:
        """Training mode; batch norms that are frozen keep their statistics and norm by them, as at inference."""
        super().train(mode)
        if self.global_step >= self.free_steps:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def on_train_start(self) -> None:
        """A run that goes on within an epoch gets no start of that epoch."""
        self.train()

    def on_train_epoch_start(self) -> None:
        """Lightning leaves modules in the mode in which they came."""
        self.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Batch norms freeze in the midst of an epoch too."""
        if self.global_step == self.free_steps:
            self.train()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Points and bytes travel, not layers."""
        return batch.to(device)

    def prepared(self, batch: Batch) -> Prepared:
        """Augmented and rendered, in single precision."""
        with torch.autocast(self.device.type, enabled=False), torch.no_grad():
            return prepare(batch, self.view)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        # Networks that draw (PointRend's points) draw the same after a resume, and others on each rank.
        torch.manual_seed(_seed(self.recipe.seed, self.stage, self.global_step, self.global_rank))
        made = self.prepared(batch)
        prediction = self.network(made.inputs, made.present)
        with torch.autocast(self.device.type, enabled=False):
            exact = type(prediction)(
                prediction.logits.float(),
                {k: v.float() for k, v in prediction.auxiliary.items()},
                {k: v.float() for k, v in prediction.maps.items()},
            )
            loss = deep_loss(self.network, exact, made.labels, made.known, LOSSES[self.recipe.loss])
        self.log("loss", loss, prog_bar=True, on_step=True, batch_size=len(batch))
        ranks = self.trainer.world_size
        # Gradients are averaged over ranks, which may have unequal shares of the batch.
        return loss * (len(batch) * ranks / self.recipe.batch) if ranks > 1 else loss

    def on_validation_epoch_start(self) -> None:
        """Nothing counted yet."""
        self.counts = torch.zeros(4, dtype=torch.int64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count."""
        made = self.prepared(batch)
        logits = self.network(made.inputs, made.present).logits
        self.counts += confusion_sums(logits, made).sum(0)

    def on_validation_epoch_end(self) -> None:
        """One IoU over everything, on all ranks."""
        total = self.counts
        if self.trainer.world_size > 1:
            gathered = self.all_gather(total)
            assert isinstance(gathered, Tensor)
            total = gathered.sum(0)
        tp, fp, fn, _ = total.tolist()
        self.score = tp / max(1, tp + fp + fn)
        self.log("g_iou", self.score, prog_bar=True, rank_zero_only=False)
        if self.recipe.optimiser.schedule == "plateau":
            # Here and not by Lightning, which would do it only after the state of this epoch was saved.
            self.lr_schedulers().step(self.score)  # type: ignore[union-attr, arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The score and the time go with the state."""
        checkpoint["score"] = self.score
        checkpoint["seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """And come back with it; older states have no time."""
        self.score = checkpoint["score"]
        self.earlier_s = checkpoint.get("seconds", 0.0)

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule of the recipe."""
        o = self.recipe.optimiser
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        optimiser = kinds[o.kind](self.network.parameters(), lr=o.lr, weight_decay=o.weight_decay, fused=True)
        if o.schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, "max", o.factor, PATIENCE)
            never = 10**9
            return {"optimizer": optimiser, "lr_scheduler": {"scheduler": plateau, "monitor": "g_iou", "frequency": never}}
        if o.schedule == "one-cycle":
            total = self.steps + 1
            # A rise of less than one step is a division by zero there.
            rise = min(1.0, max(0.1, 2 / total))
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, o.lr, total_steps=total, pct_start=rise)
            return {"optimizer": optimiser, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
        rate: Callable[[int], float] = (lambda t: 1.0) if o.schedule == "constant" else self._poly
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """By norm. Lightning's own way refuses fused optimisers, as if gradients were scaled, which those of bf16 are not."""
        if gradient_clip_val is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), float(gradient_clip_val))

    def _poly(self, step: int) -> float:
        """(1 - t/T)^0.9 (PP-LinkNet, section 3.4)."""
        return float(max(0.0, 1 - step / self.steps) ** 0.9)


def confusion_sums(logits: Tensor, made: Prepared) -> Tensor:
    """(N, 4) int64: true and false positives, false and true negatives of each window, over known pixels."""
    road, truth, known = logits > 0, made.labels > 0, made.known > 0
    parts = [road & truth, road & ~truth, ~road & truth, ~road & ~truth]
    return torch.stack([(p & known).flatten(1).sum(1) for p in parts], 1)


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")
