"""Reads the settings of an upgrade: ``run.yaml``, a preset, and the changes of the command line; checks the paths in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umed_plugin.commands.upgrade.presets import preset_file
from umed_plugin.commands.upgrade.settings import Settings, dotted
from umed_plugin.data.texts import read_yaml
from umed_plugin.errors import UmedError, UsageError, note
from umed_plugin.faults import Faults, validated
from umed_plugin.flags.names import SYMBOLIC

_PATHS = ("checkpoint", "base", "data_root", "deepspeed")


def read_settings(file: Path | None, changes: dict[str, Any], preset: str | None = None) -> Settings:
    """Read settings from a file, and apply changes.

    Args:
        file: a ``run.yaml``; None starts from the defaults.
        changes: dotted key -> value.
        preset: name or file of a preset (`umed_plugin.commands.upgrade.presets`), or None. File and changes win over it, and a
            note says where they do.

    Raises:
        UmedError: all faults at once, including missing files and folders.
        UsageError: the file does not exist.
    """
    data: dict[str, Any] = {}
    if file is not None:
        data = _load(file)
        data.update({key: _absolute(data[key], file.parent) for key in _PATHS if isinstance(data.get(key), str)})
        if isinstance(data.get("recipe"), str):
            data["recipe"] = recipe_path(data["recipe"], file.parent)
        _place_evaluation(data, file.parent)
        _place_symbols(data, file.parent)
    if preset is not None:
        given = [(str(file), dotted(data)), ("the command line", changes)]
        data = over_preset(preset, _load(preset_file(preset)), given)
    for key, value in changes.items():
        _put(data, key.split("."), value)
    _place_evaluation(data, Path.cwd())
    _place_symbols(data, Path.cwd())
    faults = Faults()
    settings = validated(Settings, data, "", faults)
    if settings is not None:
        _check_paths(settings, faults)
    faults.raise_if_any(str(file) if file is not None else "invalid settings")
    return settings


def _load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError(f"{file}: no such file. `umed upgrade CKPT --recipe R --out DIR` writes one.")
    data = read_yaml(file)
    if not isinstance(data, dict):
        raise UmedError(f"{file}: contains a {type(data).__name__}. Needed: a mapping of keys to values.")
    return data


def over_preset(preset: str, data: dict[str, Any], given: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The settings of a preset with those that are given put over them, and a note for each that differs.

    Args:
        preset: its name.
        data: its settings.
        given: where settings stand, in words, and their dotted keys and values; later ones win.
    """
    of_preset = dotted(data)
    for where, values in given:
        for key, value in values.items():
            if key in of_preset and of_preset[key] != value:
                note(
                    f"--preset {preset} would set {key} to {of_preset[key]}; {where} sets it to {value}, and that counts."
                )
            _put(data, key.split("."), value)
    return data


def _put(data: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set a key in a mapping of mappings. ``rewarding: auto`` is short for ``rewarding: {run: auto}``, and both go together."""
    for key in keys[:-1]:
        if not isinstance(data.get(key), dict):
            data[key] = {"run": data[key]} if isinstance(data.get(key), str) else {}
        data = data[key]
    if isinstance(value, str) and isinstance(data.get(keys[-1]), dict):
        data, keys = data[keys[-1]], ["run"]
    data[keys[-1]] = value
    # They exclude each other, and the defaults set one of them.
    other = {"steps": "epochs", "epochs": "steps"}.get(keys[-1])
    if other is not None and value is not None:
        data[other] = None


def _place_evaluation(data: dict[str, Any], start: Path) -> None:
    """Make the paths of ``evaluation`` absolute."""
    evaluation = data.get("evaluation")
    if not isinstance(evaluation, dict):
        return
    if isinstance(evaluation.get("recipe"), str):
        evaluation["recipe"] = recipe_path(evaluation["recipe"], start)
    if isinstance(evaluation.get("data_root"), str):
        evaluation["data_root"] = _absolute(evaluation["data_root"], start)


def _place_symbols(data: dict[str, Any], start: Path) -> None:
    """Make the paths of rewards ``symbolic:FILE`` absolute: training runs in another folder."""
    stage = data.get("rewarding")
    if not isinstance(stage, dict) or not isinstance(stage.get("rewards"), list):
        return
    mark = f"{SYMBOLIC}:"
    stage["rewards"] = [
        mark + _absolute(name[len(mark) :], start) if isinstance(name, str) and name.startswith(mark) else name
        for name in stage["rewards"]
    ]


def _absolute(path: str, start: Path) -> str:
    return os.path.normpath(start.resolve() / Path(path).expanduser())


def recipe_path(recipe: str, start: Path) -> str:
    """The absolute path of a recipe's file; the name of a shipped recipe unchanged."""
    is_file = Path(recipe).suffix in (".yaml", ".yml", ".json") or os.sep in recipe
    return _absolute(recipe, start) if is_file else recipe


def _check_paths(settings: Settings, faults: Faults) -> None:
    for key in ("base", "data_root"):
        folder = getattr(settings, key)
        if folder is not None and not os.path.isdir(folder):
            faults.add(key, f"{folder}: no such folder")
    if settings.deepspeed is not None and not os.path.isfile(settings.deepspeed):
        faults.add("deepspeed", f"{settings.deepspeed}: no such file")
    if settings.bits == 4 and settings.method == "full":
        faults.add("bits", "4 needs method: lora; weights of 4 bits cannot be trained themselves")
    if settings.recipe.endswith(".json") and settings.data_root is not None:
        faults.add("data_root", "has no effect: the records are built already")
    _check_evaluation(settings, faults)


def _check_evaluation(settings: Settings, faults: Faults) -> None:
    """Boxes that no person drew are trained on, and nothing is measured against them."""
    measured = settings.evaluation
    if measured.data_root is not None and (measured.recipe is None or measured.recipe.endswith(".json")):
        faults.add("evaluation.data_root", "has no effect without evaluation.recipe as a recipe")
    elif measured.data_root is not None and not os.path.isdir(measured.data_root):
        faults.add("evaluation.data_root", f"{measured.data_root}: no such folder")
    if measured.recipe is None and _has_pseudo_boxes(settings.recipe, "recipe", faults):
        faults.add(
            "evaluation.recipe",
            f"missing. {settings.recipe} has pseudo_boxes, which no person drew. Needed: a recipe with true boxes to evaluate on",
        )
    if measured.recipe is not None and _has_pseudo_boxes(measured.recipe, "evaluation.recipe", faults):
        faults.add("evaluation.recipe", f"{measured.recipe} has pseudo_boxes. Needed: a recipe with true boxes")


def _has_pseudo_boxes(recipe: str, key: str, faults: Faults) -> bool:
    from umed_plugin.data.prepared import has_pseudo_boxes
    from umed_plugin.data.recipes.recipe import load_recipe

    if recipe.endswith(".json"):
        if not os.path.isfile(recipe) and key != "recipe":
            faults.add(key, f"{recipe}: no such file")
        return False
    try:
        return has_pseudo_boxes(load_recipe(recipe))
    except UmedError as error:
        if key != "recipe":  # the training's recipe is told of by the plan
            faults.add(key, str(error))
        return False
