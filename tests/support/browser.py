"""A real browser without a window, driven over its own DevTools protocol.

Nothing is downloaded: it is the chromium or chrome of this machine, and `websockets` speaks to it.
"""

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser():
    """The path of a browser, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A browser with one page.

    Args:
        program: Its path.
        folder: Where its profile goes.

    Attributes:
        errors: What the console was told, and what was not caught, since the page was opened.
        requests: Addresses that were asked for since then, data in the page left out.
    """

    def __init__(self, program, folder):
        from websockets.sync.client import connect

        self.errors, self.requests, self._number = [], [], 0
        self._open = ExitStack()
        flags = ["--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        flags += ["--disable-background-networking", "--remote-debugging-port=0"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # its sandbox does not work for root
        self._log = (Path(folder) / "log").open("wb")
        command = [program, *flags, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        try:
            port = self._port(Path(folder) / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            address = pages[0]["webSocketDebuggerUrl"]
            self._socket = self._open.enter_context(connect(address, max_size=None))
            self.call("Emulation.setFocusEmulationEnabled", enabled=True)
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._end()
            raise

    def _port(self, file):
        for _ in range(600):
            if self._process.poll() is not None:
                break
            if file.exists() and file.read_text().strip():
                return file.read_text().split()[0]
            time.sleep(0.1)
        raise RuntimeError(f"the browser does not start: see {self._log.name}")

    def close(self):
        self._open.close()
        self._end()

    def _end(self):
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def call(self, method, **parameters):
        """What the browser answers to a method of its protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _note(self, event):
        method, values = event["method"], event["params"]
        if method == "Network.requestWillBeSent":
            url = values["request"]["url"]
            self.requests += [] if url.startswith("data:") else [url]
        elif method == "Runtime.exceptionThrown":
            self.errors.append(values["exceptionDetails"])
        elif method == "Runtime.consoleAPICalled":
            self.errors.append((values["type"], values["args"]))
        elif method == "Log.entryAdded":
            self.errors.append(values["entry"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, path, *, width=1200, height=900, dark=False):
        """Open a file from disk, and wait until all of it is there."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": height}
        self.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)
        self.errors.clear()
        self.requests.clear()
        self._loaded = False
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        for _ in range(300):
            self.value("0")  # events come with answers
            if self._loaded:
                return
            time.sleep(0.05)
        raise RuntimeError(f"{path} was not loaded")

    def value(self, expression):
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key):
        """Press a key that stands for no text."""
        codes = {"Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35}
        values = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **values)
        self.call("Input.dispatchKeyEvent", type="keyUp", **values)

    def point_at(self, x, y):
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, whole=True):
        """A PNG of the page, or of what of it is in view."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])
