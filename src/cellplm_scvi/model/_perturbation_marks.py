"""Training of marks: what a marked input of control cells changes, learned from pairs of sets, with perturbations held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scvi.utils import track
from torch import Tensor

from cellplm_scvi._compat import move_to_device
from cellplm_scvi.data._loader import CellDataset, MinibatchRows
from cellplm_scvi.data._perturbation import Changes, ControlPairs
from cellplm_scvi.nn import PerturbationHead
from cellplm_scvi.nn._perturbation import PADDING, perturbed_shares

if TYPE_CHECKING:
    from cellplm_scvi.module import CellPLMModule

#: pairs of sets in a step, and control cells of each
N_PAIRS, N_CONTROLS = 8, 32
#: control cells that predictions for held-out perturbations are averaged over
N_JUDGING = 128
N_FOLDS = 3
#: fewest elements from which anything is learned of others
MIN_ELEMENTS = 4
WEIGHT_DECAY = 0.05
#: variance of changes that the marks need not explain
SPREAD = 0.01


@dataclass
class MarkTraining:
    """Trains the marks of a head while the rest of the module stays as it is.

    Parameters
    ----------
    module
        A trained module with the head.
    dataset
        Reads control cells.
    pairs, changes
        Sets, and the change between them.
    marked
        Codes of each pair's elements, (n_pairs, k), padded.
    n_steps, lr
        Optimiser steps and learning rate.
    seed
        Of draws.
    progress_bar
        Whether to show one.
    """

    module: CellPLMModule
    dataset: CellDataset
    pairs: ControlPairs
    changes: Changes
    marked: np.ndarray
    n_steps: int
    lr: float
    seed: int
    progress_bar: bool

    @property
    def head(self) -> PerturbationHead:
        head = self.module.perturbation
        if head is None:
            raise ValueError("The module has no marks.")
        return head

    def cross_fit(self, elements: np.ndarray) -> np.ndarray:
        """Change that each element is expected to make by marks trained without it, (n_elements, n_genes).

        Marks are trained on everything last.
        """
        n_folds = min(N_FOLDS, elements.size)
        fold = np.random.default_rng(self.seed).permutation(elements.size) % n_folds
        start = {name: value.clone() for name, value in self.head.state_dict().items()}
        predicted = np.zeros((elements.size, self.head.n_genes))
        for f in [*range(n_folds), None]:
            held_out = elements[fold == f] if f is not None else elements[:0]
            rest = np.flatnonzero(~np.isin(self.marked, held_out).any(1))
            self.head.load_state_dict(start)
            if rest.size == 0:
                continue
            self._train(rest, f"marks, {'all' if f is None else f'fold {f + 1}/{n_folds}'}")
            for i in np.flatnonzero(fold == f) if f is not None else ():
                predicted[i] = self._expected(int(elements[i]))
        return predicted

    def _train(self, chosen: np.ndarray, title: str) -> None:
        """Fit the observed changes of pairs by those that marks make in random sets of their control cells."""
        head, rng = self.head, np.random.default_rng(self.seed)
        parameters = list(head.parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=WEIGHT_DECAY)
        # a tenth of ten steps would be a warm-up of no length, by which the schedule divides
        warm_up = 0.1 if self.n_steps > 10 else 0.0
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=self.n_steps, pct_start=warm_up)
        # each perturbation counts the same, however many sets it has
        names = [self.pairs.perturbations[i] for i in chosen]
        share = np.array([1 / names.count(name) for name in names])
        device = self.module.device
        try:
            for _ in track(range(self.n_steps), description=title, disable=not self.progress_bar):
                drawn = rng.choice(chosen, N_PAIRS, p=share / share.sum())
                own = torch.stack([head.own_genes(torch.from_numpy(self.marked[i]).to(device)) for i in drawn])
                predicted = self._changes([self._draw(i, rng) for i in drawn], self.marked[drawn])
                truth = torch.from_numpy(self.changes.change[drawn]).to(predicted)
                # what becomes of the perturbed gene itself is another matter
                weight = (1 - own) / (torch.from_numpy(self.changes.variance[drawn]).to(predicted) + SPREAD)
                loss = (weight * (predicted - truth).square()).sum() / weight.sum()
                optimizer.zero_grad()
                (loss / SPREAD).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)

    def _draw(self, pair: int, rng: np.random.Generator) -> np.ndarray:
        rows = self.pairs.controls[self.pairs.context[pair]]
        return rng.choice(rows, min(N_CONTROLS, rows.size), replace=False)

    def _changes(self, sets: Sequence[np.ndarray], marked: np.ndarray) -> Tensor:
        """Log ratio of the mean shares of sets of control cells with marks to those without, (n_sets, n_genes)."""
        lengths = np.array([rows.size for rows in sets])
        request = MinibatchRows(np.concatenate(sets), lengths, np.ones(int(lengths.sum()), dtype=bool))
        tensors = move_to_device(self.dataset[request], self.module.device)
        module = self.module
        with torch.no_grad():
            hidden = module.hidden(tensors)
            z = module.latent.posterior_mean(hidden)
            inputs = module._get_generative_input(tensors, {"z": z, "library": tensors["library"]})  # type: ignore[typeddict-item]
            output = module.decoder.output(inputs["measured"])
            log_shares = output.log_shares(module.decoder(inputs["z"], inputs["covariates"]), inputs["panel"])
        difference = module.hidden(tensors | {"marked": torch.from_numpy(marked).to(hidden.device)}) - hidden
        shares = perturbed_shares(log_shares, self.head.from_marks(difference, output.weight))
        segment = torch.repeat_interleave(torch.arange(len(sets)), torch.from_numpy(lengths)).to(hidden.device)

        def log_mean(values: Tensor) -> Tensor:
            total = values.new_zeros(len(sets), values.shape[1]).index_add(0, segment, values)
            return total.clamp_min(1e-12).log()

        return log_mean(shares) - log_mean(log_shares.exp())

    @torch.no_grad()
    def _expected(self, element: int) -> np.ndarray:
        rows = np.concatenate(self.pairs.controls)
        rows = np.random.default_rng(self.seed).choice(rows, min(N_JUDGING, rows.size), replace=False)
        own = self.head.own_genes(torch.tensor([element], device=self.module.device))
        return (self._changes([rows], np.array([[element]]))[0] * (1 - own)).cpu().numpy()


def pad(codes: Sequence[Sequence[int]]) -> np.ndarray:
    """Codes of the elements of perturbations, (n, k), padded."""
    width = max((len(code) for code in codes), default=1)
    return np.array([[*code, *[PADDING] * (width - len(code))] for code in codes], dtype=np.int64).reshape(-1, width)
