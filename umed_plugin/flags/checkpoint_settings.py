"""Flags that say what the checkpoint's ``config.json`` says too, and must not say something else: LLaVA's, and the label share.

LLaVA builds tower and projector by the configuration, and afterwards writes the flags into it. So a flag that differs changes
nothing in the run, but the trained checkpoint describes another model. LLaVA's own defaults (last layer, linear projector) are
those of no published checkpoint: whoever leaves a flag out is affected too. Imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from umed_plugin.flags.tower_names import find_differences, is_same_place, last_part

# Flags that say how tower and projector are built, with the value that LLaVA takes where the configuration has none.
_BUILT_BY = {"mm_vision_select_layer": None, "mm_vision_select_feature": "patch", "mm_projector_type": "linear"}
# Flags that the run follows, so that it goes on otherwise than the checkpoint was trained; and what that means.
_FOLLOWED = {
    "mm_use_im_start_end": "<im_start> and <im_end> stand around each image, or no longer do",
    "mm_use_im_patch_token": "<im_patch>, which no prompt uses, becomes a token with random weights, or stops being one",
    "image_aspect_ratio": "the model sees images in another shape, and boxes are numbers of another square",
}


def find_contradictions(config: Mapping[str, Any], model_args: Any) -> list[str]:
    """Flags with which the trained checkpoint would not load, or would see with another layer or tower; one sentence each.

    Args:
        config: the checkpoint's ``config.json``.
        model_args: LLaVA's.
    """
    tower = config.get("mm_vision_tower")
    if not tower:
        return []  # tower and projector are built by the flags
    faults = []
    for name, default in _BUILT_BY.items():
        stored, given = config.get(name, default), getattr(model_args, name, None)
        if None not in (stored, given) and stored != given:
            faults.append(_built_otherwise(name, given, stored, name))
    given = getattr(model_args, "vision_tower", None)
    if given is None or is_same_place(given, str(tower)):
        return faults
    if last_part(given) != last_part(str(tower)):
        faults.append(_built_otherwise("vision_tower", given, tower, "mm_vision_tower"))
    elif differing := find_differences(given, str(tower), config)[1]:
        faults.append(
            _built_otherwise("vision_tower", given, tower, "mm_vision_tower", f" It has {', '.join(differing)}.")
        )
    return faults


def find_departures(config: Mapping[str, Any], model_args: Any, data_args: Any) -> list[str]:
    """Flags under which the run goes on otherwise than the checkpoint was trained; one sentence each, for a warning."""
    if not config.get("mm_vision_tower"):
        return []
    remarks = []
    for name, meaning in _FOLLOWED.items():
        given = getattr(data_args if name == "image_aspect_ratio" else model_args, name, None)
        stored = config.get(name)
        if None not in (stored, given) and stored != given:
            remarks.append(
                f"--{name} is {given} (LLaVA's default if you did not give it), but the checkpoint was trained with {stored}: "
                f"{meaning}. To go on as before: --{name} {stored}."
            )
    given, stored = getattr(model_args, "vision_tower", None), str(config["mm_vision_tower"])
    if given is not None and not is_same_place(given, stored) and last_part(given) == last_part(stored):
        remarks.append(_another_place(given, stored, config))
    adapter = getattr(model_args, "pretrain_mm_mlp_adapter", None)
    if adapter is not None:
        remarks.append(f"--pretrain_mm_mlp_adapter {adapter} replaces the checkpoint's trained projector.")
    return remarks


def find_other_share(had: float | None, share: float | None) -> list[str]:
    """Why stage 2's labelled studies may not be those that stage 1 left to it; at most one sentence, for a warning.

    Args:
        had: share of the labelled studies that stage 1 has trained on, 1 for all; None: the checkpoint does not say.
        share: ``--umed_label_share`` of stage 2; None: it trains on all.
    """
    if share == had or (share is None and had in (None, 1)):
        return []
    given = "no --umed_label_share is given" if share is None else f"--umed_label_share is {share}"
    if had is None:
        return [
            f"{given}, and the checkpoint does not say on which share stage 1 has trained: it is of an earlier version, or from "
            "elsewhere. If stage 1 had all, it knows the labelled studies of stage 2."
        ]
    if had == 1:
        return [
            f"{given}, but a stage 1 behind the checkpoint has trained on all labelled studies. If they are the same, it knows "
            "those of stage 2: then give stage 1 the flag too, and a start that has not seen them."
        ]
    between = share is not None and share > had
    meaning = (
        "those between the two shares are in neither stage"
        if between
        else "stage 2 trains on studies that stage 1 knows"
    )
    return [
        f"{given}, but a stage 1 behind the checkpoint has trained on a share of {had}. If the labelled studies are the same, "
        f"{meaning}: then give stage 2 --umed_label_share {had}."
    ]


def _another_place(given: str, stored: str, config: Mapping[str, Any]) -> str:
    """A tower of the checkpoint's name at another place: taken for the same one, which the saved configuration then names."""
    equal = find_differences(given, stored, config)[0]
    compared = (
        f"{', '.join(equal)} {'is' if len(equal) == 1 else 'are'} equal" if equal else "nothing else could be compared"
    )
    return (
        f"--vision_tower {given} and the checkpoint's mm_vision_tower {stored} are taken for the same tower by their name; "
        f"{compared}. The run loads {stored}, as LLaVA does, and the config.json that it saves will name {given}. To keep the "
        f"checkpoint's: --vision_tower {stored}. To load {given}: set mm_vision_tower in the checkpoint's config.json to it."
    )


def _built_otherwise(flag: str, given: Any, stored: Any, key: str, reason: str = "") -> str:
    return (
        f"--{flag} {given} (LLaVA's default if you did not give it): the checkpoint's config.json has {key} {stored}.{reason} "
        f"The run would train with {stored} and save {given}, so the trained checkpoint would be read as another model. Use "
        f"--{flag} {stored}."
    )
