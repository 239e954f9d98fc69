"""Who may ask: API keys, of which only hashes are kept, with the models, actions and rates that each one opens.

A key is ``er_<id>_<secret>``: the id finds the record and may be written in logs, the secret is 256 random bits and is
shown once. Kept is HMAC-SHA256(salt, secret). A slow password hash (argon2, bcrypt) would add nothing: it is there to
make guesses of a human's password dear, and 2^256 guesses are out of reach at any price, while every request pays for
the hash. Comparison takes the same time wherever the secrets differ, and as long for an id that does not exist.

The file is read again when it changes, so that a revoked key ends within CHECK_EVERY_S; a file that is gone, may not be
read or is not safe opens nothing, until it is mended; one that does not hold (a slip while editing by hand) leaves the
keys that were read last, and says so.

Example:
    >>> record, key = create_key("keys.json", KeyRequest(tenant="acme", models=("lite0",)))
    >>> KeyFile("keys.json").authorize([(b"x-api-key", key.encode())]).tenant
    'acme'
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from eagleray.core.config import Config
from eagleray.core.errors import ConfigError, storage_error
from eagleray.core.storage import only_writer, write_private
from eagleray.serving.passport import ACTIONS, ANY
from eagleray.serving.refusals import missing_key, wrong_key
from eagleray.serving.settings import MODEL_NAME

LOG = logging.getLogger("eagleray.serving.access")
PREFIX = "er"
KEY = re.compile(r"er_([0-9a-f]{12})_([0-9a-f]{64})")
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CHECK_EVERY_S = 1.0  # how often the file is looked at: how long a revoked key may still work in a process
UNREADABLE = 0o027  # mode bits that a key file must not have; group-read is what a Kubernetes secret with fsGroup needs
PASSING = frozenset([errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM])  # says nothing of the file itself
_NO_KEY = ("0" * 32, "0" * 64)  # salt and digest that an unknown id is compared with

Headers = Iterable[tuple[bytes, bytes]]


def _name(value: str) -> str:
    if not TENANT.fullmatch(value):
        raise ValueError("1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or digit")
    return value


def _models(value: tuple[str, ...]) -> tuple[str, ...]:
    wrong = [name for name in value if name != ANY and not MODEL_NAME.fullmatch(name)]
    if wrong or not value:
        raise ValueError(f"model names, or {ANY!r} for every model; at least one")
    return value


def _actions(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value or set(value) - {*ACTIONS, ANY}:
        raise ValueError(f"one or more of {', '.join((*ACTIONS, ANY))}")
    return value


class KeyRequest(Config):
    """What a new key is to open.

    Attributes:
        tenant: Who gets it; several keys of one tenant share its rate and quota.
        models: Model names, or ``*``.
        actions: Of passport.ACTIONS, or ``*``.
        expires_days: Days until it ends; none = never.
        images_per_s, burst, images_per_day: As RateConfig; none = what the service says for everybody.
    """

    tenant: Annotated[str, AfterValidator(_name)]
    models: Annotated[tuple[str, ...], AfterValidator(_models)] = (ANY,)
    actions: Annotated[tuple[str, ...], AfterValidator(_actions)] = ("predict", "embed")
    expires_days: float | None = Field(None, gt=0, le=36_500)
    images_per_s: float | None = Field(None, gt=0)
    burst: int | None = Field(None, ge=1)
    images_per_day: int | None = Field(None, ge=1)


class KeyRecord(Config):
    """One key as it is kept: everything but the secret.

    Attributes:
        id: The key's public part: 12 hex digits.
        salt: 32 hex digits.
        digest: HMAC-SHA256 of the secret under the salt, hex.
        tenant, models, actions, images_per_s, burst, images_per_day: As KeyRequest.
        created, expires, revoked: UTC times; none = not.
    """

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    salt: str = Field(pattern=r"^[0-9a-f]{32}$")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: Annotated[str, AfterValidator(_name)]
    models: Annotated[tuple[str, ...], AfterValidator(_models)]
    actions: Annotated[tuple[str, ...], AfterValidator(_actions)]
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    images_per_s: float | None = Field(None, gt=0)
    burst: int | None = Field(None, ge=1)
    images_per_day: int | None = Field(None, ge=1)

    def state(self, now_s: float) -> Literal["valid", "expired", "revoked"]:
        """Whether it opens anything at a Unix time."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires.timestamp() <= now_s else "valid"

    def opens(self, model: str) -> bool:
        """Whether its scope names the model."""
        return ANY in self.models or model in self.models

    def allows(self, action: str) -> bool:
        """Whether its scope names the action."""
        return ANY in self.actions or action in self.actions


