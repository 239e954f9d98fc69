"""What a distillation is told. Of its own, as a flow's Config carries it and loads no torch.

Example:
    >>> DistillSettings(temperature=2.0, alpha=0.9, feature_weight=1.0)
"""

from __future__ import annotations

from pydantic import Field, model_validator

from eagleray.core.config import Config


class DistillSettings(Config):
    """How a teacher teaches.

    Attributes:
        temperature: T, which both logits are divided by: the higher, the more the teacher's small probabilities say.
        alpha: Weight of the teacher's answers, 0 to 1; the labels have the rest. An image without a label has the
            teacher's part alone.
        feature_weight: Weight of the match of embeddings; 0: none.
        use_unlabelled: Learn from images without a label too.
        cache_teacher: Ask the teacher once an image, by the scoring path, and not in each step. It then sees the image
            as it is scored, and not the student's crop of it: cheaper by the teacher's forward pass, and less is learnt
            where crops are strong. Any bundle can teach so, an ONNX graph too.
    """

    temperature: float = Field(4.0, gt=0)
    alpha: float = Field(0.5, ge=0, le=1)
    feature_weight: float = Field(0.0, ge=0)
    use_unlabelled: bool = True
    cache_teacher: bool = False

    @model_validator(mode="after")
    def _teaches(self) -> DistillSettings:
        if not self.alpha and not self.feature_weight:
            raise ValueError("alpha=0 and feature_weight=0: the teacher would say nothing")
        return self
