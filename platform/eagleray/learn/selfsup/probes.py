"""How good a representation is while it is learnt: nearest neighbours and a line on features that get no gradient.

Both probes are modules whose buffers say all: a resumed run goes on with the same bank and weights. With several
workers each calls them with its own rows of the batch: they see the union, so all hold the same state.

Example:
    >>> probe = KnnProbe(width, num_classes=6)
    >>> probe.observe(output.embedding, labels, keys)
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import normalize, one_hot

from eagleray.core.errors import DataError
from eagleray.learn.selfsup.synchronization import gathered

NUM_NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's evaluation: its best k, and the temperature of Wu et al.
UNLABELLED = -1
ROWS = 1024  # queries at a time: 1,024 x 50,000 similarities are 200 MB


def weighted_knn(
    similarity: torch.Tensor, labels: torch.Tensor, *, num_classes: int, k: int, temperature: float
) -> torch.Tensor:
    """The votes of the nearest neighbours, each exp(similarity / temperature): float (Q, C).

    Args:
        similarity: Cosines of queries and bank, float (Q, B); -inf for a pair that does not count.
        labels: Classes of the bank, int64 (B,).
        num_classes: C.
        k: Neighbours that vote; all of the bank when it holds fewer.
        temperature: tau.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section
    3.4. Votes are relative to the nearest neighbour's, exp((s - s_max) / tau): the same order, and no overflow.
    """
    nearest, places = similarity.topk(min(k, similarity.shape[1]), dim=1)
    counts = torch.isfinite(nearest)
    votes = torch.where(counts, ((nearest - nearest[:, :1]) / temperature).exp(), 0.0)
    return votes.new_zeros(len(votes), num_classes).scatter_add_(1, labels[places], votes)


def knn_leave_one_out(
    embeddings: torch.Tensor, labels: torch.Tensor, k: int = NUM_NEIGHBOURS, temperature: float = TEMPERATURE
) -> torch.Tensor:
    """The class that the neighbours of each image give it, itself left out: int64 (N,).

    Args:
        embeddings: Float (N, D), N >= 2, of any length.
        labels: Classes, int64 (N,), from 0.
        k: Neighbours that vote.
        temperature: As ``weighted_knn``.

    Raises:
        DataError: Fewer than two images, not one label an image, or a label below 0.
    """
    if len(embeddings) < 2 or labels.shape != embeddings.shape[:1] or int(labels.min()) < 0:
        raise DataError(
            f"{len(embeddings)} embeddings with labels of shape {tuple(labels.shape)}",
            expected="two images or more, each with a class from 0",
            fix="leave out the images without a label",
        )
    unit, num_classes = normalize(embeddings.float(), dim=1), int(labels.max()) + 1
    predicted = []
    for start in range(0, len(unit), ROWS):
        similarity = unit[start : start + ROWS] @ unit.T
        rows = torch.arange(len(similarity), device=unit.device)
        similarity[rows, rows + start] = -torch.inf
        votes = weighted_knn(similarity, labels, num_classes=num_classes, k=k, temperature=temperature)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


class KnnProbe(nn.Module):  # type: ignore[misc]
    """Weighted nearest neighbours in a bank of the latest labelled embeddings.

    Args:
        width: D.
        num_classes: C.
        size: Embeddings that the bank holds, the oldest going first.
        k: Neighbours that vote.
        temperature: As ``weighted_knn``.
    """

    def __init__(
        self,
        width: int,
        *,
        num_classes: int,
        size: int = 4096,
        k: int = NUM_NEIGHBOURS,
        temperature: float = TEMPERATURE,
    ) -> None:
        super().__init__()
        self.num_classes, self.k, self.temperature = num_classes, k, temperature
        self.register_buffer("bank", torch.zeros(size, width))
        self.register_buffer("labels", torch.full((size,), UNLABELLED))
        self.register_buffer("keys", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(
        self, embedding: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Whether the bank tells each labelled image's class right, then takes the batch in.

        Args:
            embedding: Float (N, D).
            labels: Classes, int64 (N,), -1 where there is none.
            keys: What tells images apart, uint64 or int64 (N,): an image's own embedding of an epoch ago has no vote.

        Returns:
            Bool, one for each labelled image of all workers; None while the bank holds fewer than k.
        """
        unit, labels = gathered(normalize(embedding.detach().float(), dim=1)), gathered(labels)
        own = None if keys is None else gathered(keys.view(torch.int64))
        is_labelled = labels != UNLABELLED
        unit, labels = unit[is_labelled], labels[is_labelled]
        own = own if own is None else own[is_labelled]
        filled = min(int(self.seen), len(self.bank))
        right = None
        if filled >= self.k and len(unit):
            similarity = unit @ self.bank[:filled].T
            if own is not None:
                similarity[own[:, None] == self.keys[:filled]] = -torch.inf
            bank_labels = self.labels[:filled]
            votes = weighted_knn(
                similarity, bank_labels, num_classes=self.num_classes, k=self.k, temperature=self.temperature
            )
            right = votes.argmax(1) == labels
        self._take(unit, labels, own)
        return right

    def _take(self, unit: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor | None) -> None:
        size = len(self.bank)
        places = (torch.arange(len(unit), device=unit.device) + self.seen) % size
        last = slice(max(0, len(unit) - size), None)
        self.bank[places[last]] = unit[last]
        self.labels[places[last]] = labels[last]
        if keys is not None:
            self.keys[places[last]] = keys[last]
        self.seen += len(unit)


