"""The module of a model that also learns labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from scvi.module.base import LossOutput
from torch import Tensor

from cellplm_scvi import _constants as c
from cellplm_scvi.nn import AnnotationHead

from ._module import CellPLMModule

if TYPE_CHECKING:
    from cellplm_scvi._typing import GenerativeOutputs, InferenceOutputs, Minibatch


class AnnotatorModule(CellPLMModule):
    """Adds the cross-entropy of known labels to the loss of :class:`CellPLMModule`.

    Unlabelled cells keep the loss as it was, so that they shape the embedding too.
    """

    annotation: AnnotationHead
    #: class of each label code, -1 for unlabelled, and weight of each class, while fine-tuning
    class_of_code: Tensor | None = None
    class_weight: Tensor | None = None
    label_weight = 1.0

    def loss(
        self,
        tensors: Minibatch,
        inference_outputs: InferenceOutputs,
        generative_outputs: GenerativeOutputs,
        kl_weight: float = 1.0,
    ) -> LossOutput:
        """Negative ELBO, and the cross-entropy of the labelled cells in which all classes have the same weight."""
        output = super().loss(tensors, inference_outputs, generative_outputs, kl_weight)
        if self.class_of_code is None or self.class_weight is None or c.LABELS_KEY not in tensors:
            return output
        codes = tensors[c.LABELS_KEY]  # type: ignore[literal-required]
        codes = codes[tensors["target"]] if "target" in tensors else codes
        classes = self.class_of_code.to(codes.device)[codes.clamp_max(len(self.class_of_code) - 1)]
        known = (classes >= 0).float()
        log_p = self.annotation.classifier(inference_outputs["z"]).log_softmax(-1)
        weight = self.class_weight.to(codes.device)[classes.clamp_min(0)] * known
        entropy = -log_p.gather(1, classes.clamp_min(0)[:, None])[:, 0]
        labels_loss = (weight * entropy).sum() / weight.sum().clamp_min(1e-8)
        extra = {**(output.extra_metrics or {}), "labels_loss": labels_loss.detach()}
        return LossOutput(
            loss=output.loss + self.label_weight * labels_loss,
            reconstruction_loss=output.reconstruction_loss,
            kl_local=output.kl_local,
            extra_metrics=extra,
        )


def balanced_weights(classes: Tensor, n_classes: int) -> Tensor:
    """Weight of each class such that all have the same sum, (n_classes,)."""
    counts = torch.bincount(classes, minlength=n_classes).float()
    return torch.where(counts > 0, counts.sum() / (n_classes * counts.clamp_min(1)), 0.0)
