"""Where units run: in child processes of this machine, or as Ray Data over a pool of actors. The work is the same.

A worker is a class of a lower floor, built once from JSON settings and then called with one unit (a JSON dict) at a
time; it returns counts. Pixels and image bytes never pass through here: a unit names what to read, the worker writes
the result itself and commits it to the ledger.

A worker that dies is replaced and its unit is given out again. The ledger counts the attempts, so a unit that kills its
worker is opened with care the third time, and nothing is retried for ever.

Example:
    >>> pool = Pool(workers=2)
    >>> for counts in map_units(units, "eagleray.infer.scoring:ShardScorer", settings, pool): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eagleray.flows.pool import Pool, cores


def map_units(
    units: Sequence[Mapping[str, Any]], factory: str, settings: Mapping[str, Any], pool: Pool
) -> Iterator[dict[str, Any]]:
    """Runs every unit once and yields what each returned, in order of completion.

    Args:
        units: JSON dicts; each has ``unit``, its id.
        factory: ``"module:Class"`` of the worker.
        settings: JSON dict, the worker's one constructor argument.
        pool: Where.

    Raises:
        EagleError: What a worker raised; the other workers are stopped.
        ClusterError: Workers die before they can start.
    """
    if not units:
        return iter(())
    if pool.is_local:
        from eagleray.flows.local_pool import map_local

        return map_local(units, factory, settings, max(1, min(pool.workers or cores(), len(units))))
    from eagleray.flows.runtime import map_on_ray

    return map_on_ray(units, factory, settings, pool)
