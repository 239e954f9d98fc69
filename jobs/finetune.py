"""Fine-tune a classifier as a Ray job: ``ray job submit -- python jobs/finetune.py --recipe FILE key=value ...``.

The same flow as ``eagleray finetune``. Keys are those of FinetuneConfig; the exit code is the error's (docs in README).
"""

from __future__ import annotations

import sys

from eagleray.flows.finetune import FinetuneConfig, run
from eagleray.flows.job import run_job

if __name__ == "__main__":
    sys.exit(run_job(FinetuneConfig, run, sys.argv[1:]))
