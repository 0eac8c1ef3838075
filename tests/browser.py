"""A headless Chromium, driven over its debugging pipe: the protocol is JSON objects, each ended by a zero byte."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
SECONDS = 60  # before a silent browser is given up


class Browser:
    """One page of a fresh browser; what it logged and asked the network for is kept."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 900):
        to_browser, from_browser = os.pipe(), os.pipe()
        # the browser reads commands from descriptor 3 and writes to 4
        command = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, "chromium", CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser[0], from_browser[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser[0])
        os.close(from_browser[1])
        self.write, self.read = to_browser[1], from_browser[0]
        self.buffer, self.number, self.session = b"", 0, None
        self.errors: list[str] = []
        self.requests: list[str] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(SECONDS)
        os.close(self.write)
        os.close(self.read)

    def send(self, method: str, **params):
        """Call a method of the protocol and wait for its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def receive(self) -> dict:
        """The next message; events that matter are kept."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], SECONDS)
            chunk = os.read(self.read, 1 << 20) if ready else b""
            assert chunk, "the browser does not answer"
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.errors.append(str(params["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message

    def open(self, path: Path) -> float:
        """Load a file; the seconds until it was loaded and its script had run."""
        start = time.monotonic()
        self.send("Page.navigate", url=path.as_uri())
        while self.js("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() - start < SECONDS, "the page does not load"
        return time.monotonic() - start

    def js(self, expression: str):
        """The value of a JavaScript expression, or of what it promises."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def mouse(self, x: float, y: float, *kinds: str):
        """Move the pointer there, then press, release, …"""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, buttons=0)
        for kind in kinds:
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def key(self, name: str):
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def centre(self, selector: str, fraction: float = 0.5) -> tuple[float, float]:
        """Scroll to an element, and where it is then; `fraction` of its width from the left."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.js(
            f"(({{x, y, width, height}}) => [x + {fraction} * width, y + height / 2])({found}.getBoundingClientRect())"
        )
        return x, y

    def resize(self, width: int, height: int):
        """Change the window."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self):
        """Ask for dark colours."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])

    def screenshot(self, path: Path, whole: bool = False):
        """Write what is seen as PNG."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
