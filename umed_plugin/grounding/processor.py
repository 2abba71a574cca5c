"""Whether an image processor makes the square that `geometry` computes; if not, every box is off.

A CLIPImageProcessor may resize to one size and cut another out of it: size 256 and crop_size 224 hide a border of each image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DEFAULT = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}  # of CLIPImageProcessor
GIVE_SIZES = "Give size and crop_size in its preprocessor_config.json the tower's image_size, such as 336."


def processor_fault(values: Mapping[str, Any], image_aspect_ratio: str | None) -> str | None:
    """Why boxes would be off in a processor's images, as text; None if they would not.

    Args:
        values: of its preprocessor_config.json.
        image_aspect_ratio: ``pad`` gives it square images, all others images as they are.

    Example:
        >>> from umed_plugin.grounding.processor import processor_fault
        >>> processor_fault({"size": {"shortest_edge": 256}, "crop_size": 224}, "pad")
        'size is 256 x 256, and crop_size 224 x 224'
        >>> processor_fault({"size": 224, "crop_size": {"height": 224, "width": 224}}, "square")
    """
    pads = image_aspect_ratio == "pad"
    size, crop = (_stated(values.get(key), default) for key, default in _DEFAULT.items())
    resized, cropped = _sides(size), _sides(crop)
    # Null is not the default here: the processor takes it for false.
    if not values.get("do_resize", True):
        return "do_resize is false"
    if not values.get("do_center_crop", True):
        return None if pads else "do_center_crop is false"
    if resized != cropped:
        return f"size is {_in_words(resized)}, and crop_size {_in_words(cropped)}"
    if not pads and isinstance(size, Mapping) and size.get("shortest_edge") is None:
        return f"size is {_in_words(resized)} and not a shortest_edge, which squeezes images that are not square"
    return None


def made_size(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """Height and width of what a processor makes of a square image.

    Args:
        values: of its preprocessor_config.json.

    Example:
        >>> from umed_plugin.grounding.processor import made_size
        >>> made_size({"size": {"shortest_edge": 336}, "crop_size": None})
        (224, 224)
        >>> made_size({"size": {"shortest_edge": 336}, "do_center_crop": False})
        (336, 336)
    """
    last = "crop_size" if values.get("do_center_crop", True) else "size"
    return _sides(_stated(values.get(last), _DEFAULT[last]))


def missing_size(values: Mapping[str, Any]) -> str | None:
    """The size with which transformers 5 can prepare no image, as text; None if none is missing.

    Older ones take null for their default of 224, and say so: a processor that they have made has no null left.

    Args:
        values: of its preprocessor_config.json.

    Example:
        >>> from umed_plugin.grounding.processor import missing_size
        >>> missing_size({"size": None, "crop_size": 224})
        'size is null'
        >>> missing_size({"size": None, "crop_size": 224, "do_resize": False})
    """
    used = {"size": "do_resize", "crop_size": "do_center_crop"}
    missing = [key for key, step in used.items() if values.get(key, key) is None and values.get(step, True)]
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} null" if missing else None


def _stated(size: Any, default: dict[str, int]) -> Any:
    """A size as CLIPImageProcessor reads it: null stands for the default, a list for height and width."""
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return {"height": size[0], "width": size[1]}
    return default if size is None else size


def _sides(value: Any) -> tuple[Any, Any]:
    """Height and width of a square image after it is resized, or cropped, to this size."""
    if not isinstance(value, Mapping):
        return value, value
    edge = value.get("shortest_edge")
    return (value.get("height"), value.get("width")) if edge is None else (edge, edge)


def _in_words(sides: tuple[Any, Any]) -> str:
    return f"{sides[0]} x {sides[1]}"
