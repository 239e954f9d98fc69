"""Structural pruning: whole channels, hidden units or heads taken out of a timm model, what depends on them with them.

torch-pruning finds by tracing which layers must shrink together (a residual stage, a depthwise convolution and its
squeeze-and-excite, a norm). How much is asked in multiply-adds, which is what an engine's time goes by: the share of
channels that comes nearest is searched for. What is left is a multiple of ``round_to``, as the kernels of CPUs and GPUs
want it. The result is made anew from its widths (vision/widths.py), so that what is handed out is what will be loaded.

Convolutional networks lose channels everywhere but in the embedding. Transformers keep their residual width, which is
their embedding's, and lose hidden units of their MLPs, or whole heads: the width of a head stays.

A pruned model wants a short training: `eagleray finetune --from BUNDLE`, mode full.

Source: Fang et al. 2023, DepGraph. Magnitude: Li et al. 2017. BN scale: Liu et al. 2017, network slimming. Taylor:
Molchanov et al. 2019, equation 8.

Example:
    >>> pruned = prune(model, ratio=0.3, example_x=torch.zeros(1, 3, 128, 128))
    >>> pruned.macs_before, pruned.macs_after, backbones.saved_args(pruned.model)["channels"]["conv_stem"]
    (125365248, 87747712, [24, 3, 1])
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eagleray.core.config import Config
from eagleray.core.errors import CapabilityError, ConfigError
from eagleray.vision import backbones
from eagleray.vision.widths import CHANNELS, differences

MOST_RATIO = 0.95  # of the channels of a layer, and of the multiply-adds: beyond it there is no model left to fine-tune
FAR = 0.1  # of all multiply-adds: what misses the ratio by more is not what was asked for
SEARCH_STEPS = 8  # halvings of the share of channels: 0.4 %, below one step of eight of a thousand channels
NEAR = 0.005  # of those asked for: what is nearer to them than this is not searched for any further
INSTALL = "pip install 'eagleray[prune]'"
EXPECTED = "an architecture of convolutions, linear layers, norms and timm's attention"
OTHERS = "prune a ResNet, an EfficientNet, a MobileNet or a plain ViT; or keep the layers that are named"


class PruneSettings(Config):
    """How channels are chosen.

    Attributes:
        importance: ``magnitude``: the L2 norm of a group's weights; ``bn_scale``: the scale of its batch norms;
            ``taylor``: weight times gradient, where the model's gradients are those of a loss.
        scope: ``uniform``: every layer loses the same share; ``global``: the least important of all layers together.
        transformer: What a transformer loses.
        keeps_embedding: Whether the embedding stays as wide; a transformer's always does.
    """

    importance: Literal["magnitude", "bn_scale", "taylor"] = "magnitude"
    scope: Literal["uniform", "global"] = "uniform"
    transformer: Literal["mlp", "heads", "both"] = "mlp"
    keeps_embedding: bool = True

    @model_validator(mode="after")
    def _agrees(self) -> PruneSettings:
        if self.scope == "global" and self.transformer != "mlp":
            raise ValueError("heads go by layer: give scope=uniform with transformer=heads or both")
        return self


@dataclass(frozen=True)
class _Plan:
    """What does not change while the share of channels is searched for."""

    kept: tuple[str, ...]
    round_to: int
    settings: PruneSettings


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned model and what it saves.

    Attributes:
        model: In eval mode, on the CPU; ``backbones.saved_args`` of it makes the same again.
        channels: Layer name to its widths, where they are not timm's; see vision/widths.py.
        macs_before: Multiply-adds of one image.
        macs_after: Likewise, of what is left.
        params_before: Parameters.
        params_after: Likewise, of what is left.
    """

    model: nn.Module
    channels: Mapping[str, Sequence[int]]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int

    def to_json(self) -> dict[str, int]:
        """The counts, for a lineage."""
        names = ("macs_before", "macs_after", "params_before", "params_after")
        return {name: getattr(self, name) for name in names}


def prune(
    model: nn.Module,
    *,
    ratio: float,
    example_x: torch.Tensor,
    keep: Sequence[str] = (),
    round_to: int = 8,
    settings: PruneSettings | None = None,
) -> Pruned:
    """Takes channels out of a copy of a timm model until it needs so many multiply-adds less.

    Args:
        model: A timm classifier, as ``backbones.create`` makes it, pruned before or not. It stays as it is.
        ratio: Share of the multiply-adds to take away, 0 to 1 exclusive; what is reached is the nearest that whole
            steps of ``round_to`` channels allow.
        example_x: float (1, 3, H, W): the size of the input that the multiply-adds are counted for.
        keep: Names of layers that stay as wide as they are, and with them what they depend on; the classifier's outputs
            stay always.
        round_to: What the channels of a pruned layer are a multiple of.
        settings: See PruneSettings.

    Raises:
        ConfigError: A ratio or rounding out of range, an unknown layer, more than this architecture can lose, or an
            importance that it has nothing for.
        CapabilityError: torch-pruning is not installed, or the architecture cannot be traced or rebuilt.
    """
    chosen = settings or PruneSettings()
    _check(model, ratio, keep, round_to, chosen)
    macs_before, params_before = count_macs(model, example_x), count_params(model)

    plan = _Plan(_kept(model, example_x, keep, chosen), round_to, chosen)

    def tried(share: float) -> tuple[int, nn.Module]:
        cut = _cut(model, share, example_x, plan)
        return count_macs(cut, example_x), cut

    target = (1 - ratio) * macs_before
    macs_after, cut = _nearest(tried, target)
    if macs_after == macs_before or macs_after - target > FAR * macs_before:
        raise ConfigError(
            f"{backbones.architecture_of(model)} can lose {1 - macs_after / macs_before:.0%} of its multiply-adds, in "
            f"steps of {round_to} channels; {ratio:.0%} were asked for",
            expected="a ratio that it can lose",
            fix="give a smaller ratio, fewer layers to keep, or transformer=both for a transformer",
        )
    made = _rebuilt(model, cut, example_x)
    return Pruned(
        made, made.pruned_channels, macs_before, macs_after, params_before, count_params(made)  # type: ignore[arg-type]
    )  # fmt: skip


