"""Headless Chromium for tests of pages: a real browser, driven over its own pipe (DevTools protocol), with no other library."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Contrast of every text with the ground behind it (WCAG 2: 4.5 for text); what is disabled need not have it.
CONTRASTS = """(() => {
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = rgb => { const [r, g, b] = rgb.map(v => linear(v / 255)); return .2126 * r + .7152 * g + .0722 * b; };
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const found = {};
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    const box = node.getBoundingClientRect();
    if (!own || !box.width || node.closest("script, style, :disabled, option, noscript, .skip")) continue;
    let ground = null;
    for (let at = node; at && !ground; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) ground = colour;
    }
    const style = getComputedStyle(node);
    const ink = parse(node.namespaceURI.includes("svg") ? (style.fill === "none" ? style.color : style.fill) : style.color);
    const [a, b] = [light(ink.slice(0, 3)), light((ground || [255, 255, 255]).slice(0, 3))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const key = node.tagName + "." + node.getAttribute("class");
    found[key] = Math.min(found[key] ?? 99, ratio);
  }
  return found;
})()"""


class Page:
    """One page in a browser of its own.

    Args:
        downloads: folder for what the page downloads.
        width, height: of the window, in pixels.
    """

    def __init__(self, folder: Path, downloads: Path, width: int = 1280, height: int = 900) -> None:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            no_browser = pytest.fail if os.environ.get("UMED_NEEDS_BROWSER") else pytest.skip
            no_browser(
                "there is no Chromium here (Debian: apt-get install chromium), which this test opens the page in"
            )
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        flags = (
            "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
        )
        size, pipes = f"--window-size={width},{height}", f"3<&{to_browser} 4>&{from_browser}"
        command = f'exec "$0" {flags} {size} "--user-data-dir=$1" about:blank {pipes}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, str(folder)],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._held, self._number, self.events = b"", 0, []
        target = self._say("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._say("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._say("Browser.setDownloadBehavior", on_page=False, behavior="allow", downloadPath=str(downloads))
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._say(f"{domain}.enable", on_page=True)

    def open(self, file: Path, fragment: str = "") -> None:
        self._say("Page.navigate", on_page=True, url=file.resolve().as_uri() + fragment)
        self.until("document.readyState === 'complete' && location.protocol === 'file:'")

    def visit(self, address: str) -> None:
        self._say("Page.navigate", on_page=True, url=address)
        self.until(f"document.readyState === 'complete' && location.href === {json.dumps(address)}")

    def give_files(self, selector: str, *files: Path) -> None:
        """Choose files in a file field, as its dialog does."""
        field = self._say(
            "Runtime.evaluate", on_page=True, expression=f"document.querySelector({json.dumps(selector)})"
        )["result"]["objectId"]
        names = [str(file.resolve()) for file in files]
        self._say("DOM.setFileInputFiles", on_page=True, files=names, objectId=field)

    def drop(self, selector: str, *files: Path) -> None:
        """Drag files or folders onto an element and let them go."""
        x, y = self._still_place(selector)
        data = {"items": [], "files": [str(file.resolve()) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self._say("Input.dispatchDragEvent", on_page=True, type=kind, x=x, y=y, data=data)

    def press(self, key: str, times: int = 1, *, shift: bool = False) -> None:
        """A key of the keyboard, at what has the focus; a single letter or sign, or a key's name."""
        codes = {"Enter": 13, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "Space": 32, "End": 35, "Home": 36}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowDown": 40, "Escape": 27}
        text = key if len(key) == 1 else {"Enter": "\r", "Space": " "}.get(key, "")
        name = " " if key == "Space" else key
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self._say(
                    "Input.dispatchKeyEvent", on_page=True, type=kind, key=name, code=key, text=text if kind == "keyDown" else "",
                    windowsVirtualKeyCode=codes.get(key) or ord(key.upper()), modifiers=8 if shift else 0,
                )  # fmt: skip

    def shape(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        """Another size of the window, or a phone's, in light or dark colours."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._say("Emulation.setEmulatedMedia", on_page=True, features=[scheme])
        self._say(
            "Emulation.setDeviceMetricsOverride", on_page=True, width=width, height=height, deviceScaleFactor=1, mobile=phone
        )  # fmt: skip

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self._say("Runtime.evaluate", on_page=True, expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> None:
        ended = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < ended, f"{script} did not come true"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """A real click of the mouse in the middle of an element."""
        x, y = self._still_place(selector, "center")
        for kind in ("mousePressed", "mouseReleased"):
            self._say("Input.dispatchMouseEvent", on_page=True, type=kind, x=x, y=y, button="left", clickCount=1)

    def drag(self, selector: str, dx: int, dy: int, *, steps: int = 4) -> None:
        """Press the left button in the middle of an element, move by pixels, and let go."""
        x, y = self._still_place(selector)
        places = [(x + dx * step / steps, y + dy * step / steps) for step in range(steps + 1)]
        kinds = ["mousePressed", *["mouseMoved"] * steps, "mouseReleased"]
        for kind, (at_x, at_y) in zip(kinds, [*places, places[-1]]):
            self._say(
                "Input.dispatchMouseEvent", on_page=True, type=kind, x=at_x, y=at_y, button="left", buttons=1, clickCount=1
            )  # fmt: skip

    def wheel(self, selector: str, amount: int, *, ctrl: bool = False) -> None:
        """Turn the wheel over the middle of an element; with Ctrl as a trackpad's pinch does."""
        x, y = self._still_place(selector)
        turn = {"x": x, "y": y, "deltaX": 0, "deltaY": amount, "modifiers": 2 if ctrl else 0}
        self._say("Input.dispatchMouseEvent", on_page=True, type="mouseWheel", **turn)

    def hover(self, selector: str) -> None:
        """Move the mouse over the middle of an element."""
        x, y = self._still_place(selector)
        self._say("Input.dispatchMouseEvent", on_page=True, type="mouseMoved", x=x, y=y)

    def type_into(self, selector: str, text: str, *, instead: bool = False) -> None:
        """Type at the end of a field, or instead of what it holds."""
        self.click(selector)
        where = "e.select()" if instead else "e.setSelectionRange(e.value.length, e.value.length)"
        self.run(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); {where}; }})()")
        self._say("Input.insertText", on_page=True, text=text)

    def screenshot(self, file: Path) -> None:
        data = self._say("Page.captureScreenshot", on_page=True, format="png")["data"]
        file.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def _still_place(self, selector: str, block: str = "nearest") -> tuple[float, float]:
        """The middle of an element once it is in view and has stopped moving; ``block`` is scrollIntoView's."""
        # A page may still be moving, and on a busy machine the first frame after a scroll comes late.
        x, y = self.run(
            f"(async () => {{ const e = document.querySelector({json.dumps(selector)});"
            f" e.scrollIntoView({{block: {json.dumps(block)}}});"
            " const middle = () => { const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; };"
            " const frame = () => new Promise(requestAnimationFrame); let before, now = middle();"
            " do { before = now; await frame(); await frame(); now = middle(); } while (String(before) !== String(now));"
            " return now; })()"
        )
        return x, y

    def _say(self, method: str, on_page: bool = False, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if on_page:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._hear()
            if heard.get("id") == self._number:
                assert "error" not in heard, (method, heard["error"])
                return heard["result"]
            self.events.append(heard)

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            assert select.select([self._read], [], [], 90)[0], "the browser says nothing"
            piece = os.read(self._read, 1 << 16)
            assert piece, f"the browser has ended ({self._process.poll()})"
            self._held += piece
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)


@contextmanager
def opened_page(folder: Path) -> Iterator[Page]:
    """A page for a written file; fails at the end if it logged a fault, or asked for anything but files and its own data."""
    (folder / "downloads").mkdir()
    browser = Page(folder / "profile", folder / "downloads")
    yield browser
    faults = [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    asked = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    browser.close()
    assert not faults
    assert all(url.startswith(("file:", "data:")) for url in asked), "nothing is loaded from elsewhere"
