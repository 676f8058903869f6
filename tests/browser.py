"""A real browser for tests: Debian's Chromium, driven over the WebDriver protocol (W3C)."""

import base64
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def missing() -> str:
    """Why no browser can be started here; empty if one can."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return (
        f"not installed: {', '.join(lacking)} (apt-get install chromium chromium-driver)"
        if (lacking)
        else ""
    )


class Browser:
    """One tab. Errors of the driver are AssertionErrors with its message."""

    def __init__(self, url: str, session: str) -> None:
        self._base = f"{url}/session/{session}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        return call(method, f"{self._base}/{path}", body)

    def open(self, url: str) -> None:
        self._call("POST", "url", {"url": url})

    def run(self, script: str) -> Any:
        """The value that a function body returns."""
        return self._call("POST", "execute/sync", {"script": script, "args": []})

    def text(self, selector: str) -> str:
        return str(self.run(f"return document.querySelector({json.dumps(selector)}).innerText"))

    def until(self, condition: str, what: str, limit_s: float = 30.0) -> Any:
        """Poll until an expression is true; returns its value."""
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s:
            if found := self.run(f"return {condition}"):
                return found
            time.sleep(0.05)
        raise AssertionError(f"not seen in {limit_s} s: {what}\n{self.text('body')[:3000]}")

    def devtools(self, command: str, **parameters: Any) -> Any:
        body = {"cmd": command, "params": parameters}
        return self._call("POST", "goog/cdp/execute", body)

    def look_like(self, *, dark: bool, width: int, height: int) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def screenshot(self, file: Path, **clip: float) -> None:
        """The page, or a part of it (x, y, width, height, scale), as PNG."""
        part = {"clip": clip} if clip else {}
        found = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, **part)
        file.write_bytes(base64.b64decode(found["data"]))

    def key(self, name: str) -> None:
        """Press a key as a user does."""
        code = {"Tab": 9, "Enter": 13}[name]
        text = {"text": "\r"} if name == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.devtools(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                code=name,
                windowsVirtualKeyCode=code,
                **(text if kind == "keyDown" else {}),
            )

    def log(self) -> list[str]:
        """Errors of the console."""
        entries = self._call("POST", "se/log", {"type": "browser"})
        return [item["message"] for item in entries if item["level"] == "SEVERE"]


def call(method: str, url: str, body: Any = None) -> Any:
    data = None if method in {"GET", "DELETE"} else json.dumps(body or {}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, data=data, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60.0) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()[:2000]) from None


@contextmanager
def browsing() -> Iterator[Browser]:
    """A fresh browser that ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"],
            # A browser that is ended leaves folders of its own where temporary files go.
            env={**os.environ, "TMPDIR": profile},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        session = ""
        try:
            _await(url, driver)
            options = {"args": [*_FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options}
            logs = {"goog:loggingPrefs": {"browser": "ALL"}}
            body = {"capabilities": {"alwaysMatch": wanted | logs}}
            session = call("POST", f"{url}/session", body)["sessionId"]
            yield Browser(url, session)
        finally:
            if session:
                call("DELETE", f"{url}/session/{session}")
            driver.terminate()
            driver.wait(timeout=30)


def _await(url: str, driver: "subprocess.Popen[bytes]") -> None:
    end_s = time.monotonic() + 30.0
    while time.monotonic() < end_s:
        assert driver.poll() is None, "chromedriver ended"
        try:
            call("GET", f"{url}/status")
        except (OSError, AssertionError):
            time.sleep(0.05)
        else:
            return
    raise AssertionError("chromedriver does not listen")
