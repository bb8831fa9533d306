"""A page in headless Chromium, driven over the DevTools protocol: real pointer events, and every error it reports."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Without a GPU or a sandbox, which a container's root does not get.
_OPTIONS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"


class Page:
    """``errors``: what was thrown or logged as an error; ``requests``: the addresses that were asked for."""

    def __init__(self, commands: int, events: int) -> None:
        self._commands, self._events = commands, os.fdopen(events, "rb", buffering=0)
        self._read = b""
        self._number = 0
        self._session: str | None = None
        self._loaded = False
        self.errors: list[str] = []
        self.requests: list[str] = []

    def open(self, address: str) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        metrics = {"width": 1200, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Page.navigate", url=address)
        while not self._loaded:
            self._event(self._message())

    def value(self, expression: str) -> Any:
        """The value of JavaScript, after the page's next two frames."""
        frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        code = f"{frames}.then(() => ({expression}))"
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """``kind``: mouseMoved, mousePressed, mouseReleased or mouseWheel, at a point of the window."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            self._event(answer)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            part = self._events.read(1 << 16)
            assert part, "Chromium has ended"
            self._read += part
        text, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def _event(self, message: dict[str, Any]) -> None:
        match message:
            case {"method": "Page.loadEventFired"}:
                self._loaded = True
            case {"method": "Runtime.exceptionThrown", "params": details}:
                self.errors.append(json.dumps(details))
            case {"method": "Runtime.consoleAPICalled", "params": {"type": "error" | "assert"} as details}:
                self.errors.append(json.dumps(details))
            case {"method": "Log.entryAdded", "params": {"entry": {"level": "error"} as entry}}:
                self.errors.append(entry["text"])
            case {"method": "Network.requestWillBeSent", "params": {"request": {"url": url}}}:
                self.requests.append(url)


@contextmanager
def opened(path: Path, profile: Path) -> Iterator[Page]:
    """A file in a browser of its own, whose profile is an empty folder."""
    assert PROGRAM is not None
    ends = [_high(end) for pair in (os.pipe(), os.pipe()) for end in pair]  # ours and Chromium's, in both directions
    theirs, commands, events, out = ends

    def connect() -> None:
        os.dup2(theirs, 3)  # where --remote-debugging-pipe reads
        os.dup2(out, 4)  # and where it writes

    words = [PROGRAM, *_OPTIONS.split(), f"--user-data-dir={profile}"]
    # Descriptors are closed on exec unless they are inheritable, which these two copies are.
    process = subprocess.Popen(words, preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL)
    os.close(theirs)
    os.close(out)
    page = Page(commands, events)
    try:
        page.open(path.as_uri())
        yield page
    finally:
        process.terminate()
        process.wait(30)
        os.close(commands)
        page._events.close()


def _high(descriptor: int) -> int:
    """A copy out of the way of 3 and 4; the original is closed."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return copy
