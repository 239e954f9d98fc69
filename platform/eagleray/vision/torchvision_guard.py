"""Lets timm and lightly import beside a torchvision whose compiled operators do not fit the installed torch.

The registry's torchvision is a CUDA build. Beside a CPU build of torch its ``_C.so`` does not load, and then ``import
torchvision`` (hence timm) dies with "operator torchvision::nms does not exist", though nothing here calls it.
Declaring the two schemas is all that the import needs. Where the library loads, nothing is done.
``torchvision.io`` and ``torchvision.ops`` stay unusable under the shim, so Eagleray uses neither.

Example:
    >>> ensure_importable()  # before timm, lightly or torchvision is imported
    'declared'
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

State = Literal["absent", "native", "declared"]
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []  # a torch.library.Library drops its schemas when it is collected


def ensure_importable() -> State:
    """Declares torchvision's operators when, and only when, importing torchvision would fail without.

    Returns:
        "absent" when there is no torchvision, "native" when its own operators load, "declared" when the schemas had to
        be declared.
    """
    if _kept:
        return "declared"
    if "torchvision.ops" in sys.modules:
        return "native"
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return "absent"
    if loads_operators(Path(spec.origin).parent):
        return "native"
    _kept.append(_declare("torchvision"))
    return "declared"


def loads_operators(folder: Path) -> bool:
    """Whether torchvision's compiled operators load beside the installed torch.

    Args:
        folder: The folder of the torchvision package.
    """
    import torch

    if _has_operator("torchvision", "nms"):
        return True
    for library in sorted([*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]):
        try:
            torch.ops.load_library(str(library))
        except OSError:  # a missing CUDA library or an unknown symbol: the build does not fit
            continue
        if _has_operator("torchvision", "nms"):
            return True
    return False


def _has_operator(namespace: str, name: str) -> bool:
    import torch

    return hasattr(getattr(torch.ops, namespace), name)


def _declare(namespace: str) -> Any:
    import torch

    library = torch.library.Library(namespace, "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    return library
