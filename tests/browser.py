"""Headless Chromium over the WebDriver protocol (https://www.w3.org/TR/webdriver2/), for tests of pages."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

CHROMIUM, DRIVER = (next(filter(None, map(shutil.which, names)), None)
                    for names in (("chromium", "google-chrome", "chromium-browser"), ("chromedriver",)))
# Without the last ones Chromium looks up hosts of its own at every start.
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
             "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "ArrowRight": "\ue014"}


class Browser:
    """A window; `requests` and `errors` are read from the log of the page."""

    def __init__(self, profile, width=1280, height=900):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([DRIVER, f"--port={port}"], **quiet)
        self.url = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*ARGUMENTS, f"--user-data-dir={profile}",
                                                f"--window-size={width},{height}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        for attempt in range(100):
            try:
                session = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
                break
            except urllib.error.URLError:
                if attempt == 99 or self.process.poll() is not None:
                    raise
                time.sleep(0.1)
            except RuntimeError:    # Chromium has not started
                self.process.terminate()
                self.process.wait(10)
                raise
        self.url += f"/{session['sessionId']}"

    def _call(self, method, path, content=None):
        data = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(error.read().decode()) from None

    def open(self, path):
        """Load a local file."""
        self._call("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script, *arguments):
        """Return what the body of a JavaScript function returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": arguments})

    def wait(self, script, seconds=60):
        """Wait until the body of a JavaScript function returns something true, and return it."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"not true within {seconds} s: {script}"
            time.sleep(0.05)
        return found

    def command(self, name, **parameters):
        """Send a command of the Chrome DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def key(self, name):
        """Press and release a key: a letter, or a name in KEYS."""
        presses = [{"type": kind, "value": KEYS.get(name, name)} for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": presses}]})

    def screenshot(self):
        """Return the window as the bytes of a PNG file."""
        return base64.b64decode(self._call("GET", "/screenshot"))

    def errors(self):
        """Return the messages of the console since the last call."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def close(self):
        """End the browser and its driver."""
        try:
            self._call("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait(10)
