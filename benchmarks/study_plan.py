"""A study's YAML: its data, variants and arms, and the cells that they give. Read by `study.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union

from pydantic import Field, model_validator
from study_recipes import GENERATED, counted_contents

from umed_plugin.data.texts import read_yaml
from umed_plugin.errors import UmedError, unknown_name
from umed_plugin.faults import Faults, StrictModel, validated

BASE = "base"
FlagValue = Union[bool, int, float, str]
Flags = dict[str, FlagValue]


class Data(StrictModel):
    """Where the studies come from. The seed of a cell draws the demo's studies; of a data set on disk it is the fold."""

    recipe: str = Field(
        GENERATED, description="The demo's generated studies, a recipe's name, or a YAML in this folder or below."
    )
    generated: Optional[Literal[True]] = Field(None, description="Another recipe that reads the demo's studies.")
    data_root: Optional[str] = Field(None, description="Folder of the recipe's data; ``${VARIABLE}`` is expanded.")
    train: int = Field(1600, ge=1, description="Generated training studies; the base's captions are of all of them.")
    val: int = Field(64, ge=1, description="Generated held-out studies that decide when stage 1 ends.")
    test: int = Field(400, ge=1, description="Generated held-out studies that all arms are compared on.")
    folds: Optional[int] = Field(
        None, ge=3, description="Folds by patient: one is the test, the next one the validation."
    )
    box_noise: float = Field(
        0.0, ge=0, lt=0.5, description="Training boxes: each corner moves by up to this share of a side."
    )
    hold_out: Optional[dict[str, list[str]]] = Field(None, description="``classes`` or ``sources`` for the test alone.")

    @model_validator(mode="after")
    def _one_of_folds_and_hold_out(self) -> Data:
        if self.folds is not None and self.hold_out is not None:
            raise ValueError("folds deals all studies anew, those of hold_out too; give one of the two")
        return self


class Variant(StrictModel):
    """Flags of all arms; ``arms``: those that it has; ``control``: the variant whose arms stand in for the others."""

    flags: Flags = {}
    data: dict[str, Any] = Field({}, description="Keys of ``data`` that differ.")
    arms: Optional[list[str]] = Field(None, min_length=1)
    control: Optional[str] = Field(None, description="Default: the first variant.")


class Arm(StrictModel):
    """One training, from the checkpoint of ``start``.

    ``steps``: of the optimizer, or ``equal``: as many as take the processor time of the arm ``budget`` of the same seed and size.
    ``sample``: answers drawn to each question; the training is then on the best of them.
    """

    start: str
    stage: Literal[1, 2] = 1
    steps: Union[int, Literal["equal"]]
    flags: Flags = {}
    sample: Optional[int] = Field(None, ge=2)
    sampled_studies: int = Field(400, ge=1, description="Studies that answers are drawn to, at most.")


class Study(StrictModel):
    """A study."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    title: str
    question: str
    data: Data = Data()
    base_captions_epochs: float = 2
    sizes: list[int] = Field(min_length=1, description="Labelled training studies, the most telling first.")
    seeds: list[int] = Field(min_length=1, description="Reported.")
    tuning_seed: int = Field(description="On which settings are chosen; it is not reported.")
    tuning: str = Field(description="What was tried on that seed, for each arm.")
    flags: Flags = Field({}, description="Of all trainings.")
    stages: dict[int, Flags] = Field({}, description="Flags of each stage.")
    budget: str = Field(description="The arm whose processor time ``steps: equal`` stands for.")
    variants: dict[str, Variant] = Field({"plain": Variant()}, min_length=1)
    arms: dict[str, Arm] = Field(min_length=1)
    against: Optional[str] = Field(None, description="The arm to compare with; a variant without it: its control's.")
    figure: list[str] = Field([], description="Arms whose gain over ``against`` the figure shows.")


@dataclass(frozen=True, order=True)
class Cell:
    """One training and its evaluation."""

    seed: int
    size: int
    variant: str
    arm: str

    @property
    def name(self) -> str:
        """Of its files."""
        return f"seed{self.seed}-{self.size}-{plain(self.variant)}-{plain(self.arm)}"


def plain(name: str) -> str:
    """A name as a part of a file's."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def load_study(path: Path) -> Study:
    """Read a study, and the file of ``like`` that it goes by, if any.

    Raises:
        UmedError: with all faults of the file.
    """
    data = _mapping(path)
    faults = Faults()
    if "like" in data:
        if not isinstance(data["like"], str):
            raise UmedError(f"{path}: like: found {data['like']!r}; give the name of a file beside this one.")
        data = _completed(data, _mapping(path.parent / data["like"]), faults)
    study = validated(Study, data, "", faults)
    if study is not None:
        _check_names(study, faults)
    faults.raise_if_any(str(path))
    return study


