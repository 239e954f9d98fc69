"""What a view's colours go through, for whole batches, on the device where they lie: jitter, gray, blur, solarize.

The operations and their order are those of lightly's transforms (which are torchvision's on Pillow images): brightness,
contrast, saturation and hue in random order, each held to 0..255; grayscale; blur; solarize; normalize. Two things
differ, by less than a level: nothing is cut down to a whole level between the steps (Pillow loses half a level a
step), and the blur extends the picture's edge once, not once for each of Pillow's three passes.

Every image has random numbers of its own (draws.py), and only operations that give the same bits at any place of any
array are used (no matrix product, no sum in floating point of what is not whole), so a view's pixels are the same alone
and in any batch, with any number of threads. Rows are sorted into groups that go through the same steps, so that there
is no loop over images and a step costs only the rows that take it.

Example:
    >>> views = Photometric(plan)(batch, epoch=0)
    >>> [tuple(view.shape) for view in views]
    [(64, 3, 224, 224), (64, 3, 224, 224)]
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from eagleray.learn.draws import uniforms
from eagleray.learn.selfsup.colours import NUM_DRAWS, Blend, Blur, Chunk, Colours
from eagleray.learn.selfsup.views import ViewPlan, colour_streams
from eagleray.vision.resample import to_planes

# Shares of red, green and blue in gray. Source: ITU-R BT.601, as Pillow's convert("L").
_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114
_WHITE = 255.0
_ONES, _ZEROS = np.ones(3, np.float32), np.zeros(3, np.float32)
# Values of a chunk. On a CPU flat from 300,000 to 1,300,000: the caches ask for less, the calls for more.
_CHUNK_CPU = 640_000
_CHUNK_DEVICE = 64_000_000


class Photometric(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy here
    """uint8 crops to float views.

    Args:
        plan: The views.
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, plan: ViewPlan) -> None:
        super().__init__()
        self.plan, self._memory = plan, _Memory()
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (plan.mean, plan.std))
        self.register_buffer("scale", 1 / (_WHITE * std), persistent=False)
        self.register_buffer("bias", -mean / std, persistent=False)
        self.register_buffer("centres", torch.tensor([0.0, 2.0, -2.0]).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def forward(self, batch: Mapping[str, Tensor], epoch: int) -> list[Tensor]:
        """Views of a batch.

        Args:
            batch: ``view_0``, ``view_1``, ...: uint8 (N, size_px, size_px, 3) on the device of this module; ``key``:
                uint64 (N,), best left on the CPU, where it is read.
            epoch: With seed and key, what seeds the random numbers.

        Returns:
            One float32 (N, 3, size_px, size_px) a view, normalized.
        """
        key, views = batch["key"].cpu().numpy(), list[Tensor]()
        for spec in self.plan.views:
            numbers = range(len(views), len(views) + spec.num)
            draws = uniforms(
                seed=self.plan.seed, epoch=epoch, keys=key, streams=colour_streams(numbers), count=NUM_DRAWS
            )
            # rows: all images of the first of these views, then of the next
            colours = Colours.draw(spec, draws.transpose(1, 0, 2).reshape(-1, NUM_DRAWS))
            rows = self._coloured([batch[f"view_{number}"] for number in numbers], colours)
            views.extend(rows.chunk(spec.num))
        return views

    def _coloured(self, crops: list[Tensor], colours: Colours) -> Tensor:
        """float32 (R, 3, H, W) of uint8 (N, H, W, 3) of each view alike."""
        count, height, width, _ = crops[0].shape
        device = crops[0].device
        most = max(1, (_CHUNK_CPU if _is_cpu(device) else _CHUNK_DEVICE) // (3 * height * width))
        out = self._memory.take((len(crops) * count, 3, height, width), device)
        outs = out.unbind(0)
        rows_u8 = [row for crop in crops for row in crop.numpy()] if _is_cpu(device) else torch.cat(crops)
        scratch = self._memory.take((min(most, len(out)), 3, height, width), device)
        for chunk in colours.chunks(most, device):
            x = scratch[: len(chunk.places)]
            _load(x, rows_u8, chunk)
            self._jitter(x, chunk)
            if len(chunk.gray):
                x.index_copy_(0, chunk.gray, _gray(x.index_select(0, chunk.gray)).unsqueeze(1).expand(-1, 3, -1, -1))
            for blur in chunk.blurs:
                _blur(x[blur.start : blur.stop], blur)
            if len(chunk.solarized):
                chosen = x.index_select(0, chunk.solarized)
                # the same as inverting from 128 on, for whole levels
                x.index_copy_(0, chunk.solarized, torch.minimum(chosen, _WHITE - chosen))
            x.mul_(self.scale).add_(self.bias)
            torch._foreach_copy_([outs[row] for row in chunk.places], x.unbind(0))
        return out

    def _jitter(self, x: Tensor, chunk: Chunk) -> None:
        for step, blend in enumerate(chunk.blends):
            if step == chunk.hue_at:
                _turn_hue(x, chunk, self.centres)
            _blend(x, blend)
        if chunk.hue_at == len(chunk.blends):
            _turn_hue(x, chunk, self.centres)


def _is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


class _Memory:
    """float32 memory on a CPU, used again once no tensor lies over it.

    What is given back to the system comes again as zeroed pages at the first touch: 0.2 to 2.4 ms an image for DINO's
    views, of 4 to 6 ms in all (docs/log.md). numpy asks for huge pages, torch does not. A device's allocator keeps its
    memory by itself.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[NDArray[np.float32]]] = {}

    def __reduce__(self) -> tuple[type[_Memory], tuple[()]]:
        return _Memory, ()

    def take(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Memory that nobody else holds, of any content."""
        if not _is_cpu(device):
            return torch.empty(shape, device=device)
        free = self._free.setdefault(shape, [])
        try:
            whole = free.pop()
        except IndexError:
            whole = np.empty(shape, np.float32)
        lease = whole[:]  # the tensor's memory holds this array, and nothing else does
        weakref.finalize(lease, free.append, whole).atexit = False
        return torch.from_numpy(lease)


def _load(x: Tensor, rows_u8: list[NDArray[np.uint8]] | Tensor, chunk: Chunk) -> None:
    """Bytes of a chunk's rows, (H, W, 3) each, to planes of floats: (n, 3, H, W)."""
    if isinstance(rows_u8, Tensor):
        x.copy_(rows_u8.index_select(0, chunk.rows).permute(0, 3, 1, 2))
        return
    # 0.01 ms a 224 px view; torch's own permuting copy takes 0.06 (docs/log.md)
    for row, planes in zip(chunk.places, x.numpy(), strict=True):
        to_planes(rows_u8[row], _ONES, _ZEROS, planes)


def _gray(x: Tensor) -> Tensor:
    """(n, H, W) of (n, 3, H, W)."""
    return torch.mul(x[:, 0], _RED).add_(x[:, 1], alpha=_GREEN).add_(x[:, 2], alpha=_BLUE)


def _blend(x: Tensor, blend: Blend) -> None:
    """Brightness, contrast or saturation, in place."""
    factor, gray_weight, level_weight = blend.weights
    if not blend.has_gray:
        x.mul_(factor.unsqueeze(1))
    else:
        gray = _gray(x)
        rest = gray * gray_weight
        if blend.has_level:
            # whole levels, as Pillow's, have an exact sum whatever the order of the additions
            level = gray.round_().sum(-1).long().sum(-1).float() / (x.shape[2] * x.shape[3])
            rest.add_(level[:, None, None] * level_weight)
        torch.addcmul(rest.unsqueeze(1), x, factor.unsqueeze(1), out=x)
    if blend.can_overflow:
        x.clamp_(0, _WHITE)


def _turn_hue(x: Tensor, chunk: Chunk, centres: Tensor) -> None:
    """Turns the hue of (n, 3, H, W), in place; value and saturation stay (HSV, as torchvision's adjust_hue).

    A channel is full within one sixth of the circle from its own hue, gone two sixths from it, and linear in between.
    So the distance from red, in sixths, is 1 + green + blue - red, each on the scale from the lowest to the highest
    channel.
    """
    red, green, blue = x.unbind(1)
    high = torch.maximum(red, green)
    low = torch.minimum(red, green)
    torch.maximum(high, blue, out=high)
    torch.minimum(low, blue, out=low)
    chroma = high.sub_(low)
    hue = (green + blue).sub_(red).sub_(low).add_(chroma)
    # without chroma there is no hue, and whatever comes out is multiplied by 0
    hue.div_(chroma.clamp_min(1e-3))
    torch.copysign(hue, green - blue, out=hue)
    hue.add_(chunk.turn)
    if chunk.is_far:
        hue.sub_(hue.div(6).round_().mul_(6))
    torch.sub(hue.unsqueeze(1), centres, out=x)
    # 1 + the share of the channel that is there: 1 to 2 on a circle of 6
    x.abs_().sub_(3).abs_().clamp_(1, 2)
    torch.addcmul(low.sub_(chroma).unsqueeze(1), x, chroma.unsqueeze(1), out=x)


def _blur(x: Tensor, blur: Blur) -> None:
    """A separable symmetric blur of (n, 3, H, W), in place; the edge goes on beyond the picture."""
    radius, (height, width) = len(blur.taps) - 1, x.shape[2:]
    padded = functional.pad(x, (radius, radius, radius, radius), mode="replicate")
    columns = torch.mul(padded[:, :, radius : radius + height], blur.taps[0])
    pair = torch.empty_like(columns)
    for step in range(1, radius + 1):
        above, below = radius - step, radius + step
        torch.add(padded[:, :, above : above + height], padded[:, :, below : below + height], out=pair)
        columns.addcmul_(pair, blur.taps[step])
    torch.mul(columns[..., radius : radius + width], blur.taps[0], out=x)
    pair = pair.view(-1)[: x.numel()].view(x.shape)
    for step in range(1, radius + 1):
        left, right = radius - step, radius + step
        torch.add(columns[..., left : left + width], columns[..., right : right + width], out=pair)
        x.addcmul_(pair, blur.taps[step])
