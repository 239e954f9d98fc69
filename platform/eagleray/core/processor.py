"""What this machine's processor can do: its vector units, by the names that engines and people use.

One place, for ``doctor`` (which tells), for quantisation (which chooses by it) and for what is remembered of this
machine. Read from /proc/cpuinfo; where that cannot be read, nothing is claimed.

Example:
    >>> "VNNI" in features(flags())
    True
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AMX": ("amx_int8", "amx_bf16"),
}
X86 = "sse2"  # a flag of every 64-bit x86


def flags(cpuinfo: str | None = None) -> frozenset[str]:
    """The flags of the first processor; empty when they cannot be read.

    Args:
        cpuinfo: The text of /proc/cpuinfo; None reads it.
    """
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", _read() if cpuinfo is None else cpuinfo, re.MULTILINE)
    return frozenset(line[1].split()) if line else frozenset()


def identity() -> dict[str, str]:
    """The processor's model and its flags, as one machine tells itself from another."""
    text = _read()
    model = re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)
    named = model[1].strip() if model else platform.processor() or platform.machine()
    return {"model": named, "flags": " ".join(sorted(flags(text)))}


def _read() -> str:
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def features(of: frozenset[str]) -> tuple[str, ...]:
    """Those of FEATURES that these flags mean."""
    return tuple(name for name, any_of in FEATURES.items() if of.intersection(any_of))


def saturates_int8(of: frozenset[str]) -> bool:
    """Whether 8-bit dot products overflow here: x86 without VNNI adds pairs of products in 16 bits (VPMADDUBSW).

    Two products of 255 x 127 are 64,770, past 32,767: they are clipped, in silence. Weights of 7 bits cannot do that.
    Where the flags cannot be read it is so, for safety: 7 bits cost little accuracy, clipping costs much.
    """
    if not of:
        return True
    return X86 in of and "VNNI" not in features(of)
