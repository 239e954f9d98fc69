"""From a model's outputs to probabilities, and to the largest of them: one definition, in float32 numpy.

Example:
    >>> to_probabilities(np.float32([[0.0, 0.0]]), "logits")
    array([[0.5, 0.5]], dtype=float32)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eagleray.vision.bundle import Output

Float32 = npt.NDArray[np.float32]


def to_probabilities(outputs: Float32, output: Output) -> Float32:
    """Probabilities of a model's first output.

    Args:
        outputs: float32, shape (N, C).
        output: What the bundle says that they are.

    Returns:
        float32, shape (N, C): softmax of logits, sigmoid of multi-label logits, probabilities as they are.
    """
    if output == "probabilities":
        return outputs
    return sigmoid(outputs) if output == "multi_label_logits" else softmax(outputs)


def softmax(logits: Float32) -> Float32:
    """Probabilities of logits, float32 (N, C), along the last axis; the largest logit is taken off first."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


def sigmoid(logits: Float32) -> Float32:
    """Probabilities of logits, each for itself; float32, any shape; no overflow at either end."""
    small = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1.0, small) / (1.0 + small), np.float32)


def top_k(probabilities: Float32, k: int) -> tuple[np.ndarray, Float32]:
    """The k largest of each row, largest first; of equals the lower index comes first.

    Args:
        probabilities: float32, shape (N, C).
        k: 1..C.

    Returns:
        Indices (N, k) and values (N, k).
    """
    if k == probabilities.shape[1]:
        order = np.argsort(-probabilities, axis=1, kind="stable")
        return order, np.take_along_axis(probabilities, order, axis=1)
    found = np.sort(np.argpartition(-probabilities, k - 1, axis=1)[:, :k], axis=1)
    values = np.take_along_axis(probabilities, found, axis=1)
    # A partition takes any of several equals at its border: those rows, and only those, are sorted whole
    is_tied = (probabilities >= values.min(axis=1, keepdims=True)).sum(axis=1) > k
    if is_tied.any():
        found[is_tied] = np.argsort(-probabilities[is_tied], axis=1, kind="stable")[:, :k]
        values = np.take_along_axis(probabilities, found, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1), np.take_along_axis(values, order, axis=1)
