"""Certify a model as a Ray job: ``ray job submit -- python jobs/certify.py --recipe FILE key=value ...``.

The same flow as ``eagleray certify``. Keys are those of CertifyConfig; the exit code is the error's (docs in README).
"""

from __future__ import annotations

import sys

from eagleray.flows.certify import CertifyConfig, run
from eagleray.flows.job import run_job

if __name__ == "__main__":
    sys.exit(run_job(CertifyConfig, run, sys.argv[1:]))
