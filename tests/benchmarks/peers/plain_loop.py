"""Peer: learn.training's loop called in one plain process: no Ray, no run folder, no reports, no checkpoints."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import stopwatch
import torch
from eagleray.learn.training import Hooks, train


def main() -> None:
    args = stopwatch.options(flow="eagleray.flows.pretrain", config="")
    flow = importlib.import_module(args.flow)
    config = flow.CONFIG.model_validate(json.loads(Path(args.config).read_bytes()))
    torch.set_num_threads(args.threads)
    work, watch = flow.make_work(config.model_copy(update={"seed": args.seed})), stopwatch.Stopwatch(args.warm)

    def on_step(progress, output) -> None:
        if work.watch is not None:
            work.watch.on_step(progress, output)
        watch.step(config.batch_size)

    prepare = work.watch.prepare if work.watch is not None else None
    batches = work.batches(rank=0, world_size=1)
    result = train(work.task, batches, work.settings, hooks=Hooks(prepare=prepare, on_step=on_step))
    watch.tell(loss=result.report.loss)


if __name__ == "__main__":
    main()