def count_macs(model: nn.Module, example_x: torch.Tensor) -> int:
    """Multiply-adds of a forward pass: of convolutions and matrix products, attention's too, as torch counts them."""
    with torch.inference_mode(), _unfused(model), FlopCounterMode(display=False) as counter:
        model(example_x)
    return int(counter.get_total_flops()) // 2


def count_params(model: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _check(model: nn.Module, ratio: float, keep: Sequence[str], round_to: int, settings: PruneSettings) -> None:
    if not 0 < ratio <= MOST_RATIO:
        raise ConfigError(
            f"a ratio of {ratio:g}", expected=f"a share of the multiply-adds, above 0 and up to {MOST_RATIO:g}",
            fix="give e.g. 0.3",
        )  # fmt: skip
    if round_to < 1:
        raise ConfigError(f"round_to {round_to}", expected="1 or more", fix="give 8")
    names = [name for name, _ in model.named_modules() if name]
    unknown = [name for name in keep if name not in names]
    if unknown:
        near = [one for name in unknown for one in difflib.get_close_matches(name, names, n=1)]
        raise ConfigError(
            f"{backbones.architecture_of(model)} has no layer {', '.join(unknown)}",
            expected=f"names as {', '.join(near or names[:5])}",
            fix="name layers as model.named_modules() does",
        )
    has_norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if settings.importance == "bn_scale" and not has_norms:
        raise ConfigError(
            f"{backbones.architecture_of(model)} has no batch norm, whose scale would say what matters",
            expected="importance magnitude or taylor",
            fix="give importance=magnitude",
        )
    without = sum(one.grad is None for one in model.parameters())
    if settings.importance == "taylor" and without:
        raise ConfigError(
            f"importance=taylor, and {without} parameters have no gradient",
            expected="the gradients of a loss over some images",
            fix="call backward first, or give importance=magnitude",
        )


def _nearest(tried: Callable[[float], tuple[int, nn.Module]], target: float) -> tuple[int, nn.Module]:
    """The model whose multiply-adds come nearest to a target, by halving the share of channels between none and most.

    What is above and what is below the target are both kept: the steps of small layers are coarse.
    """
    low, high = 0.0, MOST_RATIO
    seen = [tried(high)]
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        seen.append(tried(middle))
        if abs(seen[-1][0] - target) < NEAR * target:
            break
        if seen[-1][0] > target:
            low = middle
        else:
            high = middle
    return min(seen, key=lambda one: abs(one[0] - target))


def _cut(model: nn.Module, share: float, example_x: torch.Tensor, plan: _Plan) -> nn.Module:
    """A copy of the model without a share of its channels, pruned by torch-pruning."""
    tp, settings = _torch_pruning(), plan.settings
    copied = _trainable(model)
    attentions = {
        layer.qkv: layer for layer in copied.modules() if hasattr(layer, "attn_dim") and hasattr(layer, "qkv")
    }
    heads = {qkv: int(attention.num_heads) for qkv, attention in attentions.items()}
    lost = {qkv: min(count - 1, round(share * count)) for qkv, count in heads.items()}  # one head stays
    prunes_heads = settings.transformer != "mlp" and any(lost.values())
    with _tracing(copied):
        pruner = _pruner(tp)(
            copied,
            example_x,
            importance=_importance(tp, settings),
            global_pruning=settings.scope == "global",
            pruning_ratio=share,
            max_pruning_ratio=MOST_RATIO,
            ignored_layers=[backbones.head(copied), *(copied.get_submodule(name) for name in plan.kept)],
            round_to=plan.round_to,
            num_heads=heads,
            prune_num_heads=prunes_heads,
            prune_head_dims=False,
            # it takes the ceiling of the ratio times the heads
            head_pruning_ratio_dict={qkv: max(0.0, (count - 0.5) / heads[qkv]) for qkv, count in lost.items()},
            in_channel_groups={},  # its own defaults are dicts that every call shares
            out_channel_groups={},
        )
        pruner.step()
    for qkv, attention in attentions.items():
        attention.num_heads = heads[qkv]
        attention.attn_dim = heads[qkv] * attention.head_dim
    copied.zero_grad()
    return copied.eval()


def _trainable(model: nn.Module) -> nn.Module:
    """A copy whose parameters all take a gradient, which tracing follows; their gradients come along."""
    copied = copy.deepcopy(model).eval().requires_grad_(True)
    for ours, its in zip(copied.parameters(), model.parameters(), strict=True):
        ours.grad = None if its.grad is None else its.grad.clone()
    return copied


@contextlib.contextmanager
def _tracing(model: nn.Module) -> Iterator[None]:
    """Within it torch-pruning may trace and cut: what it raises of an architecture that it cannot follow is ours.

    Raises:
        CapabilityError: It raised.
    """
    try:
        with _unfused(model), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the class token and the positions, whose width stays
            yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CapabilityError(
            f"torch-pruning cannot prune {backbones.architecture_of(model)}: {reason}", expected=EXPECTED, fix=OTHERS
        ) from error


@contextlib.contextmanager
def _unfused(model: nn.Module) -> Iterator[None]:
    """Writes attention out as products within it: tracing and counting see those, and not the fused kernel."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    try:
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise CapabilityError("torch-pruning is not installed", expected="the extra 'prune'", fix=INSTALL) from None
    return torch_pruning


def _pruner(tp: Any) -> Any:
    """torch-pruning's pruner, which rounds to the nearest multiple; its own rounds down, 16 to 8 at a ratio of 0.05."""

    class Nearest(tp.pruner.BasePruner):  # type: ignore[misc]
        def _round_to(self, n_pruned: int, current_channels: int, round_to: int) -> int:
            left = max(round_to, round((current_channels - n_pruned) / round_to) * round_to)
            return max(0, current_channels - left)

    return Nearest


def _importance(tp: Any, settings: PruneSettings) -> Any:
    if settings.importance == "bn_scale":
        return tp.importance.BNScaleImportance()
    if settings.importance == "taylor":
        return tp.importance.GroupTaylorImportance()
    return tp.importance.GroupMagnitudeImportance(p=2)


def _kept(model: nn.Module, example_x: torch.Tensor, keep: Sequence[str], settings: PruneSettings) -> tuple[str, ...]:
    """The names of the layers that stay as wide as they are, besides the classifier."""
    modules = dict(model.named_modules())
    names = list(keep)
    names += [name for name, layer in modules.items() if hasattr(layer, "num_heads") and not hasattr(layer, "attn_dim")]
    is_transformer = any(hasattr(layer, "num_heads") for layer in modules.values())
    if is_transformer and settings.transformer == "heads":
        names += [name for name, layer in modules.items() if isinstance(layer, nn.Linear) and not name.endswith(".qkv")]
    if is_transformer or settings.keeps_embedding:
        names += _makers_of_embedding(model, example_x)
    return tuple(dict.fromkeys(names))


def _makers_of_embedding(model: nn.Module, example_x: torch.Tensor) -> list[str]:
    """The names of the layers whose outputs are the embedding, or are added to what is: the classifier's inputs tie
    them."""
    tp, copied = _torch_pruning(), _trainable(model)
    found: set[nn.Module] = set()
    with _tracing(copied):
        graph = tp.DependencyGraph().build_dependency(copied, example_inputs=example_x)
        for layer in backbones.head(copied).modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                cut = graph.get_pruner_of_module(layer).prune_in_channels
                group = graph.get_pruning_group(layer, cut, [0])
                found |= {dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)}
    return [
        name for name, layer in copied.named_modules() if layer in found and isinstance(layer, nn.Conv2d | nn.Linear)
    ]


