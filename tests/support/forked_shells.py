"""For lines of a shell: ``umed`` and ``python`` as programs whose processes are forked by the server of `support.forked`.

python -SE tests/support/forked_shells.py PID umed evaluate ...     what such a program runs; PID is the server's
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[count]) for count in (1, 2)]

from support import forked


def programs(folder: Path) -> Path:
    """Write ``umed`` and ``python`` into a new folder, which is to come first on ``PATH``."""
    folder.mkdir()
    for name in ("umed", "python"):
        words = f'{sys.executable} -SE {Path(__file__).resolve()} {forked.server_pid()} {name} "$@"'
        (folder / name).write_text(f"#!/bin/sh\nexec {words}\n")
        (folder / name).chmod(0o755)
    return folder


def run_by(server: str, command: list[str]) -> int:
    """Run a command in a process that the server forks, with the streams, folder and environment of this one; its status."""
    if not forked.wanted(command):
        plain = [sys.executable, *(["-m", "umed_plugin.cli"] if command[0] == "umed" else []), *command[1:]]
        os.execv(sys.executable, plain)
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        streams = {name: f"/proc/{os.getpid()}/fd/{number}" for number, name in ((1, "out"), (2, "err"))}
        request = {"command": command, "environment": dict(os.environ), "cwd": os.getcwd(), "folder": folder, **streams}
        with open(f"/proc/{server}/fd/0", "w") as pipe:
            pipe.write(json.dumps({**request, "new_session": False, "forks_too": True}) + "\n")
        while not Path(folder, "status").is_file():
            time.sleep(0.01)
        status: int = json.loads(Path(folder, "status").read_text())
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(run_by(sys.argv[1], sys.argv[2:]))
