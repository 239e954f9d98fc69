"""sandbox.py: an image that kills, hangs or swells its reader is poison and costs itself only."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from eagleray.core.errors import CapabilityError
from eagleray.vision.images import ImageRefused, ImageSpec, Limits, Reason, decode, validate
from eagleray.vision.sandbox import SandboxedDecoder
from PIL import Image

SPEC = ImageSpec(16, 12)
# What a broken codec may do to the process, in the child only: a comment in the JPEG says which.
BROKEN_CODEC = """
    import os, signal, time
    import simplejpeg
    whole = simplejpeg.decode_jpeg
    def decode_jpeg(data, *args, **kwargs):
        if b"POISON exit" in data: os._exit(3)
        if b"POISON segv" in data: os.kill(os.getpid(), signal.SIGSEGV)
        if b"POISON hang" in data: time.sleep(600)
        if b"POISON swell" in data: return bytearray(2**40)
        if b"POISON print" in data: os.write(1, b"codec says hello")
        return whole(data, *args, **kwargs)
    simplejpeg.decode_jpeg = decode_jpeg
"""


def jpeg(comment: str = "", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", comment=comment.encode())
    return buffer.getvalue()


@pytest.fixture
def broken_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(BROKEN_CODEC))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SandboxedDecoder]:
    with SandboxedDecoder() as shared:
        yield shared


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "eagleray.vision.sandbox" in " ".join(child.cmdline())]


def test_the_sandbox_gives_what_decode_gives(sandbox: SandboxedDecoder) -> None:
    np.testing.assert_array_equal(sandbox.decode(jpeg(), SPEC), decode(jpeg(), SPEC))
    assert sandbox.validate(jpeg()) == validate(jpeg())


@pytest.mark.parametrize("data", [b"", b"text", jpeg()[:-100], b"8BPS" + bytes(40)])
def test_the_sandbox_refuses_as_decode_does(sandbox: SandboxedDecoder, data: bytes) -> None:
    with pytest.raises(ImageRefused) as here:
        validate(data)
    for read in (lambda: sandbox.validate(data), lambda: sandbox.decode(data, SPEC)):
        with pytest.raises(ImageRefused) as there:
            read()
        assert (there.value.reason, there.value.detail) == (here.value.reason, here.value.detail)


def test_a_large_file_goes_through_the_pipes(sandbox: SandboxedDecoder) -> None:
    data = jpeg() + bytes(20 * 2**20)
    np.testing.assert_array_equal(sandbox.decode(data, SPEC), decode(jpeg(), SPEC))


def test_limits_are_those_of_the_caller() -> None:
    with SandboxedDecoder(limits=Limits(max_side_px=39)) as small, pytest.raises(ImageRefused) as caught:
        small.validate(jpeg())
    assert caught.value.reason == Reason.TOO_LARGE


@pytest.mark.usefixtures("broken_codec")
@pytest.mark.parametrize(("poison", "says"), [("exit", "exit 3"), ("segv", "SIGSEGV"), ("swell", "memory")])
def test_what_kills_the_child_is_poison_and_the_next_image_is_read(poison: str, says: str) -> None:
    before = children()
    with SandboxedDecoder(memory_mib=512) as sandbox:
        for turn in range(2):
            with pytest.raises(ImageRefused) as caught:
                sandbox.decode(jpeg(f"POISON {poison}"), SPEC)
            assert caught.value.reason == Reason.POISON
            assert says in caught.value.detail
            np.testing.assert_array_equal(sandbox.decode(jpeg(seed=turn), SPEC), decode(jpeg(seed=turn), SPEC))
    assert children() == before


@pytest.mark.usefixtures("broken_codec")
def test_what_hangs_is_killed_on_time_and_the_next_image_is_read() -> None:
    before = children()
    with SandboxedDecoder(timeout_s=2) as sandbox:
        sandbox.validate(jpeg())
        with pytest.raises(ImageRefused) as caught:
            sandbox.validate(jpeg("POISON hang"))
        assert str(caught.value) == "poison: not read within 2 s"
        assert sandbox.validate(jpeg()).width == 40
    assert children() == before


@pytest.mark.usefixtures("broken_codec")
def test_a_codec_that_prints_does_not_break_the_frames() -> None:
    with SandboxedDecoder() as sandbox:
        assert sandbox.validate(jpeg("POISON print")).width == 40
        assert sandbox.validate(jpeg()).width == 40


def test_a_picture_over_the_memory_limit_is_poison_and_the_next_is_read() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(buffer, "PNG", compress_level=1)
    with SandboxedDecoder(memory_mib=40) as sandbox:
        with pytest.raises(ImageRefused) as caught:
            sandbox.validate(buffer.getvalue())
        assert caught.value.reason == Reason.POISON
        assert sandbox.validate(jpeg()).width == 40
    with SandboxedDecoder(memory_mib=400) as sandbox:
        assert sandbox.validate(buffer.getvalue()).width == 4000


def test_threads_take_turns(sandbox: SandboxedDecoder) -> None:
    expected = [decode(jpeg(seed=seed), SPEC) for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(5):
            if not np.array_equal(sandbox.decode(jpeg(seed=seed), SPEC), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_child_that_cannot_start_blames_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with SandboxedDecoder() as sandbox, pytest.raises(CapabilityError) as caught:
        sandbox.validate(jpeg())
    assert "exit 1" in str(caught.value)


def test_the_child_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "from eagleray.vision.sandbox import SandboxedDecoder\n"
            "sandbox = SandboxedDecoder()\n"
            "try: sandbox.validate(b'')\n"
            "except Exception: print(sandbox._child.pid, flush=True)\n"
            "time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "platform")},
    )
    assert parent.stdout is not None
    with parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_the_child_imports_neither_torch_nor_ray_nor_pyarrow() -> None:
    code = (
        "import sys, eagleray.vision.sandbox\n"
        "print([name for name in ('torch', 'ray', 'pyarrow', 'pandas', 'timm', 'pydantic') if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "platform")}
    answer = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
