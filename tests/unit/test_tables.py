"""Plug-in tables: a name to a lazy target; what is not there is said with what is."""

from __future__ import annotations

import sys

import pytest
from eagleray.core.errors import CapabilityError, ConfigError, EagleError
from eagleray.core.tables import Entry, installed, resolve

TABLE = {
    "here": Entry("json:dumps"),
    "also": Entry("json:loads", needs="json"),
    "absent": Entry("eagleray_absent:Thing", extra="openvino", needs="eagleray_absent"),
}


def test_a_name_gives_its_target() -> None:
    import json

    assert resolve(TABLE, "here", what="codec") is json.dumps


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as error:
        resolve(TABLE, "hree", what="codec")
    assert error.value.seen == "unknown codec 'hree'"
    assert error.value.expected == "one of here, also, absent"


def test_a_missing_package_gives_the_line_that_installs_it() -> None:
    with pytest.raises(CapabilityError) as error:
        resolve(TABLE, "absent", what="codec")
    assert "eagleray[openvino]" in error.value.fix
    assert "here, also" in error.value.expected


def test_installed_imports_nothing() -> None:
    table = {"torch": Entry("torch:nn", needs="torch")}
    before = set(sys.modules)
    assert installed(TABLE) == ("here", "also")
    assert installed(table) in (("torch",), ())
    assert not {name for name in set(sys.modules) - before if name.startswith("torch")}


def test_every_error_has_its_own_exit_code() -> None:
    kinds = EagleError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert sorted(codes) == list(range(2, 15))
    assert len(set(codes)) == len(kinds)


def test_an_error_crosses_a_process_border_whole() -> None:
    import pickle

    made = pickle.loads(pickle.dumps(ConfigError("a", expected="b", fix="c")))
    assert (type(made), made.seen, made.expected, made.fix) == (ConfigError, "a", "b", "c")
    assert str(made) == "a\n  expected: b\n  do: c"
