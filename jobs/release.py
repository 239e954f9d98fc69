"""Release a model as a Ray job: ``ray job submit -- python jobs/release.py --recipe FILE key=value ...``.

The same flow as ``eagleray release``. Keys are those of ReleaseConfig; the exit code is the error's (docs in README).
"""

from __future__ import annotations

import sys

from eagleray.flows.job import run_job
from eagleray.flows.release import ReleaseConfig, run

if __name__ == "__main__":
    sys.exit(run_job(ReleaseConfig, run, sys.argv[1:]))
