"""How momentum and temperature move over a run, as the papers write it.

Steps count from 0; a step beyond the last keeps the last value, so that a resumed run may be longer than planned.

Example:
    >>> cosine(0, 100, start=0.996, end=1.0), cosine(100, 100, start=0.996, end=1.0)
    (0.996, 1.0)
"""

from __future__ import annotations

from eagleray.learn.selfsup.upstream import cosine_schedule


def cosine(step: int, num_steps: int, *, start: float, end: float) -> float:
    """A half cosine from ``start`` to ``end``: end - (end - start) (cos(pi k / K) + 1) / 2.

    Args:
        step: k, from 0.
        num_steps: K.
        start: The value at k = 0.
        end: The value at k = K and after.

    Source: BYOL, section 3.3 (tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2); DINO, section 3.1, uses the same.
    lightly's function ends at K - 1: given K + 1 it is the papers' to the bit.
    """
    return cosine_schedule(min(step, num_steps), num_steps + 1, start, end)


def linear_warmup(step: int, warmup_steps: int, *, start: float, end: float) -> float:
    """A line from ``start`` to ``end`` over the first steps, then ``end``.

    Args:
        step: From 0.
        warmup_steps: Where ``end`` is reached; 0 for at once.
        start: The value at step 0.
        end: The value from ``warmup_steps`` on.

    Source: DINO, section 3.2, "a linear warm-up for tau_t from 0.04 to 0.07 during the first 30 epochs".
    """
    return end if step >= warmup_steps else start + (end - start) * step / warmup_steps


def warmup_cosine(step: int, num_steps: int, *, warmup_steps: int, peak: float, end: float) -> float:
    """A line from 0 to ``peak``, then a half cosine to ``end`` over what is left.

    Args:
        step: From 0.
        num_steps: Steps of the whole run.
        warmup_steps: Where ``peak`` is reached.
        peak: The highest value.
        end: The value at ``num_steps``.

    Source: SimCLR, section 2.3: linear warm-up over 10 epochs, then cosine decay (Loshchilov and Hutter 2017).
    """
    if step < warmup_steps:
        return linear_warmup(step, warmup_steps, start=0.0, end=peak)
    return cosine(step - warmup_steps, num_steps - warmup_steps, start=peak, end=end)
