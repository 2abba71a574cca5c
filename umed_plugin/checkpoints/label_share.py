"""On which share of the labelled studies stage 1 has trained: its checkpoint's ``config.json`` says so to the stage after it.

Stage 1 writes ``umed_label_share``: that of ``--umed_label_share``, or 1 without the flag. Merging, exporting and converting
keep it. A checkpoint of an earlier version, or from elsewhere, has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.errors import UmedError, warn

LABEL_SHARE = "umed_label_share"


def share_of(config: Mapping[str, Any]) -> float | None:
    """The share that a ``config.json`` names, in 0-1 without 0; None where it names none, or what is no share."""
    value = config.get(LABEL_SHARE)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if 0 < value <= 1 else None


def largest_share(config: Mapping[str, Any], projector: str | None = None, *more: Path) -> float | None:
    """The largest share that stage 1 has had in all trainings behind a checkpoint; None where none is named.

    Args:
        config: the checkpoint's.
        projector: file of ``--pretrain_mm_mlp_adapter``; the configuration beside it is that of its training.
        more: further files ``config.json``, such as that of a checkpoint that a run goes on from. One that is damaged is
            told, and names none: nothing else is read of it.
    """
    beside = [] if projector is None else [Path(projector).parent / "config.json"]
    shares = [share_of(config), *(_in_file(file) for file in (*beside, *more) if file.is_file())]
    return max((share for share in shares if share is not None), default=None)


def _in_file(file: Path) -> float | None:
    try:
        return share_of(files.read_object(file))
    except UmedError as error:
        warn(f"{error} So it is not known on which share of the labelled studies that training was.")
        return None
