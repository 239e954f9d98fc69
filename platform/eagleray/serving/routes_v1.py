"""The routes of /v1: classify images, embed them, list the models.

Example:
    >>> routes = v1_routes(desk)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.routing import Route

from eagleray.serving.answers import (
    batch_answer,
    embedding_answer,
    embedding_batch_answer,
    image_answer,
    model_info,
    quarantined,
)
from eagleray.serving.calls import Call, Desk, Endpoint, Reply
from eagleray.serving.refusals import Refusal, not_an_image
from eagleray.serving.service import Batch
from eagleray.serving.uploads import Upload, read_upload


def v1_routes(desk: Desk) -> list[Route]:
    """The routes, the busiest first."""
    return [
        Route("/v1/predict", Endpoint(desk, "predict", {"POST": predict})),
        Route("/v1/embed", Endpoint(desk, "embed", {"POST": embed})),
        Route("/v1/models", Endpoint(desk, "models", {"GET": models})),
    ]


async def predict(call: Call) -> Reply:
    """POST /v1/predict[?model=NAME&top_k=K]: what the model says about each image."""
    query = call.query("model", "top_k")
    card, top_k = call.model(query.get("model"), action="predict"), call.top_k(query.get("top_k"))
    ask = call.ask(card, top_k=top_k)
    upload = await read(call)
    batch = await call.answered(call.desk.service.predict(upload.images, ask), ask)
    request_id = ask.request_id
    if upload.is_single:
        refuse_all_bad(batch)
        return call.json(image_answer(batch, 0, top_k=top_k, request_id=request_id))
    value = batch_answer(batch, top_k=top_k, request_id=request_id)
    refuse_all_bad(batch, value, "predictions")
    return call.json(value)


async def embed(call: Call) -> Reply:
    """POST /v1/embed[?model=NAME]: the embedding of each image."""
    query = call.query("model")
    card = call.model(query.get("model"), action="embed")
    ask = call.ask(card, wants="embedding")
    if card.embedding_dim is None:
        raise Refusal("bad_parameter", f"{card.name} has no embedding; GET /v1/models lists those that have")
    upload = await read(call)
    batch = await call.answered(call.desk.service.predict(upload.images, ask), ask)
    if upload.is_single:
        refuse_all_bad(batch)
        return call.json(embedding_answer(batch, 0, request_id=ask.request_id))
    value = embedding_batch_answer(batch, request_id=ask.request_id)
    refuse_all_bad(batch, value, "embeddings")
    return call.json(value)


async def models(call: Call) -> Reply:
    """GET /v1/models: those that the key opens."""
    call.query()
    passport, service = call.identify(), call.desk.service
    cards = service.models()
    listed = [
        model_info(card, is_ready=service.is_ready(card.name), is_default=card is cards[0])
        for card in cards
        if passport.opens(card.name)
    ]
    return call.json({"models": listed})


async def read(call: Call) -> Upload:
    """The images of a request, as the exchange tells of them.

    Raises:
        Refusal: See ``read_upload``; or a Content-Encoding, which is not undone: images are compressed already.
    """
    refuse_encoded(call)
    upload = read_upload(call.header(b"content-type") or "", await call.body(), call.desk.limits)
    call.exchange.inputs, call.exchange.num_images = upload.images, len(upload.images)
    return upload


def refuse_encoded(call: Call) -> None:
    """Refuses a compressed body: 415, with what is accepted (RFC 9110, section 15.5.16)."""
    if (call.header(b"content-encoding") or "identity").lower() != "identity":
        raise Refusal(
            "unsupported_media_type",
            "send the body as it is, without Content-Encoding",
            headers=(("accept-encoding", "identity"),),
        )


def refuse_all_bad(batch: Batch, value: Mapping[str, Any] | None = None, member: str = "") -> None:
    """Refuses a request of which no image can be used.

    Args:
        batch: The model's answers.
        value: The answer that would have been given; its entries tell of each image.
        member: The member of it that holds the entries.

    Raises:
        Refusal: ``not_an_image``, with the reason of the first.
    """
    bad = quarantined(batch.answers)
    if len(bad) == len(batch.answers):
        extra = {member: value[member]} if value is not None else {}
        raise not_an_image(bad[0].reason or "", bad[0].detail or "it cannot be decoded", extra=extra)
