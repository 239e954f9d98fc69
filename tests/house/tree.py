"""The project's tree as the README prints it: a remark a file, taken from the file itself, so that it cannot drift.

``python tests/house/tree.py`` (``make tree``) writes it into README.md; a test holds that it is there as it is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHOLE = ("platform", "jobs", "serve_apps", "cluster", "k8s", "docs")  # every file of these has a line
FOLDERS = ("tests",)  # of these the folders only: what a test is about stands in its name
REMARK_COLUMN, LONGEST_REMARK = 28, 110
MARKS = ("<!-- tree -->\n```text\n", "```\n<!-- /tree -->")

# Remarks of what cannot carry its own.
REMARKS = {
    "pyproject.toml": "what is declared: dependencies, extras, ruff, mypy, pytest",
    "constraints.txt": "what is pinned: a set of versions that was installed and tried together",
    "LICENSE": "Apache-2.0",
    "README.md": "this page",
    "CONTRIBUTING.md": "how to work on it, and the rules that tests hold",
    ".ci/run": "what CI runs: make test",
    "platform/": "the source root; it has no __init__.py: as a package it would shadow the stdlib's platform",
    "platform/eagleray/pages/templates/": "the page's Jinja templates",
    "platform/eagleray/pages/templates/blocks.html.j2": "one macro a kind of block",
    "platform/eagleray/pages/templates/page.html.j2": "the page",
    "platform/eagleray/pages/templates/style.html.j2": "its style, light and dark",
    "platform/eagleray/serving/templates/": "the page that a service shows",
    "platform/eagleray/serving/templates/drop.html": "drop a picture, see the answer: one file, nothing from elsewhere",
    "platform/eagleray/vision/sources/": "SOURCES: folder, zip, tar, WebDataset, Parquet, listing, URI",
    "platform/eagleray/infer/runtimes/": "RUNTIMES: torch, ONNX Runtime, OpenVINO",
    "jobs/": "one file a job for `ray job submit`",
    "jobs/recipes/": "named runs: differences from the defaults only",
    "cluster/": "what a cluster needs",
    "cluster/dashboards/": "Grafana",
    "cluster/dashboards/serving.json": "a service: rate, latency, queue, canaries, refusals",
    "k8s/": "KubeRay manifests",
    "serve_apps/": "Serve applications",
    "docs/": "why, and what was measured",
    "docs/openapi.json": "the HTTP API, made from the types of its answers",
    "docs/adr/": "decisions, one page each",
    "tests/": "laws, not lines",
    "tests/unit/": "no Ray, under a minute in all",
    "tests/contract/": "one law, tried on every entry of a table",
    "tests/journeys/": "the whole way on a real local Ray: faults, resumes, jobs",
    "tests/house/": "the rules of this house: imports, shapes, calls, this page",
    "tests/benchmarks/": "the speed table and its peers",
    "tests/golden/": "bundles of each release, which later ones must load and answer the same",
    "tests/data/": "small fixtures",
}


def files() -> list[str]:
    """Paths, relative to the root, that the tree lists; a folder ends with a slash."""
    tops = [path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")]
    found = {*tops, ".ci/run"}
    for top in WHOLE:
        found |= {p.relative_to(ROOT).as_posix() for p in (ROOT / top).rglob("*") if p.is_file() and is_source(p)}
    for top in FOLDERS:
        found |= {f"{top}/{p.name}/" for p in (ROOT / top).iterdir() if p.is_dir() and any(map(is_source, p.iterdir()))}
    return sorted(found)


def is_source(path: Path) -> bool:
    """What belongs to the project: no cache, no build, no empty package file."""
    parts = path.relative_to(ROOT).parts
    is_built = any(part == "__pycache__" or part.endswith(".egg-info") or part.startswith(".") for part in parts)
    return not is_built and path.name != "__init__.py" and path.suffix not in (".so", ".pyd")


def render(paths: Iterable[str]) -> str:
    """The tree as text: files of the root first, then each folder with what is in it."""
    lines: list[str] = []
    shown: set[str] = set()
    for path in sorted(paths, key=lambda p: ("/" in p, [(not part.endswith(".py"), part) for part in p.split("/")])):
        parts = path.rstrip("/").split("/")
        for depth in range(1, len(parts) + 1):
            part = "/".join(parts[:depth])
            is_folder = depth < len(parts) or path.endswith("/")
            name = part + "/" if is_folder else part
            if name not in shown:
                shown.add(name)
                label = "  " * (depth - 1) + parts[depth - 1] + ("/" if is_folder else "")
                lines.append(f"{label.ljust(REMARK_COLUMN)}  {remark(name)}".rstrip())
    return "\n".join(lines) + "\n"


def remark(name: str) -> str:
    """What a file or folder is for: its docstring's first sentence, its first comment or heading, or a REMARKS row."""
    if name in REMARKS:
        return REMARKS[name]
    path = ROOT / name
    if path.is_dir():
        path = path / "__init__.py"
        if not path.exists():
            return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".py":
        said = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
    elif path.suffix in (".c", ".h"):
        said = text.removeprefix("/* ").partition("\n")[0]
    else:
        said = next((line.lstrip("# ") for line in text.splitlines() if re.match(r"#+ \S", line)), "")
    return shorten(said)


def shorten(said: str) -> str:
    """The first sentence, cut at a clause when it is long."""
    said = re.sub(r"``?", "", said).split(". ")[0].rstrip(".")
    while len(said) > LONGEST_REMARK and re.search(r"[,;:] ", said):
        said = re.split(r"[,;:] (?!.*[,;:] )", said)[0]
    return said


def write() -> None:
    """Puts the tree into README.md."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    readme.write_text(f"{before}{MARKS[0]}{render(files())}{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    write()
