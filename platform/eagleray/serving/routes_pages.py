"""What anybody may ask without a key: the drop page, the OpenAPI document, whether the service lives and is ready.

The page is one file of this package: no script, font or picture from elsewhere, and a content policy that names the
digests of its own script and style, so that nothing else runs.

Example:
    >>> routes = page_routes(desk)
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.routing import Route

from eagleray.serving.answers import encode
from eagleray.serving.calls import JSON_TYPE, Call, Desk, Endpoint, Handler, Reply
from eagleray.serving.openapi import document

PAGE = Path(__file__).parent / "templates" / "drop.html"


def page_routes(desk: Desk) -> list[Route]:
    """The routes."""
    return [
        Route("/", Endpoint(desk, "page", {"GET": _page_handler()})),
        Route("/openapi.json", Endpoint(desk, "openapi", {"GET": _openapi_handler()})),
        Route("/healthz", Endpoint(desk, "health", {"GET": healthz})),
        Route("/readyz", Endpoint(desk, "health", {"GET": readyz})),
    ]


async def healthz(call: Call) -> Reply:
    """GET /healthz: the process answers."""
    return call.json({"status": "live"})


async def readyz(call: Call) -> Reply:
    """GET /readyz: the service as a whole answers."""
    is_ready = call.desk.service.is_ready()
    return call.json({"status": "ready" if is_ready else "not_ready"}, status=200 if is_ready else 503)


def content_policy(page: str) -> str:
    """A Content-Security-Policy under which exactly the page's own inline script and style run.

    Args:
        page: HTML with at most one <script> and one <style>, without attributes.

    Source: Content Security Policy Level 3, section 2.3.1 (hash-source).
    """
    scripts = " ".join(_hashes(page, "script")) or "'none'"
    styles = " ".join(_hashes(page, "style")) or "'none'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: str, tag: str) -> list[str]:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found]


def _page_handler() -> Handler:
    text = PAGE.read_text("utf-8")
    headers = {"content-type": "text/html; charset=utf-8", "content-security-policy": content_policy(text)}
    body = text.encode()

    async def page(call: Call) -> Reply:
        return call.reply(body, headers)

    return page


def _openapi_handler() -> Handler:
    body = encode(document())

    async def openapi(call: Call) -> Reply:
        return call.reply(body, {"content-type": JSON_TYPE})

    return openapi
