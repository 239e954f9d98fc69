"""Eagleray: image recognition on Ray. Every image of an archive is scored exactly once, or set aside with a reason.

The floors, from the ground up; imports run downward only (tests/house proves it):

- ``core``    knows no images, no torch, no Ray: errors, config, storage, commits, records, progress.
- ``vision``  bytes to pixels, sources, corpora, bundles.
- ``learn``   how weights change.   ``infer``   how weights are used.   ``assure``  how results are judged.
- ``pages``   reports as HTML.      ``serving`` batching without Ray.   ``federation`` rounds without Flower.
- ``flows``   the only floor that imports Ray and Flower: it decides where and when, never what.
- ``cli``     verbs of the ``eagleray`` command; ``jobs/`` and ``serve_apps/`` stand beside it.

Example:
    >>> import eagleray
    >>> scores = eagleray.open_scores("runs/archive")  # a pyarrow Dataset over exactly the parts that count
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "open_scores": "eagleray.core.commits:open_scores",
    "load_bundle": "eagleray.vision.bundle:load_bundle",
    "Classifier": "eagleray.infer.classifier:Classifier",
}

__all__ = ["PUBLIC", "__version__", *PUBLIC]  # noqa: PLE0604  names of PUBLIC, resolved on first use


def __getattr__(name: str) -> Any:
    """Resolves a public name on first use, so that ``import eagleray`` loads nothing else (PEP 562)."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'eagleray' has no attribute {name!r}; it has {', '.join(PUBLIC)}")
    module, attribute = PUBLIC[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
