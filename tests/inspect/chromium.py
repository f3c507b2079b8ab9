"""Headless Chromium over the pipe of its DevTools protocol; nothing but the browser is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
FLAGS += ("--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe")
KEYS = {"ArrowUp": 38, "ArrowDown": 40, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
KEYS |= {"Tab": 9, "Enter": 13, "Escape": 27}


def find() -> str | None:
    """Return the path of the browser; None if it is not installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """A browser with one page; a context manager that ends it.

    Args:
        profile: an empty folder for its files.
    """

    def __init__(self, profile: Path) -> None:
        path = find()
        assert path is not None
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # the protocol is spoken over the file descriptors 3 and 4
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "-", path, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._input = os.fdopen(ours_in, "rb")
        self._output = os.fdopen(ours_out, "wb", buffering=0)
        self._buffer = b""
        self._n = 0
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._input.close()
        self._output.close()

    def call(self, method: str, **parameters: Any) -> Any:
        """Return the result of a command."""
        self._n += 1
        message: dict[str, Any] = {"id": self._n, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._output.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._n:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path) -> None:
        """Load a file."""
        self.events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        self._wait_for_page()

    def reload(self) -> None:
        """Load the file again."""
        self.events.clear()
        self.call("Page.reload")
        self._wait_for_page()

    def run(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key by its name, or type a character."""
        text = {"Enter": "\r"}.get(key, "" if key in KEYS else key)
        code = {"windowsVirtualKeyCode": KEYS[key]} if key in KEYS else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def resize(self, width: int, height: int = 800, *, mobile: bool = False) -> None:
        """Give the page a size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )

    def prefer(self, scheme: str) -> None:
        """Set the system's colour scheme, "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self) -> bytes:
        """Return the visible part of the page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def _wait_for_page(self) -> None:
        while not any(each.get("method") == "Page.loadEventFired" for each in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._input.fileno(), 2**20)
            assert data, f"{find()} ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
