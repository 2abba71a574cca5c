"""When, where and with which versions weights were written: part of a checkpoint's ``umed.json``, for the reader of a report."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

MADE_WITH = "made_with"
_LIBRARIES = ("llava-torch", "llava", "torch", "transformers", "peft", "accelerate", "deepspeed")


def made_with() -> dict[str, Any]:
    """When, where and with which versions weights are written, for the reader of a report; nothing compares it."""
    import platform
    from datetime import datetime, timezone
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from umed_plugin import __version__

    versions = {"python": platform.python_version(), "umed-plugin": __version__}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    device = f"{len(gpus)} x {gpus[0]}" if gpus else f"{os.cpu_count()} CPU cores"
    made = {
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.node(),
        "device": device,
    }
    return {**made, "commit": _commit(), "versions": versions}


def _commit() -> str | None:
    """The commit of the checkout that the plugin runs from; None if it is installed."""
    import subprocess

    import umed_plugin

    root = Path(umed_plugin.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        asked = ["git", "rev-parse", "HEAD"]
        found = subprocess.run(asked, cwd=root, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
