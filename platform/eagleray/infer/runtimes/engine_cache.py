"""Built TensorRT engines, kept: loaded only when this machine's user built and signed them for this very use.

An engine is machine code; a file of it that anybody else could have written must not be loaded. Each entry is signed
(HMAC-SHA256) with a key of 32 random bytes that is made here, lies beside the cache and is readable by its owner alone;
the signature covers all that the engine was built for, so that an entry cannot stand in for another. A changed byte,
another key or a file of elsewhere is refused, said, and built again. The ONNX is the artefact; the cache may be deleted
at any time.

Example:
    >>> key = EngineKey(onnx_sha256=..., target=Target("8.9"), library="tensorrt_rtx", version="1.7.1.116")
    >>> store(key, engine)
    >>> load(key) == engine
    True
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError, EagleError, storage_error
from eagleray.core.storage import write_atomic
from eagleray.infer.runtimes.engine_build import BuildSettings, Target
from eagleray.infer.runtimes.memory import cache_folder

MAGIC = b"eagleray engine 1\n"
KEY_BYTES = 32
KIND, KEY_FILE = "engines", "signing.key"
ENGINE, TIMINGS, KERNELS = "engine", "timings", "kernels"  # parts of an entry


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """All that an engine depends on: another value of any is another engine.

    Attributes:
        onnx_sha256: Of the graph that it is built from, its preprocessing included.
        target: GPU, compute capability, driver.
        library: "tensorrt" or "tensorrt_rtx".
        version: The library's.
        settings: Batch sizes and memory.
    """

    onnx_sha256: str
    target: Target
    library: str
    version: str
    settings: BuildSettings = field(default_factory=BuildSettings)

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the canonical JSON."""
        return digest_json(asdict(self))


def path_of(key: EngineKey, part: str = ENGINE) -> Path:
    """Where an entry lies, or would."""
    return cache_folder(KIND) / f"{key.digest[:32]}.{part}"


def load(key: EngineKey, part: str = ENGINE) -> bytes | None:
    """An entry that was built and signed here for this key; None when there is none or it is refused, which is said."""
    path = path_of(key, part)
    try:
        data = path.read_bytes()
        secret = _secret()
    except FileNotFoundError:
        return None
    except OSError as error:
        _say(f"{path} cannot be read ({error.strerror}): it is built again")
        return None
    head = len(MAGIC) + hashlib.sha256().digest_size
    payload = memoryview(data)[head:]
    is_ours = data.startswith(MAGIC) and hmac.compare_digest(data[len(MAGIC) : head], _sign(secret, key, part, payload))
    if not is_ours:
        _say(f"{path} was not built and signed here for this use: it is refused, and built again")
        return None
    return bytes(payload)


def store(key: EngineKey, data: bytes, part: str = ENGINE) -> Path | None:
    """Keeps and signs what was built; None, and a word, where it cannot be kept: a cache is no reason to fail.

    Raises:
        ArtifactError: The signing key is not this user's alone.
    """
    path = path_of(key, part)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, MAGIC + _sign(_secret(), key, part, data) + data)
    except ArtifactError:
        raise
    except (OSError, EagleError) as error:
        _say(f"{path} cannot be written ({error}): the engine will be built at every start")
        return None
    return path


def _sign(secret: bytes, key: EngineKey, part: str, payload: bytes | memoryview) -> bytes:
    mac = hmac.new(secret, f"{key.digest} {part} {len(payload)}\n".encode(), hashlib.sha256)
    mac.update(payload)
    return mac.digest()


def _secret() -> bytes:
    """The signing key of this user on this machine; made when it is not there.

    Raises:
        ArtifactError: Others can read or write it, it is another user's, or it is no key.
        OSError: It cannot be read or made.
    """
    path = cache_folder(KIND) / KEY_FILE
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        _make_secret(path)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(file.fileno())
        secret = file.read(KEY_BYTES + 1)
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077 or status.st_uid != os.geteuid() or len(secret) != KEY_BYTES:
        raise ArtifactError(
            f"the signing key {path} cannot be trusted: mode {mode:04o}, owner {status.st_uid}, {len(secret)} bytes",
            expected=f"mode 0600, owner {os.geteuid()}, {KEY_BYTES} bytes",
            fix="delete it and the engines beside it: both are made again",
        )
    return secret


def _make_secret(path: Path) -> None:
    """Makes the key aside and links it into place: of two that start at once, both use the first one's."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(8)}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except FileExistsError:
            return
        except OSError as error:
            raise storage_error(error, f"writing {path}") from error
    finally:
        aside.unlink(missing_ok=True)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
