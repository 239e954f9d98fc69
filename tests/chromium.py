"""Headless Chromium by its DevTools protocol: opens a page, acts as a person would, looks at what there is to see."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
)
PATIENCE_S = 60.0  # of a machine that others use too; nothing is measured by it


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.complaints: list[str] = []  # exceptions, and what the content policy refused
        self.requested: list[str] = []  # every address that the page has asked for

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command, gives its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE_S))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def open(self, url: str, *, width_px: int = 1200, height_px: int = 900, is_dark: bool = False) -> None:
        """Opens a page and waits until it stands."""
        scheme = "dark" if is_dark else "light"
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width_px,
            height=height_px,
            deviceScaleFactor=1,
            mobile=width_px < 600,
        )
        self.do("Emulation.setTouchEmulationEnabled", enabled=width_px < 600)
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.do(f"{domain}.enable")
        self.do("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        found = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits until an expression is true."""
        self.value(
            f"new Promise((done, lost) => {{ const end = Date.now() + {PATIENCE_S * 900};"
            f" (function look() {{ if ({condition}) done(true); else if (Date.now() > end) lost({condition!r});"
            " else setTimeout(look, 20); }()); })"
        )

    def choose_files(self, selector: str, files: list[Path]) -> None:
        """Chooses files in a file input."""
        root = self.do("DOM.getDocument")["root"]["nodeId"]
        node = self.do("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.do("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def type_into(self, selector: str, text: str) -> None:
        """Types a text as a keyboard would, then Enter."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        self.do("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key="Enter", text="\r", windowsVirtualKeyCode=13)

    def screenshot(self, path: Path) -> Path:
        """The whole page as a PNG."""
        shot = self.do("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["source"] != "network":
            self.complaints.append(str(params["entry"]))
        elif method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A fresh browser with one tab."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        port = next(found[1] for line in process.stderr if (found := re.search(r"ws://127\.0\.0\.1:(\d+)/", line)))
        from urllib.request import urlopen

        with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE_S) as answer:
            target = next(item for item in json.load(answer) if item["type"] == "page")
        with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            yield Page(socket)
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
