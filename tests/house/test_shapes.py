"""The tail stays short: files, functions and parameter lists within their budgets; files are named by nouns."""

from __future__ import annotations

import ast

from house import ROOT, functions, module_of, modules

MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 60, 6
VAGUE = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "misc"}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a caller has to think of: without self and cls."""
    given = function.args
    named = [a.arg for a in [*given.posonlyargs, *given.args]]
    own = named[1:] if named[:1] in (["self"], ["cls"]) else named
    return len(own) + len(given.kwonlyargs) + bool(given.vararg) + bool(given.kwarg)


def test_no_file_is_over_its_budget() -> None:
    long = {m.where: m.text.count("\n") for m in modules() if m.text.count("\n") > MOST_LINES}
    assert long == {}


def test_no_function_is_over_its_budget() -> None:
    long = {
        f"{m.where}:{f.lineno} {f.name}": f.end_lineno - f.lineno + 1
        for m in modules()
        for f in functions(m)
        if f.end_lineno and f.end_lineno - f.lineno + 1 > MOST_FUNCTION_LINES
    }
    assert long == {}


def test_no_function_has_too_many_parameters() -> None:
    """In cli/ a parameter is an option, named as its Config field, and does not count."""
    many = {
        f"{m.where}:{f.lineno} {f.name}": parameters(f)
        for m in modules()
        if m.floor != "cli"
        for f in functions(m)
        if parameters(f) > MOST_PARAMETERS
    }
    assert many == {}


def test_files_are_nouns_that_say_what_is_inside() -> None:
    assert [m.where for m in modules() if set(m.path.stem.split("_")) & VAGUE] == []
    folders = {m.path.parent for m in modules()}
    assert [str(f.relative_to(ROOT)) for f in folders if f.name in VAGUE] == []


def test_every_module_says_why_it_exists() -> None:
    assert [m.where for m in modules() if m.text.strip() and not ast.get_docstring(m.tree)] == []


def test_parameters_are_counted_without_self() -> None:
    tree = module_of("class A:\n    def f(self, a, b=1, *c, d, **e): ...").tree
    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    assert parameters(function) == 5
