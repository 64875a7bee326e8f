"""A real browser for tests: headless Chromium, spoken to over a pipe in its DevTools protocol."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["Browser", "Shot", "find_browser", "ground_of", "problems"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)
# What lies to the right of the window and cannot be scrolled to in a box of its own.
_OUTSIDE = """
[...document.querySelectorAll('body *')].filter(e => {
  if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let p = e; p && p !== document.body; p = p.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return false;
  return true;
}).slice(0, 5).map(e => e.tagName.toLowerCase() + '.' + (e.getAttribute('class') || ''))
"""
_LEAST_DRAWN = 0.01


@dataclass(frozen=True)
class Shot:
    """A whole page as it was drawn.

    Attributes:
        pixels: (H, W, 3) uint8, as wide as the window or as what sticks out of it.
        width: Width of the window.
        outside: Elements that stick out at the right.
        fetched: Addresses that the page loaded anything from.
    """

    pixels: Any
    width: int
    outside: tuple[str, ...]
    fetched: tuple[str, ...]


# The browser reads descriptor 3 and writes descriptor 4. They are set in a process of its own: here
# any number may be in use, those of the pipes among them.
_WIRE = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 10) for fd in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """The path of a browser on this machine, or None."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


def problems(shot: Shot) -> list[str]:
    """What is wrong with a page, in words: too wide, empty, or not in one file."""
    found = []
    if shot.pixels.shape[1] > shot.width or shot.outside:
        found.append(f"{shot.pixels.shape[1]} wide of {shot.width}: {', '.join(shot.outside)}")
    # Every stretch of the page, and not its head alone, has something on it.
    drawn = (np.abs(shot.pixels[:, ::2].astype(np.int16) - ground_of(shot)) > 24).any(2)
    if drawn.mean() < _LEAST_DRAWN:
        found.append(f"empty: {drawn.mean():.2%} of the pixels are drawn")
    for top in range(0, len(drawn), 1000):
        if len(drawn) - top > 500 and not drawn[top : top + 1000].any():
            found.append(f"empty between {top} and {top + 1000}")
    if shot.fetched:
        found.append(f"fetched {', '.join(shot.fetched)}")
    return found


def ground_of(shot: Shot) -> Any:
    """The most frequent colour of a page, (3,)."""
    some = shot.pixels[::3, ::3].reshape(-1, 3).astype(np.int64)
    codes, counts = np.unique(some @ [65536, 256, 1], return_counts=True)
    code = int(codes[counts.argmax()])
    return np.array([code >> 16, code >> 8 & 255, code & 255])


def _is_inside(address: str, page: Path) -> bool:
    return address.startswith("data:") or address == page.as_uri()


class Browser:
    """Opens pages of this machine; use it in a ``with`` block."""

    def __init__(self, path: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        read_here, answers = os.pipe()
        commands, write_here = os.pipe()

        command = [path, *_FLAGS, f"--user-data-dir={self._folder.name}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WIRE, str(commands), str(answers), *command],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._in, self._out, self._rest = write_here, read_here, bytearray()
        self._count = 0
        self._events: list[dict[str, Any]] = []
        self._session = ""

    def __enter__(self) -> Browser:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        answer = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = answer["sessionId"]
        self._call("Page.enable")
        self._call("Network.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._folder.cleanup()

    def shot(self, page: Path, width: int, dark: bool = False, scale: float = 1.0) -> Shot:
        """A page at a window's width, whole."""
        size = {"width": width, "height": 800, "deviceScaleFactor": scale, "mobile": width < 700}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self._call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())
        outside = self._value(_OUTSIDE)
        asked = [e for e in self._events if e["method"] == "Network.requestWillBeSent"]
        fetched = [
            address for e in asked if not _is_inside(address := e["params"]["request"]["url"], page)
        ]
        whole = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {**whole, "x": 0, "y": 0, "scale": 1}
        how = {"format": "png", "captureBeyondViewport": True, "optimizeForSpeed": True}
        text = self._call("Page.captureScreenshot", clip=clip, **how)["data"]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
        return Shot(pixels, round(width * scale), tuple(outside), tuple(fetched))

    def _value(self, script: str) -> Any:
        return self._call("Runtime.evaluate", expression=script, returnByValue=True)["result"][
            "value"
        ]

    def _call(self, method: str, **parameters: Any) -> Any:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._events.append(answer)

    def _read(self) -> Any:
        while b"\0" not in self._rest:
            part = os.read(self._out, 1 << 16)
            if not part:
                raise RuntimeError("the browser ended")
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)
