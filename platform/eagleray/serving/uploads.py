"""The images of a request: the body itself, the files of a form (RFC 7578), or base64 in JSON.

The body is in memory and within the limit already, so the form is cut by its boundary and nothing is copied to a file;
names of files and fields are not kept. Whether a file is an image is decided by its bytes, later, for itself alone.

Example:
    >>> read_upload("image/jpeg", data, LimitsConfig()).images == (data,)
    True
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Len
from pydantic import WithJsonSchema, with_config
from typing_extensions import TypedDict  # pydantic reads typing's own only from Python 3.12 on

from eagleray.serving.json_body import is_text, read_object
from eagleray.serving.refusals import (
    Refusal,
    bad_json,
    bad_request,
    empty_body,
    too_many_images,
    unsupported_media_type,
)
from eagleray.serving.settings import LimitsConfig

FORM, JSON, ANY_BYTES = "multipart/form-data", "application/json", "application/octet-stream"
ACCEPTED = ("image/*", ANY_BYTES, FORM, JSON)
MAX_PART_HEADERS = 8_192  # bytes; browsers and curl send some 150
# RFC 2046, section 5.1.1: 1 to 70 of these characters; a parameter's value may be quoted
# A file has a name or a type of its own; the text field of a form has neither (RFC 7578, sections 4.2 and 4.4)
_FILE = re.compile(rb";[ \t]*filename\*?=|(?:^|\n)content-type:", re.I)
_BOUNDARY = re.compile(
    r"""(?:^|;)\s*boundary=(?:"([^"\r\n]{1,70})"|([!#$%&'*+.^_`|~0-9A-Za-z:/=?,()-]{1,70}))\s*(?:;|$)""", re.I
)


_Base64 = Annotated[str, WithJsonSchema({"type": "string", "format": "byte", "contentEncoding": "base64"})]


@with_config(extra="forbid")
class OneImage(TypedDict):
    """A JSON body with one image: the answer is one."""

    image: _Base64


@with_config(extra="forbid")
class SeveralImages(TypedDict):
    """A JSON body with several images: the answer is a list."""

    images: Annotated[list[_Base64], Len(1)]


@dataclass(frozen=True, slots=True)
class Upload:
    """What a request brought.

    Attributes:
        images: The encoded images, in order; one may be empty, or no image.
        is_single: Whether one image was sent as such, and one answer is expected, not a list.
    """

    images: tuple[bytes, ...]
    is_single: bool


def read_upload(content_type: str, body: bytes, limits: LimitsConfig) -> Upload:
    """The images of a body.

    Args:
        content_type: The Content-Type header; "" when there is none: then the body is the image.
        body: All of it.
        limits: How many images it may hold, how deep its JSON may go.

    Raises:
        Refusal: ``empty_body``, ``unsupported_media_type``, ``bad_request``, ``bad_json`` or ``too_many_images``.
    """
    if not body:
        raise empty_body()
    kind, _, parameters = content_type.partition(";")
    kind = kind.strip().lower()
    if kind in ("", ANY_BYTES) or kind.startswith("image/"):
        return Upload((body,), is_single=True)
    if kind == FORM:
        images = _form_files(body, parameters, limits.max_images_per_request)
        return Upload(images, is_single=False)
    if kind == JSON:
        return _json_images(read_object(body, max_depth=limits.max_json_depth), limits.max_images_per_request)
    raise unsupported_media_type(ACCEPTED)


def from_base64(value: Any) -> bytes:
    """An image from base64 (RFC 4648, section 4), with its padding.

    Raises:
        Refusal: ``bad_json``.
    """
    if not is_text(value):
        raise bad_json("an image in JSON is a string of base64")
    try:
        return base64.b64decode(value.encode(), validate=True)
    except (binascii.Error, ValueError):
        raise bad_json("an image in JSON is base64 (RFC 4648, section 4), padded, without spaces") from None


def _json_images(value: dict[str, Any], most: int) -> Upload:
    if list(value) == ["image"]:
        return Upload((_not_empty(from_base64(value["image"])),), is_single=True)
    if list(value) != ["images"]:
        raise bad_json('expected {"image": BASE64} or {"images": [BASE64, ...]}')
    listed = value["images"]
    if not isinstance(listed, list) or not listed:
        raise bad_json("images is a list of base64 strings, at least one")
    if len(listed) > most:
        raise too_many_images(most)
    return Upload(tuple(from_base64(text) for text in listed), is_single=False)


def _not_empty(image: bytes) -> bytes:
    if not image:
        raise empty_body()
    return image


def _form_files(body: bytes, parameters: str, most: int) -> tuple[bytes, ...]:
    found = _BOUNDARY.search(parameters)
    if found is None:
        raise bad_request("the Content-Type of a form names its boundary: multipart/form-data; boundary=...")
    delimiter = b"\r\n--" + (found[1] or found[2]).encode("latin-1", "replace")
    whole = b"\r\n" + body  # the first delimiter stands at the very start, without a line end before it
    at = whole.find(delimiter)
    images: list[bytes] = []
    while True:
        if at < 0:
            raise bad_request("the form has no closing boundary: it is not whole")
        start = at + len(delimiter)
        if whole[start : start + 2] == b"--":
            break
        at = whole.find(delimiter, start)
        if at >= 0:
            if len(images) == most:
                raise too_many_images(most)
            images.append(_part_content(whole, start, at))
    if not images:
        raise bad_request("the form holds no file")
    return tuple(images)


def _part_content(whole: bytes, start: int, end: int) -> bytes:
    """The content of the part between the end of its delimiter and the next delimiter."""
    head_end = whole.find(b"\r\n\r\n", start, min(end, start + MAX_PART_HEADERS))
    if head_end < 0:
        raise _bad_part()
    # The rest of the delimiter's line is white space only (RFC 2046, section 5.1.1)
    line, _, head = whole[start : head_end + 2].partition(b"\r\n")
    if line.strip(b" \t") or not _FILE.search(head):
        raise _bad_part()
    return whole[head_end + 4 : end]


def _bad_part() -> Refusal:
    return bad_request('each part of the form is a file: Content-Disposition: form-data; name="file"; filename="..."')
