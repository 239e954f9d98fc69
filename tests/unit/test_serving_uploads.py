"""The images of a request: forms against the standard library's reading of them, JSON, and what limits both."""

from __future__ import annotations

import json
from contextlib import suppress
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

import pytest
from eagleray.serving.json_body import MAX_VALUES, is_integer, is_text, read_json, read_object
from eagleray.serving.refusals import Refusal
from eagleray.serving.settings import LimitsConfig
from eagleray.serving.uploads import from_base64, read_upload
from hypothesis import assume, given
from hypothesis import strategies as st

LIMITS = LimitsConfig()
BOUNDARY = "----WebKitFormBoundary7MA4YWxkTrZu0gW"


def form(files: list[bytes], boundary: str = BOUNDARY, before: bytes = b"", after: bytes = b"\r\n") -> bytes:
    head = b'Content-Disposition: form-data; name="file"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    parts = [b"--" + boundary.encode() + b"\r\n" + head + file + b"\r\n" for file in files]
    return before + b"".join(parts) + b"--" + boundary.encode() + b"--" + after


def read_form(body: bytes, boundary: str = BOUNDARY) -> tuple[bytes, ...]:
    return read_upload(f"multipart/form-data; boundary={boundary}", body, LIMITS).images


@given(
    files=st.lists(
        st.binary(max_size=80) | st.sampled_from([b"\r\n", b"\r\n--", b"--", b"\r\n\r\n"]), min_size=1, max_size=5
    )
)
def test_a_form_is_read_as_the_standard_library_reads_it(files: list[bytes]) -> None:
    body = form(files)
    head = f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    oracle = [part.get_payload(decode=True) for part in message.iter_parts()]
    assume([len(part or b"") for part in oracle] == [len(file) for file in files])  # it changes bare line ends
    assert read_form(body) == tuple(files)


@given(files=st.lists(st.binary(max_size=40), min_size=1, max_size=4))
def test_what_was_put_into_a_form_comes_out(files: list[bytes]) -> None:
    assert read_form(form(files)) == tuple(files)
    assert read_form(form(files, before=b"a preamble\r\n", after=b"\r\nan epilogue")) == tuple(files)


@given(body=st.binary(max_size=200))
def test_any_form_is_read_or_refused(body: bytes) -> None:
    for content in (
        body,
        b"--b\r\n" + body,
        b'--b\r\nContent-Disposition: form-data; filename="x"\r\n\r\n' + body + b"\r\n--b--",
    ):
        with suppress(Refusal):
            assert all(isinstance(image, bytes) for image in read_form(content, "b"))


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/form-data; boundary="quoted: b"',
        "Multipart/Form-Data;boundary=quoted-b",
        "multipart/form-data; charset=utf-8; BOUNDARY=quoted-b; x=y",
    ],
)
def test_a_boundary_is_read_in_every_spelling(content_type: str) -> None:
    boundary = "quoted: b" if '"' in content_type else "quoted-b"
    assert read_upload(content_type, form([b"x"], boundary), LIMITS).images == (b"x",)


@pytest.mark.parametrize("content_type", ["image/jpeg", "IMAGE/PNG; q=1", "application/octet-stream", ""])
def test_a_body_without_a_container_is_the_image(content_type: str) -> None:
    upload = read_upload(content_type, b"x", LIMITS)
    assert (upload.images, upload.is_single) == ((b"x",), True)


@pytest.mark.parametrize(
    ("head", "is_file"),
    [
        (b'Content-Disposition: form-data; name="f"; filename="a"', True),
        (b"content-disposition: form-data; name=f;filename*=UTF-8''a", True),
        (b'Content-Disposition: form-data; name="f"\r\nContent-Type: image/png', True),
        (b'CONTENT-TYPE: image/png\r\nContent-Disposition: form-data; name="f"', True),
        (b'Content-Disposition: form-data; name="filename"', False),
        (b'Content-Disposition: form-data; name="f"\r\nX-Content-Type: image/png', False),
    ],
)
def test_a_part_is_a_file_by_its_name_or_its_type(head: bytes, is_file: bool) -> None:
    body = b"--b\r\n" + head + b"\r\n\r\nx\r\n--b--"
    if is_file:
        assert read_form(body, "b") == (b"x",)
    else:
        with pytest.raises(Refusal):
            read_form(body, "b")


def test_a_boundary_within_a_file_ends_it_only_with_its_line() -> None:
    with pytest.raises(Refusal):  # "--bc" begins with the delimiter of "b": the sender chose a bad boundary
        read_form(form([b"\r\n--bc"], "b"), "b")


def test_a_part_whose_head_never_ends_is_refused() -> None:
    body = b'--b\r\nContent-Disposition: form-data; filename="x"; ' + b"a" * 9000 + b"\r\n\r\nx\r\n--b--"
    with pytest.raises(Refusal):
        read_form(body, "b")


@given(data=st.binary(max_size=50))
def test_base64_comes_out_as_it_went_in(data: bytes) -> None:
    import base64

    assert from_base64(base64.b64encode(data).decode()) == data


@pytest.mark.parametrize("value", [None, 3, "A", "QQ", "QQ==\n", " QQ==", "Q-_=", "QQ==QQ==", "é", "\ud800"])
def test_what_is_not_base64_is_refused(value: Any) -> None:
    with pytest.raises(Refusal) as refusal:
        from_base64(value)
    assert refusal.value.code == "bad_json"


@given(depth=st.integers(0, 12), most=st.integers(1, 10), is_object=st.booleans())
def test_depth_is_the_number_of_levels(depth: int, most: int, is_object: bool) -> None:
    text = "1"
    for _ in range(depth):
        text = f'{{"a": {text}, "b": [{"" if depth < 2 else 1}]}}' if is_object and depth < 2 else f"[{text}]"
    deepest = depth + (1 if is_object and depth == 1 else 0)
    if deepest <= most:
        assert read_json(text.encode(), max_depth=most) == json.loads(text)
    else:
        with pytest.raises(Refusal):
            read_json(text.encode(), max_depth=most)


def test_brackets_within_a_text_are_no_levels() -> None:
    assert read_json(json.dumps({"a": "[" * 100}).encode(), max_depth=1) == {"a": "[" * 100}


def test_a_body_of_a_million_values_is_refused_before_it_is_read() -> None:
    with pytest.raises(Refusal) as refusal:
        read_json(b"," * MAX_VALUES, max_depth=2)
    assert "values" in refusal.value.detail


@given(body=st.binary(max_size=40))
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    with suppress(Refusal):
        assert isinstance(read_object(body, max_depth=4), dict)


def test_numbers_and_texts_are_told_from_what_looks_like_them() -> None:
    assert [is_integer(value) for value in (1, True, 1.0, "1", None)] == [True, False, False, False, False]
    assert [is_text(value) for value in ("é😀", "\udc00", b"x", 1)] == [True, False, False, False]