def _mapping(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UmedError(f"{path}: holds a {type(data).__name__}; a study is a mapping.")
    return data


def _completed(study: dict[str, Any], common: dict[str, Any], faults: Faults) -> dict[str, Any]:
    """A study with what it leaves to the common file: whole keys, single flags, and the arms that ``shared_arms`` names."""
    where = f"{study['like']}, "
    shared = [str(name) for name in _part(study, "shared_arms", list, "", faults)]
    arms = _part(common, "arms", dict, where, faults)
    for name in set(shared) - set(arms):
        faults.add("shared_arms", unknown_name("arm", name, arms))
    of_stages, own_of_stages = _part(common, "stages", dict, where, faults), _part(study, "stages", dict, "", faults)
    own = {key: value for key, value in study.items() if key not in ("like", "shared_arms")}
    return {
        **common,
        **own,
        "flags": _merged(_part(common, "flags", dict, where, faults), _part(study, "flags", dict, "", faults)),
        "stages": {
            stage: _merged(
                _part(of_stages, stage, dict, f"{where}stages.", faults),
                _part(own_of_stages, stage, dict, "stages.", faults),
            )
            for stage in {**of_stages, **own_of_stages}
        },
        "arms": {
            **{name: arms[name] for name in shared if name in arms},
            **_part(study, "arms", dict, "", faults),
        },
    }


def _part(content: Mapping[Any, Any], key: Any, kind: type[Any], where: str, faults: Faults) -> Any:
    """What stands at a key, or an empty ``kind`` if the key is missing; a fault for anything else, such as a key left empty.

    Args:
        where: before the key in the fault.
    """
    value = content.get(key, kind())
    if isinstance(value, kind):
        return value
    needed = {dict: "an object, with keys and values", list: "a list"}[kind]
    faults.add(f"{where}{key}", f"found {type(value).__name__}. Give {needed}, or leave the key out.")
    return kind()


def _merged(common: Flags, own: Mapping[str, Optional[FlagValue]]) -> Flags:
    """The flags of both, of which ``own`` overrides; one that is null there is not given."""
    return {name: value for name, value in {**common, **own}.items() if value is not None}


def _check_names(study: Study, faults: Faults) -> None:
    arms, above = study.arms, [BASE]
    for name, arm in arms.items():
        if arm.start not in above:
            faults.add(f"arms.{name}.start", f"{arm.start!r} is not {BASE!r} nor an arm above this one")
        if arm.steps == "equal" and study.budget == name:
            faults.add(f"arms.{name}.steps", "is equal to its own budget; give a number")
        above.append(name)
    named = {"budget": [study.budget], "figure": study.figure, "against": [study.against] if study.against else []}
    named |= {f"variants.{name}.arms": variant.arms or [] for name, variant in study.variants.items()}
    for key, names in named.items():
        for name in names:
            if name not in arms:
                faults.add(key, unknown_name("arm", name, arms))
    if study.tuning_seed in study.seeds:
        faults.add("tuning_seed", f"{study.tuning_seed} is among the reported seeds")
    for name, variant in study.variants.items():
        _check_control(study, name, faults)
        validated(Data, {**study.data.model_dump(), **variant.data}, f"variants.{name}.data.", faults)
        for arm in variant.arms or []:
            start = arms[arm].start if arm in arms else BASE
            if start not in (BASE, *(variant.arms or [])):
                faults.add(f"variants.{name}.arms", f"{arm!r} starts from {start!r}, which is not among them")


def _check_control(study: Study, name: str, faults: Faults) -> None:
    """The control of a variant has to have the arms that the variant lacks: all of them."""
    control, where = study.variants[name].control, f"variants.{name}.control"
    if control is None:
        return
    if control not in study.variants:
        faults.add(where, unknown_name("variant", control, study.variants))
    elif study.variants[control].arms is not None:
        faults.add(where, f"{control!r} has not all arms; name a variant without the key arms")


def data_of(study: Study, variant: str) -> Data:
    """The data of a variant."""
    return Data(**{**study.data.model_dump(), **study.variants[variant].data})


def cells(study: Study, seeds: Sequence[int], sizes: Sequence[int]) -> Iterator[Cell]:
    """All cells in the order of work: the first seed's sizes one after the other, then the next seed's."""
    for seed in seeds:
        for size in sizes:
            for variant, about in study.variants.items():
                for arm in about.arms or study.arms:
                    yield Cell(seed, size, variant, arm)


def compared_with(study: Study, cell: Cell) -> Optional[Cell]:
    """The cell of ``against``; None for that cell itself and for arms that it goes on from."""
    if study.against is None or cell.arm == study.against or cell.arm in ancestors(study, study.against):
        return None
    return _in_variant(study, cell, study.against)


def ancestors(study: Study, arm: str) -> list[str]:
    """The arms that an arm goes on from, the nearest first, without the base."""
    found = []
    while (arm := study.arms[arm].start) != BASE:
        found.append(arm)
    return found


def flags_of(study: Study, variant: str, arm: str) -> Flags:
    """All flags of a cell's training that the study sets; the later ones override."""
    about = study.arms[arm]
    return {**study.flags, **study.stages.get(about.stage, {}), **study.variants[variant].flags, **about.flags}


def digest(study: Study, cell: Cell) -> str:
    """A hash of all settings that a cell's result depends on: its own and those of the arms that it goes on from.

    What its recipes say belongs to them: `study_recipes`.
    """
    chain = [cell.arm, *ancestors(study, cell.arm)]
    if any(study.arms[arm].steps == "equal" for arm in chain):
        chain += [study.budget, *ancestors(study, study.budget)]
    data = data_of(study, cell.variant)
    recipes = counted_contents(data.recipe, GENERATED)  # the base is trained on the demo's studies
    parts: dict[str, Any] = {
        **({"recipes": recipes} if recipes else {}),
        "data": _of_cell(data.model_dump()),
        "captions": study.base_captions_epochs,
        "arms": [study.arms[arm].model_dump() for arm in chain],
        "flags": [flags_of(study, cell.variant, arm) for arm in chain],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def budget_of(study: Study, cell: Cell) -> Cell:
    """The cell whose processor time ``steps: equal`` stands for; a variant without it takes its control's."""
    return _in_variant(study, cell, study.budget)


def _in_variant(study: Study, cell: Cell, arm: str) -> Cell:
    about = study.variants[cell.variant]
    variant = cell.variant if about.arms is None or arm in about.arms else about.control or next(iter(study.variants))
    return Cell(cell.seed, cell.size, variant, arm)


def _of_cell(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None and key != "data_root"}
