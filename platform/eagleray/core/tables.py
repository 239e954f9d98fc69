"""Plug-in tables: a name to a lazy ``"module:attribute"`` target. A table can be read; nothing registers itself.

Example:
    >>> RUNTIMES = {"onnx": Entry("eagleray.infer.runtimes.onnx_runtime:OnnxRuntime", extra="onnx")}
    >>> resolve(RUNTIMES, "onnx", what="runtime")
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eagleray.core.errors import CapabilityError, ConfigError

BUILDS = ("", "-gpu", "-cu13", "-cu12")  # of one import name, several distributions: onnxruntime-gpu, tensorrt-cu13


@dataclass(frozen=True)
class Entry:
    """One row of a table.

    Attributes:
        target: ``"package.module:attribute"``, imported on first use.
        extra: The extra of pyproject.toml that brings what the target imports; empty when the core has it.
        needs: The import name whose presence tells whether the entry can be used here; empty when always.
        instead: The import name of another build of the same package, which will do as well.
    """

    target: str
    extra: str = ""
    needs: str = ""
    instead: str = ""

    @property
    def package(self) -> str:
        """The import name of what is here of what will do; of what is needed when nothing is."""
        from importlib.util import find_spec

        return self.instead if self.instead and find_spec(self.needs) is None and self.is_installed else self.needs

    @property
    def version(self) -> str:
        """The version of the package that the entry needs; empty when it needs none or none says."""
        from importlib import metadata

        for package in filter(None, (self.needs, self.instead)):
            for build in BUILDS:
                try:
                    return metadata.version(package + build)
                except (metadata.PackageNotFoundError, ValueError):
                    continue
        return ""

    @property
    def is_installed(self) -> bool:
        """Whether what the entry needs can be found, without importing it."""
        from importlib.util import find_spec

        names = [name for name in (self.needs, self.instead) if name]
        return not names or any(find_spec(name) is not None for name in names)


def resolve(table: Mapping[str, Entry], name: str, *, what: str) -> Any:
    """Imports the target of one entry.

    Args:
        table: The table, e.g. RUNTIMES.
        name: The entry's name.
        what: The table's noun, for the message.

    Raises:
        ConfigError, CapabilityError: As ``find`` says.
    """
    module, attribute = find(table, name, what=what).target.split(":")
    return getattr(importlib.import_module(module), attribute)


def find(table: Mapping[str, Entry], name: str, *, what: str) -> Entry:
    """One entry, not imported yet; it is there and what it needs is installed.

    Args:
        table: The table, e.g. RUNTIMES.
        name: The entry's name.
        what: The table's noun, for the message.

    Raises:
        ConfigError: The name is not in the table; the message lists the names.
        CapabilityError: What the entry needs is not installed; the message gives the install line.
    """
    if name not in table:
        raise ConfigError(f"unknown {what} {name!r}", expected=f"one of {', '.join(table)}", fix=f"name another {what}")
    entry = table[name]
    if not entry.is_installed:
        raise CapabilityError(
            f"{what} {name!r} needs the package {entry.needs!r}, which is not installed",
            expected=f"one of those installed: {', '.join(installed(table)) or 'none'}",
            fix=f'pip install "eagleray[{entry.extra}]" -c constraints.txt',
        )
    return entry


def installed(table: Mapping[str, Entry]) -> tuple[str, ...]:
    """The names whose needs are met on this machine, in table order."""
    return tuple(name for name, entry in table.items() if entry.is_installed)
