"""The machinery of patches: how a file in ``patches/`` describes its change, and how the change is verified, applied and undone.

`umed_plugin.patching.patches` defines the patch contract; `umed_plugin.patching.import_hook` applies patches after imports. Both
can be imported with the standard library alone: under ``umed-run`` every process that uses LLaVA loads them.
"""

from umed_plugin.patching.patches import (
    DISTRIBUTIONS,
    Patch,
    PatchMisfit,
    Recorder,
    Target,
    apply,
    installed,
    is_applied,
    misfit,
    original,
    source_hash,
    undo,
    undo_all,
    version_fits,
)

__all__ = [
    "DISTRIBUTIONS",
    "Patch",
    "PatchMisfit",
    "Recorder",
    "Target",
    "apply",
    "installed",
    "is_applied",
    "misfit",
    "original",
    "source_hash",
    "undo",
    "undo_all",
    "version_fits",
]
