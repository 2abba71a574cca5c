"""umed-plugin: upgrade a LLaVA-Med-style checkpoint to UMed-LVLM (arXiv 2501.01377) inside an existing LLaVA environment.

``__all__`` is the public API. Every other name in this package is private and may change without notice.

Under ``umed-run`` every process that uses LLaVA imports this module, so it imports the standard library alone. Each public
name is imported from its module when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umed_plugin.checkpoints.loading import load_checkpoint
    from umed_plugin.checkpoints.merging import merge
    from umed_plugin.checkpoints.to_llava import to_llava
    from umed_plugin.checkpoints.to_transformers import to_transformers
    from umed_plugin.commands.doctor.examination import diagnose
    from umed_plugin.data.annotations import register_reader
    from umed_plugin.data.build import build_records
    from umed_plugin.data.images import load_image
    from umed_plugin.data.recipes.recipe import load_recipe
    from umed_plugin.data.records import load_records, record_geometry, save_records
    from umed_plugin.errors import UmedError, UsageError
    from umed_plugin.evaluation import compare, evaluate
    from umed_plugin.grounding.boxes import format_box, parse_boxes, set_iou
    from umed_plugin.grounding.geometry import ImageGeometry
    from umed_plugin.grounding.scoring import score_answer
    from umed_plugin.rewards import register_reward

__version__ = "0.2.0"

# In the order of the work: data, answers and boxes, checkpoints, evaluation, your own parts, errors.
_MODULES = {
    "load_recipe": "umed_plugin.data.recipes.recipe",
    "build_records": "umed_plugin.data.build",
    "load_records": "umed_plugin.data.records",
    "save_records": "umed_plugin.data.records",
    "record_geometry": "umed_plugin.data.records",
    "ImageGeometry": "umed_plugin.grounding.geometry",
    "load_image": "umed_plugin.data.images",
    "score_answer": "umed_plugin.grounding.scoring",
    "parse_boxes": "umed_plugin.grounding.boxes",
    "format_box": "umed_plugin.grounding.boxes",
    "set_iou": "umed_plugin.grounding.boxes",
    "load_checkpoint": "umed_plugin.checkpoints.loading",
    "merge": "umed_plugin.checkpoints.merging",
    "to_transformers": "umed_plugin.checkpoints.to_transformers",
    "to_llava": "umed_plugin.checkpoints.to_llava",
    "evaluate": "umed_plugin.evaluation",
    "compare": "umed_plugin.evaluation",
    "diagnose": "umed_plugin.commands.doctor.examination",
    "register_reward": "umed_plugin.rewards",
    "register_reader": "umed_plugin.data.recipes.readers",
    "UmedError": "umed_plugin.errors",
    "UsageError": "umed_plugin.errors",
}

__all__ = [
    "ImageGeometry",
    "UmedError",
    "UsageError",
    "__version__",
    "build_records",
    "compare",
    "diagnose",
    "evaluate",
    "format_box",
    "load_checkpoint",
    "load_image",
    "load_recipe",
    "load_records",
    "merge",
    "parse_boxes",
    "record_geometry",
    "register_reader",
    "register_reward",
    "save_records",
    "score_answer",
    "set_iou",
    "to_llava",
    "to_transformers",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module, once."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
