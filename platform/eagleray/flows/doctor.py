"""Looks at this machine before a run does: what is installed, what the hardware offers, what is set unsafely.

Nothing heavy is imported: versions come from the packages' metadata and files, so the answer comes in well under a
second, also where torch or Ray would not even import. A check says what it saw and, when that is not right, what to do.

Example:
    >>> checks = run()
    >>> exit_code(checks)
    0
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eagleray.core.errors import CapabilityError
from eagleray.flows import hardware
from eagleray.flows.hardware import FAIL, OK, WARN, Check
from eagleray.vision.resample import kernel

RAY_PIN = (2, 60)  # the release whose settings were tried (docs/adr/0001); tests/house compares it with pyproject.toml
TORCHVISION_OFFSET = 15  # torch 2.N belongs to torchvision 0.(N+15)
SAFE_PYTHON = {11: 13, 12: 11, 13: 4}  # minor to patch that mends tarfile's filters (CVE-2025-4517 and its kin)
INSTALL = "pip install -c constraints.txt"

# The first version without the known holes; advisories in docs/log.md, "Floors of packages".
SAFE_FROM = {
    "pillow": ((12, 3), "heap writes and bombs past the size check, CVE-2026-59197 and others"),
    "onnx": ((1, 23), "reads and writes outside the model's folder, CISA VA-26-233-01"),
    "torch": ((2, 10), "memory corruption from a weights_only file, CVE-2026-24747"),
    "ray": ((2, 56), "code execution from a Parquet schema or a tar, CVE-2026-41486, CVE-2026-57516"),
}
OPTIONAL = frozenset({"onnx"})

UNSAFE_WHEN_SET = {
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE": "lets a Parquet file run code when it is opened",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION": "lets a member of a tar run code when it is read",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "lets a weights file run code when it is loaded",
}
HAPROXY_SOCKET = "RAY_SERVE_HAPROXY_SOCKET_PATH"
HAPROXY_DEFAULT = "/tmp/haproxy-serve/admin.sock"  # noqa: S108  Ray's own default


def run() -> list[Check]:
    """Makes every check, in the order in which a person would mend things."""
    checks: list[Check] = [
        python_version(sys.version_info[:3]),
        torch_build(*_torch()),
        torchvision_build(*_torch(), _declared("torchvision")[0]),
        *engines(),
        resize_kernel(),
        package_floors(),
        ray_version(installed_version("ray")),
        ray_token(os.environ, Path.home()),
        unsafe_settings(os.environ),
        haproxy_socket(os.environ),
    ]
    return checks + hardware.run(is_torch_cpu_only=_torch()[1] is None)


def exit_code(checks: Iterable[Check]) -> int:
    """0 when nothing fails, else the code of CapabilityError."""
    return CapabilityError.exit_code if any(check.status == FAIL for check in checks) else 0


def to_json(checks: Iterable[Check]) -> dict[str, Any]:
    """The checks and their verdict as JSON values."""
    listed = list(checks)
    return {"schema": 1, "is_fit": exit_code(listed) == 0, "checks": [asdict(check) for check in listed]}


def to_text(checks: Iterable[Check]) -> str:
    """One line a check, its fix below; the totals last."""
    listed = list(checks)
    width = max(len(check.name) for check in listed)
    lines = []
    for check in listed:
        lines.append(f"{check.status:<4}  {check.name.ljust(width)}  {check.seen}")
        if check.fix:
            lines.append(f"{'':<4}  {'':<{width}}  do: {check.fix}")
    count = {status: sum(check.status == status for check in listed) for status in (OK, WARN, FAIL)}
    return "\n".join([*lines, "", f"{count[OK]} ok, {count[WARN]} to know, {count[FAIL]} to mend"])


def python_version(found: tuple[int, ...]) -> Check:
    """Python 3.11 or newer, and a patch with the mended tarfile filters."""
    said = ".".join(map(str, found))
    if found < (3, 11):
        return Check("python", FAIL, said, "install Python 3.11 or newer and make the environment again")
    if found[2] < SAFE_PYTHON.get(found[1], 0):
        safe = f"3.{found[1]}.{SAFE_PYTHON[found[1]]}"
        return Check(
            "python",
            WARN,
            f"{said}; its tarfile filters can be escaped (CVE-2025-4517); eagleray never extracts an archive to disk",
            f"use {safe} or newer if other programs here unpack archives",
        )
    return Check("python", OK, said)


def torch_build(found: str | None, cuda: str | None) -> Check:
    """Which torch is installed: CPU or CUDA."""
    if found is None:
        return Check("torch", FAIL, "not installed", f"{INSTALL} torch torchvision")
    return Check("torch", OK, f"{found}, {'CUDA ' + cuda if cuda else 'CPU'} build")


def torchvision_build(torch: str | None, cuda: str | None, found: str | None) -> Check:
    """Whether torchvision belongs to the torch that is installed.

    A CUDA torchvision beside a CPU torch is what the public index gives; the guard makes it usable.
    """
    if found is None:
        return Check("torchvision", FAIL, "not installed", f"{INSTALL} torchvision")
    if torch and numbers(found)[1] != numbers(torch)[1] + TORCHVISION_OFFSET:
        wanted = f"0.{numbers(torch)[1] + TORCHVISION_OFFSET}"
        return Check("torchvision", FAIL, f"{found} beside torch {torch}", f"{INSTALL} 'torchvision=={wanted}.*'")
    if "+cu" in found and cuda is None:
        if find_spec("eagleray.vision.torchvision_guard") is None:
            return Check("torchvision", FAIL, f"{found}, a CUDA build beside CPU torch", "install eagleray again")
        return Check(
            "torchvision",
            OK,
            f"{found}, a CUDA build beside CPU torch: eagleray's import guard defines the missing operators "
            "(torchvision.io and ops.nms stay unusable and are not used)",
        )
    return Check("torchvision", OK, found)


def resize_kernel() -> Check:
    """Whether the compiled resize is here; without it pixels are the same and decoding takes twice the time."""
    try:
        found = kernel()
    except CapabilityError as error:
        return Check("resize kernel", FAIL, error.seen, error.fix)
    if found == "pillow":
        return Check(
            "resize kernel",
            WARN,
            "not built: Pillow resizes, to the same pixels, several times slower",
            "install a C compiler (gcc) and install eagleray again",
        )
    return Check("resize kernel", OK, f"resample.c, {found}")


def engines() -> list[Check]:
    """Which inference engines can be used; the names come from the table of runtimes."""
    try:
        from eagleray.infer.runtimes import RUNTIMES
    except ImportError as error:
        return [Check("engines", FAIL, f"eagleray's own packages do not import: {error}", f"{INSTALL} eagleray")]
    checks = []
    for name, entry in RUNTIMES.items():
        package = entry.package or name
        found = installed_version(package) or (entry.version if entry.is_installed else "")
        if found:
            checks.append(Check(f"engine {name}", OK, f"{package} {found}"))
        else:
            fix = f'{INSTALL} "eagleray[{entry.extra}]"' if entry.extra else f"{INSTALL} {entry.needs or name}"
            checks.append(Check(f"engine {name}", WARN, f"{entry.needs or name} is not installed", fix))
    if installed_version("onnxruntime") and installed_version("onnxruntime-gpu"):
        seen = "onnxruntime and onnxruntime-gpu are both installed and overwrite one another"
        checks.append(Check("engine clash", FAIL, seen, "pip uninstall one of them, then install the other again"))
    return checks


def package_floors(find: Callable[[str], str | None] | None = None) -> Check:
    """Whether the packages that open foreign files are free of the holes that are known."""
    find = find or installed_version
    wrong, names = [], []
    for name, (floor, why) in SAFE_FROM.items():
        found = find(name)
        if found is None and name in OPTIONAL:
            continue
        if found is None or numbers(found) < floor:
            wrong.append(f"{name} {found or 'missing'} (want {'.'.join(map(str, floor))}: {why})")
            names.append(name)
    if wrong:
        return Check("package floors", FAIL, "; ".join(wrong), f"{INSTALL} {' '.join(names)}")
    return Check("package floors", OK, "pillow, onnx, torch and ray are past their known holes")


def ray_version(found: str | None) -> Check:
    """Whether Ray is the release that eagleray was tried with."""
    pin = ".".join(map(str, RAY_PIN))
    fix = f"{INSTALL} 'ray[default,data,train,tune,serve]=={pin}.*'"
    if found is None:
        return Check("ray", FAIL, "not installed", fix)
    if numbers(found)[:2] != RAY_PIN:
        return Check("ray", FAIL, f"{found}, tried is {pin}", fix)
    return Check("ray", OK, found)


def ray_token(env: Mapping[str, str], home: Path) -> Check:
    """Whether Ray asks for a token, and whether only its owner can read it."""
    mode = env.get("RAY_AUTH_MODE", "token").lower()
    if mode != "token":
        seen = f"RAY_AUTH_MODE={mode}: whoever reaches a port of Ray runs code here"
        return Check("ray token", FAIL, seen, "unset RAY_AUTH_MODE")
    if env.get("RAY_AUTH_TOKEN"):
        return Check("ray token", OK, "in RAY_AUTH_TOKEN")
    named = env.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else home / ".ray" / "auth_token"
    try:
        permissions = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        if named:
            return Check("ray token", FAIL, f"no {path}, which RAY_AUTH_TOKEN_PATH names", "write it, or unset it")
        return Check("ray token", OK, "none yet: the first local run makes one that only you can read")
    except OSError as error:
        return Check("ray token", FAIL, f"{path}: {error.strerror}", f"give it to its user: chown $USER {path}")
    if permissions & 0o077:
        return Check("ray token", FAIL, f"{path} has mode {permissions:04o}: others can read it", f"chmod 600 {path}")
    return Check("ray token", OK, f"{path}, mode {permissions:04o}")


def unsafe_settings(env: Mapping[str, str]) -> Check:
    """Environment variables that switch a protection off."""
    found = [name for name in UNSAFE_WHEN_SET if is_on(env.get(name, ""))]
    if found:
        seen = "; ".join(f"{name} {UNSAFE_WHEN_SET[name]}" for name in found)
        return Check("unsafe settings", FAIL, seen, f"unset {' '.join(found)}")
    return Check("unsafe settings", OK, "none")


def haproxy_socket(env: Mapping[str, str]) -> Check:
    """Serve's HAProxy mode: its admin socket is world-writable by design, so no other user may reach its folder."""
    path = Path(env.get(HAPROXY_SOCKET) or HAPROXY_DEFAULT)
    fix = f"unset RAY_SERVE_ENABLE_HA_PROXY, or set {HAPROXY_SOCKET} to a file in a folder of mode 0700"
    is_private = any(folder.is_dir() and not folder.stat().st_mode & 0o007 for folder in path.parents)
    if path.exists() and path.stat().st_mode & 0o002 and not is_private:
        return Check("haproxy", FAIL, f"every user can write to {path}, which controls the proxy", f"rm {path}; {fix}")
    if not is_on(env.get("RAY_SERVE_ENABLE_HA_PROXY", "")):
        return Check("haproxy", OK, "off")
    if not is_private:
        return Check("haproxy", FAIL, f"on, with its socket {path} where every user can reach it", fix)
    return Check("haproxy", OK, f"on, socket in the private {path.parent}")


def is_on(value: str) -> bool:
    """Whether a flag of the environment is set."""
    return value.strip().lower() not in ("", "0", "false", "no", "off")


def numbers(found: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``"2.13.0+cpu"`` is (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", found.split("+", maxsplit=1)[0].split("rc", maxsplit=1)[0]))


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, from its metadata."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> tuple[str | None, str | None]:
    return _declared("torch")


def _declared(package: str) -> tuple[str | None, str | None]:
    """Version with build tag, and CUDA version, as ``version.py`` of torch or torchvision declares them; unimported."""
    spec = find_spec(package)
    if spec is None or not spec.origin:
        return None, None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return installed_version(package), None
    found = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda(?:: [^=]+)? = '([^']+)'", text, re.MULTILINE)
    return (found[1] if found else installed_version(package)), (cuda[1] if cuda else None)