def _rebuilt(model: nn.Module, cut: nn.Module, example_x: torch.Tensor) -> nn.Module:
    """The pruned model made anew from its widths, as loading a bundle makes it.

    Raises:
        CapabilityError: The widths do not say all that was changed.
    """
    name, args = backbones.architecture_of(model), backbones.saved_args(model)
    args.pop(CHANNELS, None)
    plain = backbones.Backbone(name=name, num_classes=int(model.num_classes), model_args=args)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        wide, made = backbones.create(plain), backbones.create(plain)
    with torch.inference_mode():
        features = cut.forward_features(example_x)  # type: ignore[operator]
        _, embedding = backbones.logits_and_embedding(cut, example_x)
    if cut.num_features not in features.shape[1:]:
        cut.num_features = features.shape[1]
    cut.head_hidden_size = embedding.shape[1]
    channels = differences(wide, cut)
    backbones.mark_pruned(made, channels)
    wanted, have = cut.state_dict(), made.state_dict()
    wrong = [key for key in wanted if key not in have or have[key].shape != wanted[key].shape]
    if not wrong:
        made.load_state_dict(wanted)
        with torch.inference_mode(), _unfused(made), _unfused(cut):
            wrong = [] if torch.equal(made(example_x), cut(example_x)) else ["its outputs"]
    if wrong:
        raise CapabilityError(
            f"a pruned {name} cannot be made again from its widths: {', '.join(wrong[:3])} would differ",
            expected=EXPECTED,
            fix=OTHERS,
        )
    return made.eval()
