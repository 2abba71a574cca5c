"""Refuse the one way of starting LLaVA that cannot be patched, and report our errors without a traceback.

This is a guard, not a patch: it changes nothing in another library, so ``umed patches`` does not list it.

Target: ``llava/train/train.py`` run as ``__main__``, as a file or with ``-m llava.train.train``.
Why: as ``__main__`` the file runs under another module name. Names that are rebound in `llava.train.train` then have no effect,
and stock LLaVA would train.
Versions: all of LLaVA.
Delete when: LLaVA's ``train.py`` calls `llava.train.train.train` if it is the main script.
"""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr
from pathlib import Path
from types import TracebackType

from umed_plugin.errors import UmedError, UsageError, say
from umed_plugin.files import failed_write

TRIGGER = "llava.train.llava_trainer"


def refuse_main_script() -> None:
    """Raise when the main script is LLaVA's ``train.py``.

    Raises:
        UsageError: naming the command to use instead.
    """
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    by_name = spec is not None and spec.name == "llava.train.train"
    by_file = file is not None and Path(file).resolve().parts[-3:] == ("llava", "train", "train.py")
    if by_name or by_file:
        raise UsageError(
            f"{'python -m llava.train.train' if by_name else f'python {file}'} cannot be patched when it is the main "
            "script. Use llava/train/train_mem.py or `python -m llava.train.train_mem` with the same flags. If flash-attn is "
            "missing, umed-run trains without it."
        )


def report_errors_plainly() -> None:
    """Print an uncaught UmedError, or that the disk is full, without a traceback, and exit with its status. Once per process."""
    stock = sys.excepthook
    if getattr(stock, "__module__", None) == __name__:
        return

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        failed = failed_write(error)
        if not isinstance(error, UmedError) and failed is None:
            stock(kind, error, trace)
            return
        remedy = "Make room, and give the same command again: a training goes on from its last checkpoint."
        said = str(error) if isinstance(error, UmedError) else f"{failed}. {remedy}"
        # In one of several processes, torch calls this hook with a buffer as stderr, which the SystemExit below would lose.
        with redirect_stderr(sys.__stderr__ if isinstance(sys.stderr, io.StringIO) else sys.stderr):
            say(f"umed: error: {said}", stderr=True)
        # Python exits with the status of a SystemExit that the hook raises.
        raise SystemExit(2 if isinstance(error, UsageError) else 1)

    sys.excepthook = excepthook
