"""What the machine under a run offers: CPU, memory, GPUs, temporary space, limits, ports. Read, never changed.

Each check is a function of what was read, so that a test can hand it another machine.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from eagleray.core import processor

OK, WARN, FAIL = "ok", "warn", "fail"
GIB = 2**30

TEMP_FREE_GIB = (1.0, 5.0)  # fail below, warn below: Ray's session, spilled objects and a shard being written
DISK_FULL_PERCENT = 95.0  # Ray stops creating objects above it (local_fs_capacity_threshold)
SHM_FREE_GIB = 0.25  # the embedded object store takes 0.2 GiB (flows/runtime.py)
MEMORY_FREE_GIB = 3.0  # an embedded Ray with two workers and a ViT-B took 2.6 GiB
OPEN_FILES = (1024, 4096)  # fail below, warn below: Ray's own advice starts at 4,096
RAY_PORTS = {8265: "dashboard", 10001: "client"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: ``ok``, ``warn`` (good to know, a run works) or ``fail``.
        seen: What was found.
        fix: What to do; empty when it is right.
    """

    name: str
    status: str
    seen: str
    fix: str = ""


def run(*, is_torch_cpu_only: bool) -> list[Check]:
    """Makes every check of the machine."""
    return [
        cpu_features(_read("/proc/cpuinfo")),
        cores(len(os.sched_getaffinity(0)), _read("/sys/fs/cgroup/cpu.max")),
        memory(_read("/sys/fs/cgroup/memory.max")),
        gpus(_nvidia_smi(), is_torch_cpu_only=is_torch_cpu_only),
        temp_space(Path(tempfile.gettempdir())),
        shared_memory(Path("/dev/shm")),  # noqa: S108  looked at, not written
        open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        open_ports(_read("/proc/net/tcp") + _read("/proc/net/tcp6")),
    ]


def cpu_features(cpuinfo: str) -> Check:
    """The vector units that the engines use."""
    flags = processor.flags(cpuinfo)
    if not flags:
        return Check("cpu", WARN, "its features cannot be read here", "nothing: the engines find out by themselves")
    model = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    has = processor.features(flags)
    lacks = [name for name in processor.FEATURES if name not in has]
    name = model[1].strip() if model else "CPU"
    seen = f"{name}: {', '.join(has) or 'none of ' + ', '.join(processor.FEATURES)}" + (
        f"; not {', '.join(lacks)}" if has and lacks else ""
    )
    if "AVX2" in has or "asimd" in flags:
        return Check("cpu", OK, seen)
    return Check("cpu", WARN, seen, "expect about a quarter of the speed; a CPU of the last ten years has AVX2")


def cores(usable: int, cpu_max: str) -> Check:
    """Cores that this process may use, and the container's quota."""
    quota, _, period = cpu_max.partition(" ")
    if quota.strip().isdigit() and period.strip().isdigit():
        share = int(quota) / int(period)
        if share < usable:
            seen = f"{usable} usable, but the container may use {share:g} of them"
            return Check("cores", WARN, seen, "raise the container's CPU limit, or count on that many workers only")
    return Check("cores", OK, f"{usable} usable of {os.cpu_count()}")


def memory(memory_max: str) -> Check:
    """Memory that is free, within the container's limit."""
    import psutil

    found = psutil.virtual_memory()
    limit = int(memory_max) if memory_max.strip().isdigit() else found.total
    free_gib = min(found.available, limit) / GIB
    seen = f"{free_gib:.1f} GiB free of {min(found.total, limit) / GIB:.1f} GiB"
    if free_gib < MEMORY_FREE_GIB:
        return Check("memory", WARN, seen, "close other programs, or score with fewer workers")
    return Check("memory", OK, seen)


def gpus(smi: str | None, *, is_torch_cpu_only: bool) -> Check:
    """NVIDIA GPUs, as nvidia-smi lists them."""
    if smi is None:
        return Check("gpus", OK, "none: the CPU does the work")
    listed = [line.strip() for line in smi.splitlines() if line.strip()]
    if not listed:
        return Check("gpus", WARN, "nvidia-smi is here and lists no GPU", "look at `nvidia-smi` and the driver")
    seen = "; ".join(listed)
    if is_torch_cpu_only:
        return Check("gpus", WARN, f"{seen}; torch is a CPU build", "install the CUDA build of torch to use it")
    return Check("gpus", OK, seen)


def temp_space(folder: Path) -> Check:
    """Whether temporary files can be written, and how much is left."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"eagleray")
    except OSError as error:
        return Check("temp space", FAIL, f"{folder}: {error.strerror}", "set TMPDIR to a folder that you may write to")
    usage = shutil.disk_usage(folder)
    free_gib, used_percent = usage.free / GIB, 100 * (1 - usage.free / usage.total)
    seen = f"{folder}: {free_gib:.1f} GiB free, {used_percent:.0f} % used"
    if free_gib < TEMP_FREE_GIB[0] or used_percent >= DISK_FULL_PERCENT:
        return Check("temp space", FAIL, seen, "free some space, or set TMPDIR and RAY_TMPDIR to a larger disk")
    if free_gib < TEMP_FREE_GIB[1]:
        return Check("temp space", WARN, seen, "free some space, or set TMPDIR and RAY_TMPDIR to a larger disk")
    return Check("temp space", OK, seen)


def shared_memory(folder: Path) -> Check:
    """Room for Ray's object store; without it Ray falls back to the disk."""
    fix = "give the container more: docker run --shm-size=1g"
    if not folder.is_dir():
        return Check("shared memory", WARN, f"no {folder}: Ray keeps its objects on disk, slowly", fix)
    free_gib = shutil.disk_usage(folder).free / GIB
    seen = f"{folder}: {free_gib:.2f} GiB free"
    return Check("shared memory", WARN, seen, fix) if free_gib < SHM_FREE_GIB else Check("shared memory", OK, seen)


def open_files(soft: int, hard: int) -> Check:
    """The limit of open file descriptors; a Ray node opens hundreds."""
    if soft == resource.RLIM_INFINITY:
        return Check("open files", OK, "no limit")
    seen = f"{soft:,} (may be raised to {'any' if hard == resource.RLIM_INFINITY else f'{hard:,}'})"
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(65_536, hard)
    if soft >= OPEN_FILES[1]:
        return Check("open files", OK, seen)
    return Check("open files", FAIL if soft < OPEN_FILES[0] else WARN, seen, f"ulimit -n {wanted}")


def open_ports(tables: str) -> Check:
    """Ray's ports that listen on every interface of this machine, as /proc/net/tcp tells."""
    found = set()
    for line in tables.splitlines():
        words = line.split()
        if len(words) > 3 and words[3] == "0A" and ":" in words[1]:  # 0A: listening
            address, _, port = words[1].rpartition(":")
            if not address.strip("0") and int(port, 16) in RAY_PORTS:
                found.add(int(port, 16))
    if found:
        seen = ", ".join(f"port {port} ({RAY_PORTS[port]})" for port in sorted(found)) + " is open to every interface"
        return Check(
            "ray ports", WARN, seen, "start Ray with --dashboard-host=127.0.0.1, or close the ports by a firewall"
        )
    return Check("ray ports", OK, "none is open to the network")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _nvidia_smi() -> str | None:
    """What nvidia-smi lists; None when there is no nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def gpu_name() -> str:
    """The first GPU's name as its driver says it; empty where there is none."""
    return (_nvidia_smi() or "").split("\n")[0].split(",")[0].strip()
