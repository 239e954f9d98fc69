"""The Open Inference Protocol v2: JSON and binary tensors in and out, against the little model."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eagleray.serving.app import build_app
from eagleray.serving.passport import Passport
from eagleray.serving.protocol_v2 import OUTPUTS
from eagleray.serving.settings import LimitsConfig
from eagleray.vision.images import decode
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from tests.serving_service import DirectService, direct_service, local_passport

INFER = "/v2/models/tiny/infer"
LENGTH = "inference-header-content-length"


@pytest.fixture(scope="module")
def service(tiny_model: Path) -> DirectService:
    return direct_service(tiny_model)


@pytest.fixture(scope="module")
def client(service: DirectService) -> TestClient:
    return TestClient(build_app(service, passport=local_passport), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def photos(make_photo: Callable[..., bytes]) -> list[bytes]:
    return [make_photo(seed) for seed in range(3)]


def packed(elements: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def binary(client: TestClient, head: dict[str, Any], tail: bytes, path: str = INFER) -> Any:
    text = json.dumps(head).encode()
    return client.post(path, content=text + tail, headers={LENGTH: str(len(text))})


def image_input(count: int, **more: Any) -> dict[str, Any]:
    return {"name": "image", "shape": [count], "datatype": "BYTES", **more}


def values_of(answer: Any) -> dict[str, np.ndarray]:
    """The outputs of an answer, read as the extension's specification says."""
    assert answer.status_code == 200, answer.text
    length = answer.headers.get(LENGTH)
    head = json.loads(answer.content[: int(length)] if length else answer.content)
    tail, found = answer.content[int(length) :] if length else b"", {}
    for tensor in head["outputs"]:
        size = tensor.get("parameters", {}).get("binary_data_size")
        if size is None:
            data = tensor["data"]
        else:
            raw, tail = tail[:size], tail[size:]
            data = unpacked(raw) if tensor["datatype"] == "BYTES" else np.frombuffer(raw, "<f4")
        found[tensor["name"]] = np.array(data, object if tensor["datatype"] == "BYTES" else np.float32).reshape(
            tensor["shape"]
        )
    assert tail == b""
    return found


def unpacked(raw: bytes) -> list[str]:
    texts = []
    while raw:
        (size,) = struct.unpack_from("<I", raw)
        texts.append(raw[4 : 4 + size].decode())
        raw = raw[4 + size :]
    return texts


def test_binary_and_json_tensors_give_the_same_answers(
    client: TestClient, service: DirectService, photos: list[bytes]
) -> None:
    tail = packed(photos)
    head = {"id": "7", "inputs": [image_input(3, parameters={"binary_data_size": len(tail)})]}
    answer = binary(client, {**head, "parameters": {"binary_data_output": True}}, tail)
    assert answer.headers["content-type"] == "application/octet-stream"
    from_binary = values_of(answer)
    data = [base64.b64encode(photo).decode() for photo in photos]
    from_json = values_of(client.post(INFER, json={"inputs": [image_input(3, data=data)]}))
    column = {**image_input(3, data=[[text] for text in data]), "shape": [3, 1]}
    from_column = values_of(client.post(INFER, json={"inputs": [column]}))
    assert set(from_binary) == set(OUTPUTS) - {"embedding"}
    for name, values in from_binary.items():
        np.testing.assert_array_equal(values, from_json[name])
        np.testing.assert_array_equal(values, from_column[name])
    expected = service.classifiers["tiny"].predict(photos)
    assert from_binary["label"].tolist() == [prediction.label for prediction in expected]
    assert from_binary["score"].tolist() == [prediction.score for prediction in expected]
    np.testing.assert_allclose(from_binary["probabilities"].sum(1), 1, atol=1e-6)  # float32 sums of 5