class KeyList(Config):
    """The key file."""

    format: Literal["eagleray-keys-1"] = "eagleray-keys-1"
    keys: tuple[KeyRecord, ...] = ()

    @model_validator(mode="after")
    def _one_each(self) -> KeyList:
        ids = [key.id for key in self.keys]
        if len(set(ids)) != len(ids):
            raise ValueError("two keys have one id")
        return self


class Unreadable(ConfigError):
    """A key file that cannot be opened, or is not safe: what it says is not known."""


class KeyFile:
    """The keys of a file, as a running service asks them.

    Args:
        path: The file.
        clock: Unix time in s.
        check_every_s: How often the file is looked at.

    Raises:
        ConfigError: The file is missing, may be read or written by others, or does not hold.
    """

    def __init__(
        self, path: str | Path, *, clock: Callable[[], float] = time.time, check_every_s: float = CHECK_EVERY_S
    ) -> None:
        self._path, self._clock, self._every_s = Path(path), clock, check_every_s
        self._stamp = _stamp(self._path)
        self._keys = {key.id: key for key in read_keys(self._path).keys}
        self._looked_s = clock()

    def authorize(self, headers: Headers) -> KeyRecord:
        """The record of a request's key.

        Args:
            headers: The request's, names in lower case.

        Raises:
            Refusal: 401: no key, or one that is unknown, altered, expired or revoked.
        """
        token = token_of(headers)
        self._reload()
        found = KEY.fullmatch(token)
        key = self._keys.get(found[1]) if found else None
        salt, digest = (key.salt, key.digest) if key else _NO_KEY
        is_right = hmac.compare_digest(digest, _digest(salt, found[2] if found else token))
        if key is None or not is_right or key.state(self._clock()) != "valid":
            raise wrong_key()
        return key

    def _reload(self) -> None:
        now = self._clock()
        if 0 <= now - self._looked_s < self._every_s:
            return
        self._looked_s = now
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        try:
            keys = read_keys(self._path).keys
        except Unreadable as error:  # its stamp is not kept: it is tried again
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in PASSING:
                LOG.error("the key file %s cannot be read now, the keys read last stay: %s", self._path, error.seen)
                return
            if self._keys or self._stamp is not None:
                LOG.error("no key opens anything: %s", error.seen)
            self._keys, self._stamp = {}, None
        except ConfigError as error:
            LOG.error("the key file %s does not hold, the keys read last stay: %s", self._path, error.seen)
            self._stamp = stamp
        else:
            self._keys, self._stamp = {key.id: key for key in keys}, stamp
            LOG.info("the key file %s was read again: %d keys", self._path, len(self._keys))


def token_of(headers: Headers) -> str:
    """The key in a request's headers: ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``.

    Raises:
        Refusal: 401: there is none; two that differ; or an Authorization of another scheme.
    """
    found = set()
    for name, value in headers:
        if name == b"x-api-key":
            found.add(value.strip())
        elif name == b"authorization":
            scheme, _, token = value.strip().partition(b" ")
            found.add(token.strip() if scheme.lower() == b"bearer" else b"")
    if not found:
        raise missing_key()
    if len(found) > 1:
        raise wrong_key()
    return found.pop()[:256].decode("latin-1")


