"""What happens in between epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.cluster import KMeans
from torch import distributed
from torch.distributed.fsdp import FSDPModule

from cellplm_scvi._compat import move_to_device
from cellplm_scvi.nn import MixtureLatent

if TYPE_CHECKING:
    from cellplm_scvi.module import CellPLMModule


def diverged(lr: float) -> RuntimeError:
    """What to raise where losses or embeddings are no longer finite."""
    return RuntimeError(
        f"Training has diverged: the loss is no longer finite. Build the model anew and train it with a smaller learning rate, "
        f'plan_kwargs={{"lr": ...}}; here it was {lr:g}.'
    )


class TakeAlignmentAway(Callback):
    """Lets no batch be moved once a training starts that changes the embedding."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what was fitted to the embedding before."""
        module: CellPLMModule = pl_module.module  # type: ignore[assignment]
        if module.alignment is not None:
            module.alignment.reset()


class PlaceMixtureComponents(Callback):
    """Places the components of the mixture prior on the data once the embedding has taken shape.

    Until then they lie together near the standard normal prior. At the start of ``epoch`` (or of ``step``), k-means on the
    posterior means of training cells gives their means, variances and weights. It happens once: a checkpoint knows whether it
    did.

    Parameters
    ----------
    epoch
        When to do it.
    max_cells
        Number of training cells at which to stop collecting.
    step
        Optimiser step before which to do it, instead of ``epoch``: of many cells there are few epochs.
    """

    def __init__(self, epoch: int | None = None, max_cells: int = 20_000, step: int | None = None):
        self.epoch = epoch
        self.max_cells = max_cells
        self.step = step
        self.placed = False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"placed": self.placed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.placed = state_dict["placed"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place the components at the chosen epoch."""
        if self.step is None and trainer.current_epoch == self.epoch and not self.placed:
            self.place(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Place the components before the chosen step."""
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if trainer.global_step == self.step and first and not self.placed:
            self.place(trainer, pl_module)

    def place(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place the components now."""
        self.placed = True
        module: CellPLMModule = pl_module.module  # type: ignore[assignment]
        latent = module.latent
        if not isinstance(latent, MixtureLatent):
            return
        mean, variance = self._embed(trainer, module)
        if not mean.isfinite().all():
            raise diverged(pl_module.lr)  # type: ignore[arg-type]
        if isinstance(module, FSDPModule):
            module.reshard()
        # every rank sees its own share of the cells; the first one decides
        found = [find_components(mean, variance, latent.n_components)]
        if distributed.is_available() and distributed.is_initialized():
            distributed.broadcast_object_list(found, src=0)
        if found[0] is None:
            return
        latent.set_components(*(part.to(module.device) for part in found[0]))
        optimizer = trainer.optimizers[0]
        for parameter in (latent.raw_mean, latent.raw_log_variance, latent.component_logit):
            optimizer.state.pop(parameter, None)

    @torch.no_grad()
    def _embed(self, trainer: Trainer, module: CellPLMModule) -> tuple[torch.Tensor, torch.Tensor]:
        means, variances, n_cells = [], [], 0
        module.eval()
        for tensors in trainer.datamodule.train_dataloader():  # type: ignore[attr-defined]
            mean, variance = module.encode(move_to_device(tensors, module.device))
            means.append(mean)
            variances.append(variance)
            n_cells += mean.shape[0]
            if n_cells >= self.max_cells:
                break
        module.train()
        return torch.cat(means), torch.cat(variances)


def find_components(
    mean: torch.Tensor, variance: torch.Tensor, n_components: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Find by k-means where the cells are.

    Parameters
    ----------
    mean, variance
        Of q(z|h) of some cells, (n_cells, n_latent).
    n_components
        How many components to find.

    Returns
    -------
    Means and variances of the components, each (n_components, n_latent), and their weights, (n_components,), on the CPU;
    ``None`` where there are fewer distinct cells than twice as many.
    """
    if torch.unique(mean, dim=0).shape[0] < 2 * n_components:
        return None
    seed = int(torch.randint(2**31, (1,)).item())
    clusters = KMeans(n_components, n_init=1, random_state=seed).fit(mean.cpu().numpy())
    label = torch.from_numpy(clusters.labels_).long().to(mean.device)
    member = torch.nn.functional.one_hot(label, n_components).to(mean)
    size = member.sum(0)
    centre = (member.T @ mean) / size[:, None]
    residual = (mean - centre[label]).square() + variance
    # A component of few cells borrows the average spread, as if ten more cells had it.
    spread = (member.T @ residual + 10 * residual.mean(0)) / (size[:, None] + 10)
    return centre.cpu(), spread.cpu(), (size / size.sum()).cpu()
