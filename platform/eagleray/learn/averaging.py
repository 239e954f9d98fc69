"""The exponential moving average of a task's weights.

Example:
    >>> average = Average(task, decay=0.999)
    >>> average.update(task)
    >>> model.load_state_dict(average.state)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from eagleray.learn import parallel


class Average:
    """Keeps ``average = decay * average + (1 - decay) * weights`` (Polyak, Juditsky 1992, as used since Inception).

    The decay rises as ``(1 + n) / (10 + n)`` over the first updates n, so that a short run is not its start. Buffers
    (running statistics, counters) are copied.

    Args:
        module: What is averaged.
        decay: 0 to 1, exclusive.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self.state: dict[str, torch.Tensor] = {
            name: value.detach().clone() for name, value in module.state_dict().items()
        }
        self._averaged = {name for name, _ in module.named_parameters()} & set(self.state)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def update(self, module: nn.Module) -> None:
        """Takes the weights of one more step in."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        now = module.state_dict()
        names = [name for name in self.state if name in self._averaged and self.state[name].is_floating_point()]
        if names:
            torch._foreach_lerp_([self.state[name] for name in names], [now[name] for name in names], 1 - decay)
        averaged = set(names)
        for name, value in self.state.items():
            if name not in averaged:
                value.copy_(now[name])

    def state_dict(self) -> dict[str, object]:
        """For ``load_state_dict``, bit for bit."""
        return {"num_updates": self.num_updates, "state": dict(self.state)}

    def load_state_dict(self, kept: Mapping[str, object]) -> None:
        """Goes on from what ``state_dict`` gave."""
        self.num_updates = int(kept["num_updates"])  # type: ignore[call-overload]
        for name, value in kept["state"].items():  # type: ignore[attr-defined]
            self.state[name].copy_(value)


@contextmanager
def as_kept(module: nn.Module, average: Average | None) -> Iterator[None]:
    """Within it a module is in eval mode and has the weights of its bundle: averaged ones, rank 0's statistics.

    Afterwards it is as it was, bit for bit.
    """
    is_another = average is not None or parallel.world_size() > 1  # else the weights are those already
    own = {name: value.detach().clone() for name, value in module.state_dict().items()} if is_another else {}
    if average is not None:
        module.load_state_dict(average.state)
    parallel.share_buffers(module)
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if is_another:
            module.load_state_dict(own)
        module.train()