def test_pixels_give_what_their_image_gives(client: TestClient, service: DirectService, photos: list[bytes]) -> None:
    spec = service.classifiers["tiny"].bundle.image_spec
    pixels = np.stack([decode(photo, spec) for photo in photos])
    tensor = {"name": "image", "shape": list(pixels.shape), "datatype": "UINT8"}
    sent = {"inputs": [{**tensor, "parameters": {"binary_data_size": pixels.nbytes}}]}
    from_binary = values_of(binary(client, sent, pixels.tobytes()))
    from_flat = values_of(client.post(INFER, json={"inputs": [{**tensor, "data": pixels.ravel().tolist()}]}))
    from_nested = values_of(client.post(INFER, json={"inputs": [{**tensor, "data": pixels.tolist()}]}))
    data = [base64.b64encode(photo).decode() for photo in photos]
    from_images = values_of(client.post(INFER, json={"inputs": [image_input(3, data=data)]}))
    for found in (from_binary, from_flat, from_nested):
        np.testing.assert_array_equal(found["probabilities"], from_images["probabilities"])


def test_outputs_are_those_that_were_asked_for_each_in_its_form(client: TestClient, photos: list[bytes]) -> None:
    tail = packed(photos[:1])
    outputs = [
        {"name": "embedding", "parameters": {"binary_data": True}},
        {"name": "label"},
        {"name": "score", "parameters": {"binary_data": False}},
    ]
    head = {"inputs": [image_input(1, parameters={"binary_data_size": len(tail)})], "outputs": outputs}
    answer = binary(client, {**head, "parameters": {"binary_data_output": False}}, tail)
    body = json.loads(answer.content[: int(answer.headers[LENGTH])])
    assert [tensor["name"] for tensor in body["outputs"]] == ["embedding", "label", "score"]
    assert ["data" in tensor for tensor in body["outputs"]] == [False, True, True]
    assert values_of(answer)["embedding"].shape == (1, 5)


def test_a_bad_image_leaves_an_empty_row_and_a_reason(client: TestClient, photos: list[bytes]) -> None:
    tail = packed([photos[0], b"not an image", photos[1]])
    answer = binary(client, {"inputs": [image_input(3, parameters={"binary_data_size": len(tail)})]}, tail)
    found = values_of(answer)
    assert found["reason"].tolist() == ["", "not_image", ""]
    assert found["label"][1] == ""
    assert found["probabilities"][1].tolist() == [0.0] * 5
    assert found["score"][1] == 0
    assert found["score"][2] > 0
    assert answer.headers["x-eagleray-images"] == "3"


def test_where_no_image_can_be_used_the_request_is_refused(client: TestClient) -> None:
    answer = client.post(INFER, json={"inputs": [image_input(1, data=["QUJD"])]})
    assert answer.status_code == 422
    assert list(answer.json()) == ["error"]


def test_the_id_is_echoed_and_the_model_named(client: TestClient, service: DirectService, photos: list[bytes]) -> None:
    data = [base64.b64encode(photos[0]).decode()]
    digest = service.classifiers["tiny"].bundle.model_digest
    body = client.post(INFER, json={"id": "é-7", "inputs": [image_input(1, data=data)]}).json()
    assert (body["id"], body["model_name"], body["model_version"]) == ("é-7", "tiny", digest[:12])
    assert body["parameters"] == {"model_digest": digest, "request_id": "request-1"}
    assert "id" not in client.post(INFER, json={"inputs": [image_input(1, data=data)]}).json()


def test_metadata_describes_what_infer_takes_and_gives(client: TestClient, service: DirectService) -> None:
    digest = service.classifiers["tiny"].bundle.model_digest
    body = client.get("/v2/models/tiny").json()
    assert body["versions"] == [digest[:12]]
    assert body["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert {output["name"]: output["shape"] for output in body["outputs"]} == {
        "probabilities": [-1, 5],
        "label": [-1],
        "label_name": [-1],
        "score": [-1],
        "decision": [-1],
        "reason": [-1],
        "embedding": [-1, 5],
    }
    assert client.get(f"/v2/models/tiny/versions/{digest[:12]}").json() == body
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/models/tiny/ready").json() == {"name": "tiny", "ready": True}
    assert client.get(f"/v2/models/tiny/versions/{digest[:12]}/ready").status_code == 200


