"""The request log tells how much and how long, and nothing of what."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from eagleray.core.errors import StorageError
from eagleray.serving import request_log
from eagleray.serving.bodies import Body, Budget
from eagleray.serving.exchanges import Exchange
from eagleray.serving.passport import Passport
from eagleray.serving.paths import Target
from eagleray.serving.request_log import RequestLog
from eagleray.serving.service import Answer, Batch, ModelCard, Timing
from eagleray.serving.traces import TraceContext
from eagleray.serving.visits import Visit
from eagleray.vision.prediction import Label, Prediction

DIGEST = "ab" * 32
TIMING = Timing(queue_ms=1.0, decode_ms=2.5, infer_ms=3.25, batch_size=4)


def exchange(*inputs: bytes, decision: str | None = "cat") -> Exchange:
    card = ModelCard(name="lite0", digest=DIGEST, labels=(Label("cat", "Cat"),), height=8, width=8, runtime="onnx")
    said = Prediction(
        status="scored", label="cat", label_name="Cat", score=0.987, decision=decision, model_digest=DIGEST
    )
    found = Exchange("predict", "r-12345678", inputs=inputs, body_bytes=sum(map(len, inputs)), num_images=len(inputs))
    found.passport = Passport("acme", "r-12345678", trace=TraceContext.new().to_header(), key_id="0123456789ab")
    found.card, found.status, found.seconds = card, 200, 0.0123
    found.batch = Batch(card=card, answers=tuple(Answer(prediction=said, timing=TIMING) for _ in inputs))
    return found


def lines(folder: Path) -> list[dict]:
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_tells_sizes_times_and_the_decision_and_nothing_of_the_image(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log")
    log(exchange(b"image one", b"image two is longer"))
    log.close()
    (line,) = lines(tmp_path / "log")
    assert line["request_id"] == "r-12345678"
    assert (line["tenant"], line["model"], line["model_version"]) == ("acme", "lite0", DIGEST[:12])
    assert (line["status"], line["ms"], line["bytes"], line["num_images"]) == (200, 12.3, 28, 2)
    assert len(line["trace_id"]) == 32
    assert [image["bytes"] for image in line["images"]] == [9, 19]
    assert line["images"][0]["decision"] == "cat"
    assert line["images"][0]["infer_ms"] == 3.25
    text = (next((tmp_path / "log").glob("*.jsonl"))).read_text()
    for secret in ("image one", "Cat", "0.987"):
        assert secret not in text
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o700
    assert next((tmp_path / "log").glob("*.jsonl")).stat().st_mode & 0o777 == 0o600


def test_nodes_that_share_a_folder_share_no_file(tmp_path: Path, monkeypatch) -> None:
    for host in ("node-1", "node-2"):
        monkeypatch.setattr(request_log.socket, "gethostname", lambda host=host: host)
        log = RequestLog(tmp_path)
        log(exchange(b"x"))
        log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"requests-node-{number}-{os.getpid()}.jsonl" for number in (1, 2)
    ]


def test_equal_inputs_have_equal_hashes_under_one_key_and_no_others(tmp_path: Path) -> None:
    hashes = []
    for name, key in [("a", b"k" * 32), ("b", b"k" * 32), ("c", None), ("d", None)]:
        log = RequestLog(tmp_path / name, key=key)
        log(exchange(b"x", b"x", b"y"))
        log.close()
        hashes.append([image["hash"] for image in lines(tmp_path / name)[0]["images"]])
    assert hashes[0] == hashes[1]
    assert hashes[0][0] == hashes[0][1] != hashes[0][2]
    assert len({first for first, *_ in hashes}) == 3  # without a key, one process' hashes are no other's


def test_what_the_gateway_refused_is_a_line_too(tmp_path: Path) -> None:
    visit = Visit({}, "r-12345678", TraceContext.new(), None, Target("predict"), Body(Budget(10)))
    visit.status, visit.code, visit.body.num_read = 413, "too_large", 77
    log = RequestLog(tmp_path)
    log.refused(visit)
    log.close()
    (line,) = lines(tmp_path)
    assert (line["status"], line["code"], line["bytes"], line["tenant"]) == (413, "too_large", 77, "none")


def test_a_flood_loses_hashes_or_lines_and_says_so_and_holds_no_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(request_log, "MOST_PENDING_BYTES", 10)
    monkeypatch.setattr(request_log, "MOST_PENDING", 4)
    log = RequestLog(tmp_path)
    log._queue.put(None)  # the writer is gone: nothing leaves the queue
    log._thread.join(10)
    for _ in range(3):
        log(exchange(b"123456"))
    pending = [log._queue.get_nowait() for _ in range(3)]
    assert [len(entry[1]) for entry in pending if entry] == [1, 0, 0]
    assert pending[1] is not None
    assert pending[1][0]["hashes"] == "skipped"
    for _ in range(10):
        log(exchange())
    assert log._lost == 6


def test_a_full_file_is_put_aside_and_the_oldest_goes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(request_log, "FILE_BYTES", 1_000)
    log = RequestLog(tmp_path)
    for _ in range(60):
        log(exchange(b"x"))
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) in (request_log.FILES - 1, request_log.FILES)
    assert all(path.stat().st_size < 2_000 for path in tmp_path.iterdir())


def test_a_log_that_cannot_be_written_costs_no_answer(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "log"
    log = RequestLog(folder)
    folder.rmdir()
    log(exchange(b"x"))
    log.close()
    assert "was not written" in caplog.text
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        RequestLog(tmp_path / "file" / "log")
