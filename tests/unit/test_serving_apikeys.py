"""``eagleray apikeys``: the secret is shown once, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eagleray.cli.main import app
from eagleray.serving.access import KeyFile
from typer.testing import CliRunner


def run(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["apikeys", *words])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def test_a_key_is_made_listed_and_ended(path: str) -> None:
    code, out, _ = run("create", "--keys", path, "--tenant", "acme", "--model", "lite0", "--model", "b", "--json")
    assert code == 0
    made = json.loads(out)
    assert made["models"] == ["lite0", "b"]
    assert KeyFile(path).authorize([(b"x-api-key", made["key"].encode())]).tenant == "acme"
    assert Path(path).stat().st_mode & 0o777 == 0o600

    code, out, _ = run("list", "--keys", path)
    assert code == 0
    assert made["id"] in out
    assert "valid" in out
    assert made["key"] not in out
    assert "digest" not in run("list", "--keys", path, "--json")[1]

    code, out, _ = run("revoke", made["id"], "--keys", path)
    assert code == 0
    assert "revoked" in run("list", "--keys", path)[1]


def test_the_text_shows_the_key_once(path: str) -> None:
    code, out, err = run("create", "--keys", path, "--tenant", "acme", "--expires-days", "30", "--burst", "40")
    assert code == 0
    key = next(word for word in out.split() if word.startswith("er_") and len(word) == 80)
    assert (out + err).count(key) == 1
    assert json.loads(run("list", "--keys", path, "--json")[1])[0]["burst"] == 40


def test_a_whole_key_that_was_typed_is_ended_and_not_repeated(path: str) -> None:
    made = json.loads(run("create", "--keys", path, "--tenant", "acme", "--json")[1])
    code, out, err = run("revoke", made["key"], "--keys", path)
    assert code == 0
    assert made["key"] not in out + err


@pytest.mark.parametrize(
    "words",
    [
        ("create",),
        ("create", "--tenant", "a b"),
        ("create", "--tenant", "a", "--action", "root"),
        ("list",),
        ("revoke",),
        ("revoke", "0" * 12),
        ("rotate",),
    ],
)
def test_what_cannot_be_done_says_why(path: str, words: tuple[str, ...]) -> None:
    code, _, err = run(*words, "--keys", path)
    assert code == 2
    assert "do: " in err
    assert "Traceback" not in err