@pytest.mark.parametrize(
    "path", ["/v2/models/none", "/v2/models/none/ready", "/v2/models/tiny/versions/1", "/v2/nothing"]
)
def test_an_unknown_model_version_or_path_is_refused_in_the_protocols_form(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, list(answer.json())) == (404, ["error"])


def test_an_embedding_needs_the_right_to_it(service: DirectService, photos: list[bytes]) -> None:
    passport = Passport(tenant="acme", request_id="r", actions=("predict",))
    client = TestClient(build_app(service, passport=lambda scope: passport))
    inputs = [image_input(1, data=[base64.b64encode(photos[0]).decode()])]
    assert client.post(INFER, json={"inputs": inputs}).status_code == 200
    answer = client.post(INFER, json={"inputs": inputs, "outputs": [{"name": "embedding"}]})
    assert (answer.status_code, list(answer.json())) == (403, ["error"])


def test_a_timeout_of_the_protocol_is_a_deadline(
    client: TestClient, service: DirectService, photos: list[bytes]
) -> None:
    inputs = [image_input(1, data=[base64.b64encode(photos[0]).decode()])]
    client.post(INFER, json={"inputs": inputs, "parameters": {"timeout": 5_000_000}})
    client.post(INFER, json={"inputs": inputs})
    short, long = service.asked[-2:]
    assert 3 < long.deadline - short.deadline < 10


