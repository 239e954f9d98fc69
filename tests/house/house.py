"""Reads the project's syntax trees for the house tests: modules, what they import and when, what they call."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("platform", "jobs", "serve_apps")
LAZY_TARGET = re.compile(r"^(eagleray(?:\.\w+)+):\w+$")  # a row of a table: imported on use, an edge all the same


@dataclass(frozen=True)
class Import:
    """One edge: the dotted name that is imported, where, and whether it happens when the module is loaded."""

    name: str
    line: int
    is_at_load: bool
    is_for_types: bool = False
    is_target: bool = False
    names: tuple[str, ...] = ()  # of ``from name import a, b``: name.a, name.b


@dataclass(frozen=True)
class Module:
    """One Python file of the project."""

    path: Path
    name: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    @property
    def where(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def floor(self) -> str:
        """``core``, ``vision``, ... or ``jobs`` or ``serve_apps``; ``""`` for eagleray/__init__.py."""
        parts = self.name.split(".")
        return (parts[1] if len(parts) > 1 else "") if parts[0] == "eagleray" else parts[0]

    @functools.cached_property
    def imports(self) -> list[Import]:
        return list(find_imports(self.tree, self.name))


@functools.cache
def modules() -> tuple[Module, ...]:
    """Every module of the code that ships."""
    found = []
    for folder in CODE:
        base = ROOT / folder if folder == "platform" else ROOT
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Module(path, name, path.read_text(encoding="utf-8")))
    return tuple(found)


def module_of(source: str, name: str = "eagleray.core.sample") -> Module:
    """A module of a text, to try a rule on."""
    return Module(ROOT / "platform" / (name.replace(".", "/") + ".py"), name, source)


def find_imports(tree: ast.Module, name: str) -> Iterator[Import]:
    """All imports of a tree: static, in functions, by ``import_module("...")``, and the targets of lazy tables."""

    def walk(node: ast.AST, is_at_load: bool, is_for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            at_load = is_at_load and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and child in node.body:
                yield from read(child, at_load, True)
                yield from walk(child, at_load, True)
            else:
                yield from read(child, at_load, is_for_types)
                yield from walk(child, at_load, is_for_types)

    def read(node: ast.AST, at_load: bool, for_types: bool) -> Iterator[Import]:
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, line, at_load, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: banned by ruff, resolved here so that no rule is evaded
                base = ".".join([*name.split(".")[: -node.level], *([node.module] if node.module else [])])
            names = tuple(f"{base}.{alias.name}" for alias in node.names)
            yield Import(base, line, at_load, for_types, names=names)
            yield from (Import(name, line, at_load, for_types) for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield Import(str(node.args[0].value), line, at_load, for_types)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            target = LAZY_TARGET.match(node.value)
            if target:
                yield Import(target[1], line, False, for_types, is_target=True)

    yield from walk(tree, True, False)


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def calls(module: Module) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its full dotted name, aliases of imports resolved: ``I.open`` is ``PIL.Image.open``."""
    aliases = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            aliases.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module:
            aliases.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            yield aliases.get(first, first) + dot + rest, node


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for a keyword; None when it is not given, ``...`` when it is no constant."""
    for given in call.keywords:
        if given.arg == name:
            return given.value.value if isinstance(given.value, ast.Constant) else ...
    return None
