"""Evaluate a model as a Ray job: ``ray job submit -- python jobs/evaluate.py --recipe FILE key=value ...``.

The same flow as ``eagleray evaluate``. Keys are those of EvaluateConfig; the exit code is the error's (docs in README).
"""

from __future__ import annotations

import sys

from eagleray.flows.evaluate import EvaluateConfig, run
from eagleray.flows.job import run_job

if __name__ == "__main__":
    sys.exit(run_job(EvaluateConfig, run, sys.argv[1:]))
