"""API keys: what a file says of them, what a request's headers must hold, and when a revoked one ends."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from eagleray.core.errors import ConfigError
from eagleray.serving.access import KeyFile, KeyRequest, create_key, read_keys, revoke_key
from eagleray.serving.refusals import Refusal


class Clock:
    def __init__(self, now: float = 1.8e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + key.encode())]


def refused(keys: KeyFile, headers: list[tuple[bytes, bytes]]) -> str:
    with pytest.raises(Refusal) as caught:
        keys.authorize(headers)
    assert caught.value.status == 401
    assert dict(caught.value.headers)["www-authenticate"].startswith("Bearer")
    return caught.value.code


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_opens_and_its_secret_is_kept_nowhere(path: Path) -> None:
    record, key = create_key(path, KeyRequest(tenant="acme", models=("lite0",)))
    assert KeyFile(path).authorize(bearer(key)) == record
    assert KeyFile(path).authorize([(b"x-api-key", key.encode())]) == record
    secret = key.rsplit("_", 1)[1]
    assert secret not in path.read_text()
    assert len(secret) == 64
    assert path.stat().st_mode & 0o777 == 0o600


def test_two_equal_requests_have_two_keys_that_share_nothing(path: Path) -> None:
    (one, first), (two, second) = (create_key(path, KeyRequest(tenant="acme")) for _ in range(2))
    assert one.id != two.id
    assert one.salt != two.salt
    assert one.digest != two.digest
    keys = KeyFile(path)
    crossed = f"er_{one.id}_{second.rsplit('_', 1)[1]}"
    assert refused(keys, bearer(crossed)) == "wrong_key"
    assert keys.authorize(bearer(first)).id == one.id


@pytest.mark.parametrize(
    "alter",
    [
        lambda key: key[:-1] + ("0" if key[-1] != "0" else "1"),
        lambda key: key + "0",
        lambda key: key[:-1],
        lambda key: key.upper(),
        lambda key: "er_000000000000_" + "0" * 64,
        lambda key: "",
        lambda key: "\u00ff\u00fe",
        lambda key: "x" * 100_000,
        lambda key: key.split("_")[1],
    ],
)
def test_what_is_not_the_key_opens_nothing(path: Path, alter) -> None:
    _, key = create_key(path, KeyRequest(tenant="acme"))
    value = alter(key).encode("latin-1")
    assert refused(KeyFile(path), [(b"x-api-key", value)]) == "wrong_key"


def test_no_key_is_another_answer_than_a_wrong_one(path: Path) -> None:
    create_key(path, KeyRequest(tenant="acme"))
    assert refused(KeyFile(path), [(b"host", b"x")]) == "missing_key"


def test_basic_is_no_bearer_and_two_keys_are_none(path: Path) -> None:
    _, key = create_key(path, KeyRequest(tenant="acme"))
    _, other = create_key(path, KeyRequest(tenant="other"))
    keys = KeyFile(path)
    assert refused(keys, [(b"authorization", b"Basic " + key.encode())]) == "wrong_key"
    assert refused(keys, [*bearer(key), (b"x-api-key", other.encode())]) == "wrong_key"
    assert refused(keys, [*bearer(key), *bearer(other)]) == "wrong_key"
    assert keys.authorize([*bearer(key), (b"x-api-key", key.encode())]).tenant == "acme"
    assert keys.authorize([(b"authorization", b"bEARER  " + key.encode())]).tenant == "acme"


def test_a_key_ends_when_it_expires(path: Path) -> None:
    record, key = create_key(path, KeyRequest(tenant="acme", expires_days=1))
    assert record.expires is not None
    clock = Clock(record.expires.timestamp() - 1)
    keys = KeyFile(path, clock=clock)
    assert keys.authorize(bearer(key)).tenant == "acme"
    clock.now += 1
    assert refused(keys, bearer(key)) == "wrong_key"


def test_a_revoked_key_ends_within_the_time_that_is_stated(path: Path) -> None:
    record, key = create_key(path, KeyRequest(tenant="acme"))
    clock = Clock()
    keys = KeyFile(path, clock=clock, check_every_s=1.0)
    keys.authorize(bearer(key))
    assert revoke_key(path, record.id).revoked is not None
    clock.now += 1.0
    assert refused(keys, bearer(key)) == "wrong_key"
    assert revoke_key(path, record.id) == read_keys(path).keys[0]  # again: nothing new


def test_a_new_key_opens_without_a_restart(path: Path) -> None:
    create_key(path, KeyRequest(tenant="acme"))
    clock = Clock()
    keys = KeyFile(path, clock=clock)
    _, key = create_key(path, KeyRequest(tenant="other"))
    clock.now += 1
    assert keys.authorize(bearer(key)).tenant == "other"


def test_a_file_that_is_gone_opens_nothing_and_one_that_does_not_hold_changes_nothing(path: Path, caplog) -> None:
    _, key = create_key(path, KeyRequest(tenant="acme"))
    clock = Clock()
    keys = KeyFile(path, clock=clock)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    clock.now += 1
    assert keys.authorize(bearer(key)).tenant == "acme"
    assert "does not hold" in caplog.text
    path.unlink()
    clock.now += 1
    assert refused(keys, bearer(key)) == "wrong_key"
    path.write_bytes(whole)
    path.chmod(0o600)
    clock.now += 1
    assert keys.authorize(bearer(key)).tenant == "acme"
    assert key.rsplit("_", 1)[1] not in caplog.text


def failing(monkeypatch: pytest.MonkeyPatch, path: Path, number: int | None) -> None:
    """Opening the file fails, as for a service that is not root; None = it does no more."""
    whole = Path.open

    def opened(self: Path, *args: object, **more: object) -> object:
        if self == path and number is not None:
            raise OSError(number, os.strerror(number))
        return whole(self, *args, **more)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ELOOP])
def test_a_file_that_may_not_be_read_opens_nothing_until_it_may(path: Path, monkeypatch, number: int, caplog) -> None:
    record, key = create_key(path, KeyRequest(tenant="acme"))
    _, other = create_key(path, KeyRequest(tenant="other"))
    clock = Clock()
    keys = KeyFile(path, clock=clock)
    revoke_key(path, record.id)
    with monkeypatch.context() as patch:
        failing(patch, path, number)
        for _ in range(3):
            clock.now += 1
            assert refused(keys, bearer(key)) == "wrong_key"
            assert refused(keys, bearer(other)) == "wrong_key"
        assert caplog.text.count("no key opens anything") == 1
    clock.now += 1
    assert keys.authorize(bearer(other)).tenant == "other"
    assert refused(keys, bearer(key)) == "wrong_key"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EIO])
def test_a_fault_that_passes_is_waited_for(path: Path, monkeypatch, number: int) -> None:
    record, key = create_key(path, KeyRequest(tenant="acme"))
    clock = Clock()
    keys = KeyFile(path, clock=clock)
    revoke_key(path, record.id)
    with monkeypatch.context() as patch:
        failing(patch, path, number)
        clock.now += 1
        assert keys.authorize(bearer(key)).tenant == "acme"
    clock.now += 1
    assert refused(keys, bearer(key)) == "wrong_key"


def test_a_file_that_becomes_open_to_others_opens_nothing_until_it_is_closed(path: Path) -> None:
    _, key = create_key(path, KeyRequest(tenant="acme"))
    clock = Clock()
    keys = KeyFile(path, clock=clock)
    path.chmod(0o666)
    clock.now += 1
    assert refused(keys, bearer(key)) == "wrong_key"
    path.chmod(0o600)
    clock.now += 1
    assert keys.authorize(bearer(key)).tenant == "acme"


@pytest.mark.parametrize("mode", [0o640, 0o440, 0o600])
def test_a_file_that_is_written_again_can_be_read_by_whom_it_could(path: Path, mode: int) -> None:
    record, _ = create_key(path, KeyRequest(tenant="acme"))
    path.chmod(mode)
    group = next((number for number in os.getgroups() if number != os.getgid()), 7 if os.getuid() == 0 else None)
    if group is not None:
        os.chown(path, -1, group)
    before = path.stat()
    revoke_key(path, record.id)
    after = path.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o666])
def test_a_file_that_others_may_read_or_write_is_refused(path: Path, mode: int) -> None:
    create_key(path, KeyRequest(tenant="acme"))
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}"):
        KeyFile(path)


def test_a_kubernetes_secret_is_read(path: Path) -> None:
    create_key(path, KeyRequest(tenant="acme"))
    path.chmod(0o440)
    link = path.with_name("link.json")
    link.symlink_to(path)
    assert len(read_keys(link).keys) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"keys": [{"id": "x"}]}', '{"format": "eagleray-keys-2"}', '{"more": 1}'])
def test_a_file_that_is_not_one_of_keys_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError):
        KeyFile(path)


def test_one_id_twice_is_refused(path: Path) -> None:
    create_key(path, KeyRequest(tenant="acme"))
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"keys": known["keys"] * 2}))
    with pytest.raises(ConfigError, match="one id"):
        read_keys(path)


@pytest.mark.parametrize(
    "wrong",
    [{"tenant": "a b"}, {"tenant": ""}, {"models": ()}, {"models": ("../x",)}, {"actions": ("root",)}, {"burst": 0}],
)
def test_a_request_for_what_there_is_not_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        KeyRequest(**{"tenant": "acme"} | wrong)


def test_revoking_what_is_not_there_lists_what_is(path: Path) -> None:
    record, _ = create_key(path, KeyRequest(tenant="acme"))
    with pytest.raises(ConfigError) as caught:
        revoke_key(path, "000000000000")
    assert record.id in caught.value.expected


def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch) -> None:
    create_key(path, KeyRequest(tenant="acme"))
    before = path.read_bytes()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(Exception, match="No space"):
        create_key(path, KeyRequest(tenant="other"))
    assert path.read_bytes() == before
