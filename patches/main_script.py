"""Refuse the one way of starting LLaVA that no patch can reach, and report our errors without a traceback.

Target: the run of ``llava/train/train.py`` as ``__main__``, by file or by ``-m llava.train.train``; and `sys.excepthook`.
Why: as ``__main__`` the file is executed under another name, so that whatever is rebound in `llava.train.train` has no
effect, and training would go on as plain LLaVA.
Versions: all of LLaVA.
Delete when: LLaVA's ``train.py`` calls `llava.train.train.train` when it is the main script.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from umed_plugin.errors import UmedError, UsageError
from umed_plugin.patching import Patch, Recorder


def change(recorder: Recorder) -> None:
    """Refuse first; then let uncaught UmedErrors speak for themselves."""
    refuse_main_script()
    recorder.replace(sys, "excepthook", _plain_errors(sys.excepthook))


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
            f"{'python -m llava.train.train' if by_name else f'python {file}'} cannot be patched: run as the main script, its "
            "names are fixed. Use llava/train/train_mem.py or `python -m llava.train.train_mem` with the same flags; where "
            "flash-attn is missing, umed-run lets it train without."
        )


def _plain_errors(stock: object) -> object:
    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, UmedError):
            stock(kind, error, trace)
            return
        print(f"umed: error: {error}", file=sys.stderr, flush=True)
        # Python leaves with the status of a SystemExit that the hook raises.
        raise SystemExit(2 if isinstance(error, UsageError) else 1)

    return excepthook


PATCH = Patch(
    name="main_script",
    targets=(),
    why="python llava/train/train.py runs under another name, where no patch has an effect",
    delete_when="LLaVA's train.py imports itself when it is the main script",
    change=change,
    trigger="llava.train.llava_trainer",
)
