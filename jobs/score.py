"""Score an archive as a Ray job: ``ray job submit -- python jobs/score.py --recipe FILE key=value ...``.

The same flow as ``eagleray score``. Keys are those of ScoreConfig; the exit code is the error's (docs in README).
"""

from __future__ import annotations

import sys

from eagleray.flows.job import run_job
from eagleray.flows.score import ScoreConfig, run

if __name__ == "__main__":
    sys.exit(run_job(ScoreConfig, run, sys.argv[1:]))
