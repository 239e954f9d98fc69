"""What schemathesis cannot know: what an image is. Loaded by the CLI (SCHEMATHESIS_HOOKS=tests.schemathesis_hooks)."""

from __future__ import annotations

import base64
import io
import re

import schemathesis
from hypothesis import strategies as st
from PIL import Image


def _photo(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((40, 30)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


JPEG, PNG, WEBP = (_photo(kind) for kind in ("JPEG", "PNG", "WEBP"))
schemathesis.openapi.media_type("image/jpeg", st.just(JPEG))
schemathesis.openapi.media_type("image/png", st.just(PNG))
schemathesis.openapi.media_type("image/webp", st.just(WEBP))
schemathesis.openapi.media_type("application/octet-stream", st.sampled_from([JPEG, PNG, WEBP]))
schemathesis.openapi.format("byte", st.sampled_from([base64.b64encode(data).decode() for data in (JPEG, PNG, WEBP)]))


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: object) -> None:
    """What no schema can say: a tensor's data fit its shape, its outputs are the model's, and 1 ms is too short."""
    given = (case.headers or {}).get("X-Deadline-Ms", "")
    if re.fullmatch(r"[1-9][0-9]{0,8}", given, re.ASCII):
        case.headers["X-Deadline-Ms"] = "9000"
    meta = case.meta
    if meta is None or not meta.generation.mode.is_positive or not isinstance(case.body, dict):
        return
    if "infer" in case.operation.path:
        photos = [base64.b64encode(data).decode() for data in (JPEG, PNG, WEBP)]
        names = {output["name"] for output in case.body.get("outputs", [])} - {"embedding"}
        kept = {name: value for name, value in case.body.items() if name != "parameters"}
        case.body = {  # a new one: schemathesis shares one body among its cases
            **kept,
            "inputs": [{"name": "image", "shape": [3], "datatype": "BYTES", "data": photos}],
            "outputs": [{"name": name} for name in sorted(names)],
        }
