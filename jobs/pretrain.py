"""Pretrain a backbone as a Ray job: ``ray job submit -- python jobs/pretrain.py --recipe FILE key=value ...``.

The same flow as ``eagleray pretrain``. Keys are those of PretrainConfig; the exit code is the error's (docs in README).
"""

from __future__ import annotations

import sys

from eagleray.flows.job import run_job
from eagleray.flows.pretrain import PretrainConfig, run

if __name__ == "__main__":
    sys.exit(run_job(PretrainConfig, run, sys.argv[1:]))
