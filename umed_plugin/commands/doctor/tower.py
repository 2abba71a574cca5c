"""Checks of the vision tower: the one that config.json names, the weights in the checkpoint, and which of the two LLaVA loads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.folder import (
    FAMILIES,
    TOWER,
    UNFREEZE,
    is_buffer,
    is_hub_tower,
    is_plain_name,
    left_out_own_tower,
    local_tower,
)
from umed_plugin.checkpoints.missing_tensors import lacking_in_tower, missing_of_tower, tower_names
from umed_plugin.checkpoints.pickles import read_pickle
from umed_plugin.checkpoints.stored import BadFile, StoredTensor, read_safetensors
from umed_plugin.checkpoints.tower_config import cached_tower, vision_part
from umed_plugin.checkpoints.tower_weights import bare_tower_name
from umed_plugin.commands.doctor.catalogue import finding
from umed_plugin.commands.doctor.configuration import PROJECTOR, is_transformers_form
from umed_plugin.commands.doctor.contents import FULL, NOTHING, WHOLE, Contents, read_object, read_weights
from umed_plugin.commands.doctor.findings import Finding, JsonChange
from umed_plugin.errors import UmedError
from umed_plugin.grounding.processor import made_size, missing_size, processor_fault


def check_tower(contents: Contents, compares: bool = True) -> Iterator[Finding]:
    """Check that LLaVA finds the tower, and that it loads the one that the model was trained with.

    Args:
        contents: the checkpoint.
        compares: read the values of a tower inside the checkpoint, and of the one that LLaVA loads.
    """
    config = contents.config
    if contents.kind == NOTHING or is_transformers_form(config) or config.get("model_type") not in FAMILIES:
        return
    name = config.get("mm_vision_tower", config.get("vision_tower"))
    where = f"{contents.config_file}: mm_vision_tower"
    if not isinstance(name, str):
        yield finding("tower-unset", f"mm_vision_tower is {name!r}", where)
        return
    if config.get("mm_vision_select_layer") is None:
        yield finding(
            "tower-unset", "mm_vision_select_layer is not set", f"{contents.config_file}: mm_vision_select_layer"
        )
    folder = tower_folder(contents.path, name)
    yield from _location(contents, name, folder, where)
    if folder is not None:
        yield from _sizes(contents, folder)
    faults = _loaded(contents, contents.path, name)
    yield from faults
    if folder != contents.path / "vision_tower":
        yield from _files(contents, contents.path / "vision_tower")
    of_base = None if contents.base is None else contents.base.config.get("mm_vision_tower")
    if contents.base is not None and isinstance(of_base, str) and of_base != name:
        yield from _loaded(contents, contents.base.path, of_base)
    if contents.kind == FULL and not any(fault.code == "tower-incomplete" for fault in faults):
        yield from _inside(contents, name, folder, compares)


def tower_folder(checkpoint: Path, name: str) -> Path | None:
    """The folder of the tower that config.json names, or its replacement; None if it is not on this machine.

    Args:
        checkpoint: a relative name is also looked up here, and its ``vision_tower`` replaces a tower that has moved.
        name: mm_vision_tower of config.json: a path, or a name on the hub (looked up in the local cache only).
    """
    here = local_tower(name, checkpoint)
    own = checkpoint / "vision_tower"
    if here is None and not is_hub_tower(name) and (own / "config.json").is_file():
        return own.absolute()
    return here if here is not None or os.path.isabs(name) else cached_tower(name)


def _location(contents: Contents, name: str, folder: Path | None, where: str) -> Iterator[Finding]:
    """Check where LLaVA looks: a path if it exists, else the hub for names that it knows."""
    own = contents.path / "vision_tower"
    to_own = contents.configures(mm_vision_tower=str(own)) if (own / "config.json").is_file() else None
    inside = contents.path / name
    if not os.path.isabs(name) and (inside / "config.json").is_file():
        change = contents.configures(mm_vision_tower=str(inside))
        yield finding("tower-relative", f"mm_vision_tower is {name!r}", where, change)
    elif os.path.isdir(name):
        if not os.path.isabs(name):
            yield finding("tower-relative", f"mm_vision_tower is {name!r}", where)
    elif not is_hub_tower(name):
        yield finding("tower-moved", f"mm_vision_tower is {name!r}", where, to_own)
    elif folder is None or not any((folder / weights).is_file() for weights in WHOLE):
        yield finding("tower-not-here", f"mm_vision_tower is {name!r}", where, tower=name)


def _sizes(contents: Contents, folder: Path) -> Iterator[Finding]:
    shape = vision_part(read_object(folder / "config.json"))
    width, configured = shape.get("hidden_size"), contents.config.get("mm_hidden_size")
    stored = contents.weights if contents.kind == FULL else contents.others
    first = next((stored[PROJECTOR + n] for n in ("weight", "0.weight") if PROJECTOR + n in stored), None)
    taken = first.shape[1] if first is not None and len(first.shape) == 2 else width
    if width is not None and not width == configured == taken:
        change = contents.configures(mm_hidden_size=width) if width == taken else None
        found = (
            f"mm_hidden_size is {configured}, the tower's width is {width}, and the projector's input width is {taken}"
        )
        yield finding("tower-width", found, f"{contents.config_file}: mm_hidden_size", change, width=taken)
    processor, size = read_object(folder / "preprocessor_config.json"), shape.get("image_size")
    if processor:
        yield from _processor(processor, size, contents.config.get("image_aspect_ratio"), folder)


def _processor(processor: dict[str, Any], side: Any, mode: str | None, folder: Path) -> Iterator[Finding]:
    """Check that the tower's image processor makes images of the tower's side, and where boxes are in them."""
    where, (height, width) = str(folder / "preprocessor_config.json"), made_size(processor)
    missing, size = missing_size(processor), side or height
    null = "" if missing is None else f" ({missing}, for which transformers 4 takes 224)"
    if side is not None and (height, width) != (side, side):
        found = f"images are made {height} x {width}, but the tower expects {side} x {side}{null}"
        yield finding("tower-image-size", found, where, size=size)
    elif fault := processor_fault(processor, mode):
        found = f"{fault}, so boxes are elsewhere in the image than umed computes{null}"
        yield finding("tower-image-size", found, where, size=size)
    elif missing is not None:
        yield finding("tower-size-null", missing, where, size=size)


def _loaded(contents: Contents, checkpoint: Path, name: str) -> list[Finding]:
    """Check the weight files of the tower that a checkpoint names, and that they lack no tensor that umed takes from them."""
    folder = tower_folder(checkpoint, name)
    faults = list(_files(contents, folder))
    # What the cache of the Hub lacks is downloaded.
    cached = local_tower(name, checkpoint) is None and folder != (checkpoint / "vision_tower").absolute()
    if folder is None or cached or faults:
        return faults
    try:
        missing = lacking_in_tower(folder, _names_inside(contents))
    except UmedError as error:
        found = str(error).removeprefix(f"{folder}: ").rstrip(".")
    else:
        found = f"{len(missing)} tensors are missing ({missing[0]}, ...)" if missing else ""
    return [finding("tower-incomplete", found, str(folder))] if found else []


def _names_inside(contents: Contents) -> list[str]:
    """Names of the tower in the checkpoint, or in an adapter's base, that umed takes instead of the folder's."""
    if contents.kind == FULL:
        return tower_names(contents.weights)
    if contents.base is None or left_out_own_tower(contents.config):
        return []
    return tower_names(contents.base.weights)


def _files(contents: Contents, folder: Path | None) -> Iterator[Finding]:
    """Check every weight file of the tower: LLaVA loads one of them, and which one depends on its version of transformers."""
    if folder is None:
        return
    tower = Contents(folder)
    names = {name for name in WHOLE if (folder / name).is_file()}
    for index in [name for name in names if name.endswith(".json")]:
        names |= set(_shards(folder / index))
    for name in sorted(name for name in names if not name.endswith(".json")):
        if (folder / name).is_file():
            read_weights(tower, folder / name)
        else:
            yield finding("shard-missing", f"{name} is missing", str(folder), file=name)
    contents.read |= tower.read
    yield from tower.findings


def _shards(index: Path) -> list[str]:
    """The files beside an index that it names; what it names elsewhere is not looked at."""
    places = read_object(index).get("weight_map", {})
    return sorted({name for name in places.values() if is_plain_name(name)}) if isinstance(places, dict) else []


@dataclass(frozen=True)
class Distance:
    """The distance between the checkpoint's tower and the tower that LLaVA loads.

    Attributes:
        tensors: number of tensors compared.
        differing: number of these that differ after rounding to the checkpoint's dtype.
        largest: largest absolute difference of two values.
        relative: norm of all differences divided by the norm of the tower that LLaVA loads.
    """

    tensors: int
    differing: int
    largest: float
    relative: float

    def __str__(self) -> str:
        return (
            f"{self.differing} of {self.tensors} tensors differ, by {self.largest:.3g} at most and "
            f"{100 * self.relative:.2g} % of the tower's norm in total"
        )


def _inside(contents: Contents, name: str, folder: Path | None, compares: bool) -> Iterator[Finding]:
    own = _bare({n[len(TOWER) :]: t for n, t in contents.weights.items() if n.startswith(TOWER)})
    used, where = bool(contents.config.get(UNFREEZE)), f"{contents.config_file}: {UNFREEZE}"
    if not own:
        if used and not any(f.code.startswith(("file-", "shard-")) for f in contents.findings):
            change = JsonChange(contents.config_file, {}, remove=(UNFREEZE,))
            yield finding("tower-promised", f"{UNFREEZE} is true, but no tensor is named {TOWER}*", where, change)
        return
    loaded = None if folder is None else tower_weights(folder)
    if folder is None or not loaded:
        if not used:
            found = f"{len(own)} tower tensors in the checkpoint; {name} is not on this machine"
            yield finding("tower-not-compared", found, where, tower=name)
        return
    both, shape = [name for name in own if name in loaded], vision_part(read_object(folder / "config.json"))
    # What the folder lacks is in the checkpoint, or has a finding of its own.
    odd = sorted((set(own) ^ set(loaded)) - {*missing_of_tower(loaded, shape)}) + [
        name for name in both if own[name].shape != loaded[name].shape
    ]
    if odd:
        found = f"{len(odd)} tensors are missing, unknown or have another shape ({odd[0]}, ...)"
        yield finding("tower-misfit", found, str(contents.path))
        return
    if used or not compares:
        return
    distance = compare({name: own[name] for name in both}, loaded)
    lacking = missing_of_tower(loaded, shape, whole=False)
    if distance.differing or lacking:
        change = contents.configures(**{UNFREEZE: True})
        random = f"; {len(lacking)} are missing there ({lacking[0]}, ...)" if lacking else ""
        yield finding("tower-ignored", f"{distance} ({folder}){random}", where, change)
    else:
        yield finding("tower-copy", f"{distance.tensors} tensors equal those in {folder}", where)


def tower_weights(folder: Path) -> dict[str, StoredTensor]:
    """The vision tensors of a CLIP folder that its index names too, if it has one; empty if it has no readable weights."""
    first = next((name for name in WHOLE if (folder / name).is_file()), None)
    if first is None:
        return {}
    names = [first]
    if first.endswith(".json"):
        names = _shards(folder / first)
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        try:
            file = folder / name
            tensors.update(read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file).tensors)
        except (BadFile, OSError):
            return {}
    if tensors and first.endswith(".json"):
        tensors = {name: tensors[name] for name in read_object(folder / first)["weight_map"] if name in tensors}
    return _bare({n: t for n, t in tensors.items() if not n.startswith(("text_", "visual_proj", "logit_scale"))})


def _bare(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors under the names that all transformers versions share, without position_ids, which only older ones save."""
    return {bare_tower_name(name): t for name, t in tensors.items() if not is_buffer(name)}


def compare(own: dict[str, StoredTensor], loaded: dict[str, StoredTensor]) -> Distance:
    """Compare the checkpoint's tower with the one that LLaVA loads, reading one tensor at a time.

    Args:
        own: tensors of the checkpoint's tower.
        loaded: tensors of the other tower, with the same names and shapes.
    """
    import torch

    differing, largest, squares, norm = 0, 0.0, 0.0, 0.0
    for name, tensor in own.items():
        inside, outside = tensor.read(), loaded[name].read()
        norm += float(outside.double().square().sum())
        # Training in bf16 saves the tower rounded: that still counts as the original tower.
        if torch.equal(outside.to(inside.dtype), inside):
            continue
        gap = (inside.double() - outside.double()).abs()
        differing += 1
        largest = max(largest, float(gap.max()))
        squares += float(gap.square().sum())
    return Distance(len(own), differing, largest, math.sqrt(squares / norm) if norm else 0.0)
