"""The machinery of patches: how a file in ``patches/`` says what it changes, and how it is verified, applied and undone.

`umed_plugin.patching.patches` holds the patch contract; `umed_plugin.patching.import_hook` waits for the imports that patches
need.
Both import the standard library alone: every Python process under ``umed-run`` loads them.
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
