"""The GPU memory that models may take, measured: what was free before a model was loaded less what is free after it.

No estimate from a file's size holds for every engine, so nothing is estimated: the budget is looked at before the first
model is loaded and after each, and a model that does not fit is put away and refused with both figures. Other processes
that allocate on the same card at that very moment are counted to the model.

Example:
    >>> memory = GpuMemory(budget_mib=4096)
    >>> memory.check_free()
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from eagleray.core.errors import CapabilityError

MIB = 2**20


def free_bytes() -> int:
    """Free memory of the first device that CUDA_VISIBLE_DEVICES leaves.

    Raises:
        CapabilityError: There is no such device.
    """
    from eagleray.infer.runtimes.cuda_driver import open_driver

    return open_driver().memory_info()[0]


class GpuMemory:
    """What is left of a budget.

    Args:
        budget_mib: What all models together may take.
        read_free: Gives the device's free bytes.
    """

    def __init__(self, budget_mib: int, *, read_free: Callable[[], int] = free_bytes) -> None:
        self._budget, self._read_free = budget_mib * MIB, read_free
        self._taken: dict[str, int] = {}
        self._before = 0

    @property
    def taken_mib(self) -> float:
        """What the loaded models take."""
        return sum(self._taken.values()) / MIB

    def is_within(self, *, without: Collection[str] = ()) -> bool:
        """Whether all that is loaded, or would be without some models, fits the budget."""
        return sum(size for name, size in self._taken.items() if name not in without) <= self._budget

    def check_free(self) -> None:
        """Looks whether the device has what the budget promises; before the first model.

        Raises:
            CapabilityError: It has not.
        """
        free = self._read_free()
        if free < self._budget:
            raise CapabilityError(
                f"the GPU has {free // MIB} MiB free",
                expected=f"memory.gpu_memory_mib={self._budget // MIB} or more",
                fix="lower memory.gpu_memory_mib, or place the replica on a card with room",
            )

    def begin(self) -> None:
        """Before a model is loaded."""
        self._before = self._read_free()

    def end(self, name: str) -> None:
        """After a model is loaded: counts what it took."""
        self._taken[name] = max(0, self._before - self._read_free())

    def forget(self, name: str) -> None:
        """A model is out of memory."""
        self._taken.pop(name, None)

    def refusal(self, name: str) -> CapabilityError:
        """What to say of a model that does not fit beside those that stay."""
        others = sum(size for other, size in self._taken.items() if other != name)
        return CapabilityError(
            f"{name} takes {self._taken.get(name, 0) // MIB} MiB of GPU memory, beside {others // MIB} MiB of others",
            expected=f"at most memory.gpu_memory_mib={self._budget // MIB} for all",
            fix="raise the budget, lower memory.max_loaded_models, or serve a smaller model",
        )