class LinearProbe(nn.Module):  # type: ignore[misc]
    """A linear classifier that learns beside the backbone, from features that carry no gradient back.

    Features are standardized by the batch, so that one learning rate does for every backbone; the weights are buffers,
    moved here by gradient descent with momentum: no optimizer of the run sees them.

    Args:
        width: D.
        num_classes: C.
        learning_rate: Of the descent.
        momentum: Of the descent.

    Source: SimCLR, appendix on linear evaluation: a classifier on the encoder "with a stop_gradient on the input",
    trained beside it. The gradient of the mean cross-entropy of a softmax is (p - y)^T x / N.
    """

    def __init__(self, width: int, *, num_classes: int, learning_rate: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__()
        self.num_classes, self.learning_rate, self.momentum = num_classes, learning_rate, momentum
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.register_buffer("weight", torch.zeros(num_classes, width + 1))  # the last column is the bias
        self.register_buffer("velocity", torch.zeros(num_classes, width + 1))

    @torch.no_grad()
    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """The logits of float (N, D): float (N, C)."""
        return self._inputs(embedding) @ self.weight.T

    @torch.no_grad()
    def observe(self, embedding: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        """Whether each labelled image's class is told right, then learns from the batch.

        Args:
            embedding: Float (N, D).
            labels: Classes, int64 (N,), -1 where there is none.

        Returns:
            Bool, one for each labelled image of all workers; None when fewer than two are labelled.
        """
        embedding, labels = gathered(embedding.detach().float()), gathered(labels)
        is_labelled = labels != UNLABELLED
        if int(is_labelled.sum()) < 2:
            return None
        inputs, labels = self._inputs(embedding[is_labelled]), labels[is_labelled]
        logits = inputs @ self.weight.T
        wrong_by = logits.softmax(1) - one_hot(labels, self.num_classes)
        self.velocity.mul_(self.momentum).add_(wrong_by.T @ inputs / len(inputs))
        self.weight.sub_(self.learning_rate * self.velocity)
        return logits.argmax(1) == labels

    def _inputs(self, embedding: torch.Tensor) -> torch.Tensor:
        standard = self.norm(embedding.float())
        return torch.cat([standard, standard.new_ones(len(standard), 1)], dim=1)