def create_key(path: str | Path, request: KeyRequest) -> tuple[KeyRecord, str]:
    """Makes a key and writes its record; the file is made (mode 0600) when there is none.

    Returns:
        The record, and the key itself: it is kept nowhere.

    Raises:
        ConfigError: The file does not hold, or another command writes it.
        StorageError: It cannot be written.
    """
    secret, salt = secrets.token_hex(32), secrets.token_hex(16)
    now = datetime.now(UTC).replace(microsecond=0)
    given = request.model_dump(exclude={"expires_days"})
    expires = None if request.expires_days is None else now + timedelta(days=request.expires_days)
    path = Path(path)
    with _writing(path):
        known = read_keys(path) if path.exists() else KeyList()
        ids = {key.id for key in known.keys}
        key_id = next(new for new in iter(lambda: secrets.token_hex(6), "") if new not in ids)
        record = KeyRecord(id=key_id, salt=salt, digest=_digest(salt, secret), created=now, expires=expires, **given)
        _write(path, KeyList(keys=(*known.keys, record)))
    return record, f"{PREFIX}_{key_id}_{secret}"


def revoke_key(path: str | Path, key_id: str) -> KeyRecord:
    """Ends a key; the record stays, with the time. Revoking a revoked key changes nothing.

    Raises:
        ConfigError: No key of that id; the message lists those there are.
    """
    path = Path(path)
    with _writing(path):
        known = read_keys(path)
        found = next((key for key in known.keys if key.id == key_id), None)
        if found is None:
            ids = ", ".join(f"{key.id} ({key.tenant})" for key in known.keys[:20]) or "none"
            raise ConfigError(f"no key {key_id!r} in {path}", expected=f"one of {ids}", fix="give the id of a key")
        if found.revoked is None:
            found = found.model_copy(update={"revoked": datetime.now(UTC).replace(microsecond=0)})
            _write(path, KeyList(keys=tuple(found if key.id == key_id else key for key in known.keys)))
    return found


def read_keys(path: str | Path) -> KeyList:
    """The records of a key file.

    Raises:
        ConfigError: It is missing, may be read by everybody or written by others, or does not hold.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            mode, owner = os.fstat(file.fileno()).st_mode, os.fstat(file.fileno()).st_uid
            text = file.read()
    except FileNotFoundError:
        raise Unreadable(
            f"no key file at {path}", expected="a file of API keys", fix=f"eagleray apikeys create --keys {path} ..."
        ) from None
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}", expected="a readable key file", fix="mend it") from error
    if stat.S_IMODE(mode) & UNREADABLE or owner not in (os.getuid(), 0):
        raise Unreadable(
            f"{path} has mode {stat.S_IMODE(mode):04o}, owner {owner}",
            expected="a key file of this user or root that no other may write and not everybody may read",
            fix=f"chmod 600 {path}",
        )
    try:
        return KeyList.model_validate(json.loads(text))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:5])
        raise ConfigError(f"{path} is no key file: {faults}", expected="what apikeys writes", fix="mend it") from None
    except ValueError:
        raise ConfigError(f"{path} is not JSON", expected="what apikeys writes", fix="mend it") from None


def _digest(salt: str, secret: str) -> str:
    return hmac.new(bytes.fromhex(salt), secret.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when the file, its mode or its owner does; None when it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _writing(path: Path) -> AbstractContextManager[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise storage_error(error, f"making {path.parent}") from error
    return only_writer(path.with_name(path.name + ".lock"), what=str(path))


def _write(path: Path, keys: KeyList) -> None:
    """Replaces the file; it stays as readable as it was for the service, which may run as another user."""
    write_private(path, (json.dumps(keys.model_dump(mode="json"), indent=1) + "\n").encode(), is_like_before=True)
