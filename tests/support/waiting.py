"""What a worker process does that a test ends, and whether it has ended."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def wait_long(part: Any, shared: Path) -> None:
    """Leave a file named by this process, and wait."""
    (shared / str(os.getpid())).touch()
    time.sleep(100)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that only its new parent can remove."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it may go while its status is read
        return True
