"""Perturbations: marks in the input of control cells, and the change of log shares that they predict."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ._attention import Packing
from ._sparse import SparseCounts

PerturbationMark = Literal["learned", "constant", "none"]

#: expression of a perturbed gene in the input, as published: no value of log1p is near it
CONSTANT = -100.0
#: in a list of elements: nothing, and something that no training cell had and that is not measured
PADDING, UNKNOWN = -2, -1


class PerturbationHead(nn.Module):
    r"""What perturbations change in the log shares of genes, from no change at all.

    A perturbation is a set of elements: measured genes (by their column), and anything else that has a vector of its own
    (genes that are not measured, drugs; from ``n_genes`` on). With :math:`s_p = 1` for one element and a learned
    attenuation for several, the change in a cell with latent code :math:`z` is

    .. math::
        \Delta_p(z) = m_0 + \sum_{e \in p} m_e + \sum_o k_{po}\, (1 + r\,(z - \bar z) \cdot (z_o - \bar z))\, \alpha_o

    over the elements seen in training. :math:`\alpha_o`, (n_genes,), are the weights of a Gaussian process, one for each
    observed change :math:`o` of a perturbation in a context with mean code :math:`z_o`;
    :math:`k_{po} = s_p s_o |p \cap o|`, plus ``interaction`` where :math:`o` is of the same several elements. :math:`m_0`
    is what perturbations have in common, :math:`m_e` what elements held out in training led to expect of :math:`e` beyond
    that. Elements that were never seen change

    .. math::
        \lambda_1 W A (h(\text{mark}) - h) + \lambda_2 1_{g = e} + \lambda_3 \mathrm{cov}(\ell_g, \ell_e) / \mathrm{var}(\ell_e)

    with hidden states :math:`h` of the cell with and without a mark in its input, the decoder's output weights :math:`W`, a
    matrix :math:`A` that starts at zero, and the covariance over control cells of the decoder's logits :math:`\ell`.
    :math:`\lambda` is zero until held-out perturbations have shown that it should not be.

    Parameters
    ----------
    n_hidden, n_latent, n_genes
        Sizes.
    n_elements, n_own
        Number of elements of the training data, and of those that are no measured genes.
    n_observations
        Number of observed changes.
    mark
        ``"learned"``: a vector from the gene's embedding through a small network (or the element's own), plus a shared one.
        ``"constant"``: the gene's expression is set to -100. ``"none"``: the shared vector alone, the same for all.
    """

    elements: Tensor
    membership: Tensor
    weights: Tensor
    places: Tensor
    centre: Tensor
    common: Tensor
    expected: Tensor
    variance: Tensor
    new_variance: Tensor
    trust: Tensor
    covariance: Tensor
    slope: Tensor
    attenuation: Tensor
    interaction: Tensor

    def __init__(
        self,
        n_hidden: int,
        n_latent: int,
        n_genes: int,
        n_elements: int,
        n_own: int,
        n_observations: int,
        mark: PerturbationMark = "learned",
    ):
        super().__init__()
        self.mark, self.n_genes = mark, n_genes
        self.own = nn.Parameter(torch.randn(n_own, n_hidden) / n_hidden**0.5)
        self.shared = nn.Parameter(torch.randn(n_hidden))
        self.network = nn.Sequential(
            nn.LayerNorm(n_hidden), nn.Linear(n_hidden, n_hidden), nn.GELU(), nn.Linear(n_hidden, n_hidden)
        )
        self.change = nn.Linear(n_hidden, n_hidden, bias=False)
        nn.init.zeros_(self.change.weight)
        buffers = {
            "elements": torch.zeros(n_elements, dtype=torch.int64),
            "membership": torch.zeros(n_observations, n_elements, dtype=torch.uint8),
            "weights": torch.zeros(n_observations, n_genes),
            "places": torch.zeros(n_observations, n_latent),
            "centre": torch.zeros(n_latent),
            "common": torch.zeros(n_genes),
            "expected": torch.zeros(n_elements, n_genes),
            "variance": torch.zeros(n_elements, n_genes),
            "new_variance": torch.zeros(n_genes),
            "trust": torch.zeros(3),
            "covariance": torch.zeros(n_hidden, n_hidden),
            "slope": torch.zeros(()),
            "attenuation": torch.ones(()),
            "interaction": torch.zeros(()),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)
        for parameter in self.parameters():  # of `train_perturbation` alone
            parameter.requires_grad_(False)

    def forward(self, marked: Tensor, packing: Packing, expression: SparseCounts, embedding: Tensor) -> Tensor:
        """What marks add to the bags of genes.

        Parameters
        ----------
        marked
            Elements marked in each packed sample, (n_samples, k); ``PADDING`` for none, ``UNKNOWN`` for one never seen.
        packing
            The samples.
        expression
            Input features, (n_cells, n_genes).
        embedding
            Of genes, (n_genes, n_hidden).

        Returns
        -------
        (n_cells, n_hidden)
        """
        if self.mark == "none":
            return (marked != PADDING).any(1)[packing.segment, None] * self.shared
        bag = embedding.new_zeros(packing.segment.shape[0], embedding.shape[1])
        for element in marked.T:
            vector = self._vectors(element, embedding)
            if self.mark == "constant":
                bag = bag + CONSTANT * vector[packing.segment] - self._given(element, packing, expression, embedding)
            else:
                bag = bag + vector[packing.segment]
        if self.mark == "learned":
            bag = bag + (marked != PADDING).any(1)[packing.segment, None] * self.shared
        return bag

    def _vectors(self, element: Tensor, embedding: Tensor) -> Tensor:
        """Vector of each element, (n, n_hidden)."""
        gene = (element >= 0) & (element < self.n_genes)
        of_gene = embedding[element.clamp(0, self.n_genes - 1)]
        if self.mark == "learned":
            of_gene = self.network(of_gene)
        vectors = torch.where(gene[:, None], of_gene, torch.zeros_like(of_gene))
        if self.own.shape[0]:
            own = self.own[(element - self.n_genes).clamp(0, self.own.shape[0] - 1)]
            vectors = torch.where((element >= self.n_genes)[:, None], own, vectors)
        return vectors

    def _given(self, element: Tensor, packing: Packing, expression: SparseCounts, embedding: Tensor) -> Tensor:
        """What the gene's own expression adds to the bag, which the constant replaces, (n_cells, n_hidden)."""
        of_cell = element[packing.segment]
        here = expression.genes == of_cell[expression.rows]
        value = expression.values.new_zeros(expression.n_cells)
        value = value.index_add(0, expression.rows[here], expression.values[here])
        return value[:, None] * embedding[of_cell.clamp(0, self.n_genes - 1)]

    def from_marks(self, difference: Tensor, output_weight: Tensor) -> Tensor:
        """Change of logits that a mark led to, (n_cells, n_genes), from that of hidden states (n_cells, n_hidden)."""
        return self.change(difference) @ output_weight.T

    def own_genes(self, elements: Tensor) -> Tensor:
        """Which genes are perturbed, (n_genes,), from the codes of elements, (k,)."""
        genes = torch.zeros(self.n_genes, device=elements.device)
        genes[elements[(elements >= 0) & (elements < self.n_genes)]] = 1.0
        return genes

    def response(self, elements: Tensor, output_weight: Tensor) -> Tensor:
        """Slope over control cells of each gene's logit on that of the perturbed gene, (n_genes,), 0 for itself.

        Half of the regression to be expected of a gene that varies as the mean one does is taken off, so that a gene that does
        not vary has no slope.
        """
        gene = elements[(elements >= 0) & (elements < self.n_genes)]
        turned = output_weight @ self.covariance
        typical = (turned * output_weight).sum(1).mean()
        slopes = output_weight @ turned[gene].T / ((turned[gene] * output_weight[gene]).sum(1) + typical + 1e-12)
        slopes[gene, torch.arange(gene.shape[0], device=gene.device)] = 0.0
        return slopes.sum(1)

    def scale(self, n_elements: int) -> Tensor:
        """How much of the effect of each element remains in a perturbation of so many."""
        return torch.ones_like(self.attenuation) if n_elements < 2 else self.attenuation

    def kernel(self, known: Tensor, n_elements: int) -> Tensor:
        """Likeness of a perturbation to each observation, (n_observations,), by its known elements, (k,), indices."""
        common = self.membership[:, known].sum(1, dtype=torch.float32)
        size = self.membership.sum(1, dtype=torch.float32)
        scale = torch.where(size > 1, self.attenuation, torch.ones_like(self.attenuation))
        same = (common == size) & (size == n_elements) & (size > 1)
        return self.scale(n_elements) * scale * common + self.interaction * same

    def seen(self, z: Tensor, known: Tensor, n_elements: int) -> Tensor:
        """Change of log shares by the elements that training cells had, and by perturbation as such, (n_cells, n_genes).

        ``z`` is (n_cells, n_latent).
        """
        change = (self.common + self.expected[known].sum(0)).expand(z.shape[0], -1)
        k = self.kernel(known, n_elements)
        near = k.nonzero()[:, 0]
        if near.numel():
            place = 1 + self.slope * (z - self.centre) @ (self.places[near] - self.centre).T
            change = change + (place * k[near]) @ self.weights[near]
        return change

    def unseen(self, difference: Tensor, element: Tensor, output_weight: Tensor) -> Tensor:
        """Change of log shares by an element that no training cell had, beyond that by any, (n_cells, n_genes).

        ``difference`` is what its mark changes in hidden states, (n_cells, n_hidden).
        """
        by_mark = self.from_marks(difference, output_weight)
        own, response = self.own_genes(element), self.response(element, output_weight)
        return self.trust[0] * by_mark + self.trust[1] * own + self.trust[2] * response

    def variance_of(self, known: list[int], n_new: int) -> Tensor:
        """Variance of the mean change by known elements and so many new ones, (n_genes,)."""
        n_elements = len(known) + n_new
        variance = self.scale(n_elements) ** 2 * self.variance[known].sum(0) + n_new * self.new_variance
        if n_elements < 2 or n_new:
            return variance
        size = self.membership.sum(1)
        together = ((self.membership[:, known].sum(1) == size) & (size == n_elements)).any()
        # what elements do together is open until it was seen
        return variance if together else variance + self.interaction * self.new_variance


def perturbed_shares(log_shares: Tensor, change: Tensor) -> Tensor:
    """Shares of genes after a change of their logs, (..., n_genes); what other genes hold of the library takes part.

    ``log_shares`` are -inf for genes that were not measured.
    """
    before = log_shares.exp()
    after = before * change.exp()
    total = before.sum(-1, keepdim=True)
    rest = (1 - total).clamp_min(0.0)
    # a ratio that is 1 to the bit where nothing changes
    return after * ((total + rest) / (after.sum(-1, keepdim=True) + rest))
