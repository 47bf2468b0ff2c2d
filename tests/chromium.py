"""Debian's chromium without a window, driven over a pipe by its debugging protocol: nothing to install."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")


class Browser:
    """One page of a headless chromium. `problems`: console errors, exceptions, and requests beyond the file itself."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = os.fdopen(reading, "rb"), os.fdopen(writing, "wb")
        self._numbers, self._rest = itertools.count(1), b""
        self._session: str | None = None
        self._loaded = False
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; AssertionError where the browser refuses it."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._writing.write(json.dumps(message).encode() + b"\0")
        self._writing.flush()
        while (answer := self._next()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, *, width: int, dark: bool = False, media: str = "") -> None:
        """Load a file at a width of so many pixels, in one colour scheme, on screen or as in print."""
        self.problems.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._note(self._next())

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        made = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(made["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = self._reading.read1(1 << 20)
            assert read, "chromium has ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        name, found = event.get("method"), event.get("params", {})
        self._loaded |= name == "Page.loadEventFired"
        if name == "Runtime.exceptionThrown":
            self.problems.append(str(found["exceptionDetails"].get("text")))
        elif (name == "Log.entryAdded" and found["entry"]["level"] == "error") or (
            name == "Runtime.consoleAPICalled" and found["type"] in ("error", "assert")
        ):
            self.problems.append(json.dumps(found)[:300])
        elif name == "Network.requestWillBeSent" and not found["request"]["url"].startswith("file:"):
            self.problems.append(f"request: {found['request']['url'][:200]}")


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a profile folder of its own, ended behind the block."""
    assert CHROMIUM is not None, "chromium is not installed"
    their_input, writing = os.pipe()
    reading, their_output = os.pipe()

    def place() -> None:  # the protocol wants descriptors 3 and 4
        one, other = os.dup(their_input), os.dup(their_output)
        os.dup2(one, 3)
        os.dup2(other, 4)

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    process = subprocess.Popen(
        [CHROMIUM, *options, "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--remote-debugging-pipe"],
        close_fds=False, preexec_fn=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(their_input)
    os.close(their_output)
    try:
        yield Browser(reading, writing)
    finally:
        process.kill()
        process.wait()