WRONG: list[tuple[str, Any]] = [
    ("no JSON", b"{"),
    ("a list", []),
    ("no inputs", {}),
    ("two inputs", {"inputs": [image_input(1, data=["QQ=="])] * 2}),
    ("another name", {"inputs": [{**image_input(1, data=["QQ=="]), "name": "pixels"}]}),
    ("another datatype", {"inputs": [{**image_input(1, data=[0.5]), "datatype": "FP32"}]}),
    ("no shape", {"inputs": [{"name": "image", "datatype": "BYTES", "data": ["QQ=="]}]}),
    ("a negative shape", {"inputs": [image_input(-1, data=["QQ=="])]}),
    ("an empty batch", {"inputs": [image_input(0, data=[])]}),
    ("true as a shape", {"inputs": [{**image_input(1, data=["QQ=="]), "shape": [True]}]}),
    ("a huge shape", {"inputs": [{**image_input(1, data=["QQ=="]), "shape": [2**63]}]}),
    ("a shape of another rank", {"inputs": [{**image_input(1, data=["QQ=="]), "shape": [1, 2]}]}),
    ("fewer data than the shape", {"inputs": [image_input(2, data=["QQ=="])]}),
    ("data that are no base64", {"inputs": [image_input(1, data=["?"])]}),
    ("data that are numbers", {"inputs": [image_input(1, data=[1])]}),
    ("no data", {"inputs": [image_input(1)]}),
    (
        "pixels of another size",
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": [0] * 192}]},
    ),
    (
        "pixels over 255",
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [256] * 3072}]},
    ),
    (
        "pixels below 0",
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [-1] * 3072}]},
    ),
    (
        "fractions as pixels",
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0.5] * 3072}]},
    ),
    (
        "true as pixels",
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [True] * 3072}]},
    ),
    (
        "ragged pixels",
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [[1], [1, 2]]}]},
    ),
    (
        "huge pixels",
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [2**70] * 3072}]},
    ),
    ("few pixels", {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": []}]}),
    ("an unknown output", {"inputs": [image_input(1, data=["QQ=="])], "outputs": [{"name": "logits"}]}),
    ("an output twice", {"inputs": [image_input(1, data=["QQ=="])], "outputs": [{"name": "score"}] * 2}),
    ("an output without a name", {"inputs": [image_input(1, data=["QQ=="])], "outputs": [{}]}),
    ("an output's name is a list", {"inputs": [image_input(1, data=["QQ=="])], "outputs": [{"name": []}]}),
    ("outputs are an object", {"inputs": [image_input(1, data=["QQ=="])], "outputs": {}}),
    ("an id that is a number", {"id": 7, "inputs": [image_input(1, data=["QQ=="])]}),
    ("a very long id", {"id": "7" * 257, "inputs": [image_input(1, data=["QQ=="])]}),
    ("an id that cannot be written", b'{"id": "\\ud800", "inputs": []}'),
    ("a timeout of no number", {"parameters": {"timeout": "1"}, "inputs": [image_input(1, data=["QQ=="])]}),
    ("a flag that is a text", {"parameters": {"binary_data_output": "yes"}, "inputs": [image_input(1, data=["QQ=="])]}),
    ("parameters are a list", {"parameters": [], "inputs": [image_input(1, data=["QQ=="])]}),
    ("shared memory", {"inputs": [image_input(1, parameters={"shared_memory_region": "x"})]}),
    (
        "classification",
        {
            "inputs": [image_input(1, data=["QQ=="])],
            "outputs": [{"name": "score", "parameters": {"classification": 3}}],
        },
    ),
    ("a binary size without binary data", {"inputs": [image_input(1, parameters={"binary_data_size": 5})]}),
    ("a tower", b"[" * 100_000),
]


@pytest.mark.parametrize("body", [body for _, body in WRONG], ids=[name for name, _ in WRONG])
def test_a_wrong_request_is_400_in_the_protocols_form(client: TestClient, service: DirectService, body: Any) -> None:
    before = len(service.asked)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(INFER, content=content)
    assert (answer.status_code, list(answer.json())) == (400, ["error"]), answer.text
    assert len(service.asked) == before


def test_too_many_images_and_an_empty_body_and_a_foreign_type_are_refused(client: TestClient) -> None:
    assert client.post(INFER, content=b"").status_code == 400
    assert client.post(INFER, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.post(INFER, json={"inputs": [image_input(33, data=["QQ=="] * 33)]}).status_code == 422


@pytest.mark.parametrize("length", ["", "-1", "x", "9" * 30, "99999", "²", "0"])
def test_a_wrong_header_length_is_refused(client: TestClient, length: str) -> None:
    answer = client.post(INFER, content=b"{}", headers={LENGTH: length.encode("latin-1")})
    assert answer.status_code == 400


@given(tail=st.binary(max_size=60), count=st.integers(1, 4), lie=st.integers(-3, 3))
def test_any_binary_tail_is_answered_with_a_typed_refusal(
    client: TestClient, tail: bytes, count: int, lie: int
) -> None:
    head = {"inputs": [image_input(count, parameters={"binary_data_size": len(tail) + lie})]}
    answer = binary(client, head, tail)
    assert answer.status_code in (400, 422)
    assert list(answer.json()) == ["error"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(key=st.sampled_from(["id", "inputs", "outputs", "parameters"]), value=JSON_VALUES)
def test_any_json_in_any_place_is_answered_with_a_typed_refusal(client: TestClient, key: str, value: Any) -> None:
    body = {"inputs": [image_input(1, data=["QQ=="])], key: value}
    answer = client.post(INFER, content=json.dumps(body).encode())
    assert answer.status_code in (400, 422)
    assert list(answer.json()) == ["error"]


@given(key=st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), value=JSON_VALUES)
def test_any_json_in_the_input_is_answered_with_a_typed_refusal(client: TestClient, key: str, value: Any) -> None:
    body = {"inputs": [{**image_input(1, data=["QQ=="]), key: value}]}
    answer = client.post(INFER, content=json.dumps(body).encode())
    assert answer.status_code in (400, 422)
    assert list(answer.json()) == ["error"]


def test_the_limit_of_values_is_above_what_a_batch_of_pixels_needs() -> None:
    from eagleray.serving.json_body import MAX_VALUES

    assert MAX_VALUES > 6 * 224 * 224 * 3
    assert LimitsConfig().max_json_depth >= 7  # {inputs: [{data: [[[[ ]]]]}]}


def test_the_outputs_of_the_document_are_those_that_are_read() -> None:
    from typing import get_args, get_type_hints

    from eagleray.serving.messages_v2 import RequestedOutput

    assert list(get_args(get_type_hints(RequestedOutput)["name"])) == list(OUTPUTS)
