"""Ingest sources into a corpus as a Ray job: ``ray job submit -- python jobs/ingest.py --recipe FILE key=value ...``.

The same flow as ``eagleray ingest``. Keys are those of IngestConfig; the exit code is the error's (docs in README).
"""

from __future__ import annotations

import sys

from eagleray.flows.ingest import IngestConfig, run
from eagleray.flows.job import run_job

if __name__ == "__main__":
    sys.exit(run_job(IngestConfig, run, sys.argv[1:]))
