"""Recipes: one YAML file per data set that states where its annotations are, how to read them, and under which terms.

A data set in a form that one of the readers knows, such as COCO, CSV or masks, needs a YAML file and no Python code.
``umed recipe show`` prints a shipped recipe to start from; `reference.recipe_reference` lists every key. All mistakes of a file
are reported at once, each with its key, what is allowed, and the likely intended name.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Optional, Union

from pydantic import BeforeValidator, Field, field_validator

from umed_plugin.data.augment_rule import AugmentRule
from umed_plugin.data.recipes.image_options import ImageOptions
from umed_plugin.data.recipes.options import (
    AbnormalityClass,
    Fractions,
    HoldOut,
    InWords,
    NegativeRule,
    ProbesRule,
    SplitRule,
    UsageTerms,
    with_text_keys,
)
from umed_plugin.data.recipes.pseudo_boxes import PseudoBoxRule
from umed_plugin.data.recipes.readers import READERS, ReaderOptions, reader_options
from umed_plugin.data.recipes.several_keys import check_hold_out, check_together
from umed_plugin.data.texts import parse_yaml
from umed_plugin.errors import UmedError, UsageError, unknown_name
from umed_plugin.faults import Faults, StrictModel, validated


def _short_form(value: Any) -> Any:
    return {"use": value} if isinstance(value, str) else value


class Recipe(StrictModel):
    """A data set: where it is, what it holds, how it is read."""

    filled_in_: ClassVar[tuple[str, ...]] = ("path", "sha256", "mixture")

    name: str = Field(
        pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the data set: letters, digits, ``_``, ``.`` and ``-``."
    )
    description: str = Field(description="What the data set holds, in a sentence. ``umed recipe list`` shows it.")
    terms: UsageTerms = Field(description="Licence of the data, and where to get it.")
    data_root: str = Field(
        "${UMED_DATA_ROOT}",
        description="Folder of the data set. ``${VARIABLE}`` is taken from the environment; ``--data-root`` overrides this key.",
    )
    linked_roots: list[str] = Field(
        [],
        description="Folders outside of the data root in which images may lie, such as a disk to which the data root links. "
        "``${VARIABLE}`` is taken from the environment. Other images outside of the data root are faults.",
    )
    modality: str = Field("", description="Modality of images for which no column names one, such as CT.")
    annotations: Annotated[Any, InWords("see Annotation readers")] = Field(
        description="Format and files of the annotations."
    )
    image: ImageOptions = Field(ImageOptions(), description="How pixels become what the model sees.")
    classes: dict[str, AbnormalityClass] = Field(
        min_length=1, description="Class in the annotations, and its plain name and synonyms."
    )
    looks_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the training studies of one class, and of those without a lesion, that are asked for one class: "
        "``Find: NAME, that is LOOKS.``, or in one of four ``Find: NAME.`` Only for classes that have ``looks``.",
    )
    ignore_classes: list[str] = Field(
        [],
        description="Classes to ignore. An image that holds one is left out whole: it is neither negative nor fully described.",
    )
    split: SplitRule = Field(description="Which images go to train, val and test.")
    negatives: Annotated[NegativeRule, BeforeValidator(_short_form), InWords("`keep`, `drop`, or mapping")] = Field(
        NegativeRule(),
        description="Whether to ``keep`` or ``drop`` images without a lesion, or which of them to use and where they are listed.",
    )
    box_tolerance: float = Field(
        1.0,
        ge=0,
        description="A box that leaves its image by at most this many pixels is cut to the image. Further out is a fault.",
    )
    least_box_side: float = Field(
        0.0,
        ge=0,
        description="A box whose width or height is below this many pixels is degenerate. At 0, only a box without area is.",
    )
    degenerate_boxes: Literal["stop", "drop"] = Field(
        "stop",
        description="``stop``: report a degenerate box as a fault. ``drop``: leave it out (with its image, if no box is left).",
    )
    pseudo_boxes: Optional[PseudoBoxRule] = Field(
        None,
        description="How images that have a label and no box get boxes from an anomaly map, with ``umed recipe build --tower``. "
        "Needs a reader of labels: ``folders``, or ``csv`` and ``json`` without the keys of boxes.",
    )
    augment: Optional[AugmentRule] = Field(
        None,
        description="How ``--umed_augment`` changes studies in training. Without this key the defaults below apply, and no study "
        "is mirrored.",
    )
    hold_out: Optional[HoldOut] = Field(
        None, description="Classes that training never sees: their images are in the test alone."
    )
    probes: Optional[ProbesRule] = Field(
        None, description="Adds probes to the training split. In a mixture, the mixture's own key counts."
    )
    path: str = Field("", description="Path of the YAML file.")
    sha256: str = Field("", description="SHA-256 of the YAML file.")
    mixture: str = Field("", description="Name and SHA-256 of the mixture that this recipe is a source of, or empty.")

    @field_validator("classes", "ignore_classes", mode="before")
    @classmethod
    def _classes_as_text(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return with_text_keys(value)
        return [str(item) for item in value] if isinstance(value, list) else value

    @property
    def names(self) -> dict[str, list[str]]:
        """The ``terms`` of every record: plain name of a class -> plain name, then synonyms."""
        merged: dict[str, list[str]] = {}
        for entry in self.classes.values():
            words = merged.setdefault(entry.name, [entry.name])
            words += [synonym for synonym in entry.synonyms if synonym not in words]
        return merged

    @property
    def looks(self) -> dict[str, str]:
        """Plain name of a class -> what it looks like, of those that say it."""
        return {entry.name: entry.looks for entry in reversed(list(self.classes.values())) if entry.looks}

    @property
    def phrase(self) -> Optional[Union[str, int]]:
        """Field or column of the phrases, or None: then an image is one record with all of its lesions."""
        found: Optional[Union[str, int]] = getattr(self.annotations, "phrase", None)
        return found

    def root(self, data_root: Optional[Union[str, Path]] = None) -> Path:
        """The folder of the data set.

        Args:
            data_root: overrides the recipe's ``data_root``.

        Raises:
            UmedError: the folder is not given, its variable is not set, or it does not exist.
        """
        get = f"Get the data ({self.terms.licence}) from {self.terms.url}"
        return _data_folder(self.path, self.data_root, data_root, get)


class Source(StrictModel):
    """A data set in a mixture."""

    folder: str = Field(description="Folder of the data set, under the mixture's data root.")
    share: float = Field(1.0, gt=0, description="Weight of the data set in the mixture, relative to the other sources.")


class MixedSplit(StrictModel):
    """Split of the sources whose ``split.by`` is ``patient``. The other sources keep the splits of their files."""

    seed: int = Field(0, description="Seed of the hash that splits patients.")
    fractions: Fractions = Field({"train": 0.8, "val": 0.1, "test": 0.1}, description="Share of each split.")


class Mixture(StrictModel):
    """Several data sets as one."""

    filled_in_: ClassVar[tuple[str, ...]] = ("path", "sha256", "recipes")

    name: str = Field(
        pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the mixture: letters, digits, ``_``, ``.`` and ``-``."
    )
    description: str = Field(description="What the mixture holds, in a sentence. ``umed recipe list`` shows it.")
    data_root: str = Field(
        "${UMED_DATA_ROOT}",
        description="Folder that holds the sources' folders. ``${VARIABLE}`` is taken from the environment; ``--data-root`` "
        "overrides this key.",
    )
    sources: dict[str, Source] = Field(
        min_length=1, description="Recipe (its name, or a YAML file beside this one), and its folder and share."
    )
    size: int = Field(
        gt=0,
        description="Number of images to choose. A source with fewer images than its share gives all of them, and the other "
        "sources fill up.",
    )
    negative_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Maximum fraction of the images that show no lesion, taken from the sources that have such images.",
    )
    split: MixedSplit = Field(MixedSplit(), description="Split of the sources that are split by patient.")
    hold_out: Optional[HoldOut] = Field(
        None, description="Classes and sources that training never sees: their images are in the test alone."
    )
    probes: Optional[ProbesRule] = Field(
        None, description="Adds probes to the training split; wrong images are of other sources too."
    )
    recipes: dict[str, Recipe] = Field({}, description="Recipe of each source, with the mixture's split.")
    path: str = Field("", description="Path of the YAML file.")
    sha256: str = Field("", description="SHA-256 of the YAML file and of the sources' files.")

    @property
    def names(self) -> dict[str, list[str]]:
        """Plain name -> plain name, then synonyms, of the classes of all sources."""
        return {name: words for recipe in self.recipes.values() for name, words in recipe.names.items()}

    def root(self, data_root: Optional[Union[str, Path]] = None) -> Path:
        """The folder that holds the sources' folders.

        Args:
            data_root: overrides the mixture's ``data_root``.

        Raises:
            UmedError: the folder is not given, its variable is not set, or it does not exist.
        """
        return _data_folder(self.path, self.data_root, data_root, f"It holds {self._folders()}")

    def _folders(self) -> str:
        return ", ".join(f"{source.folder}/" for source in self.sources.values())


AnyRecipe = Union[Recipe, Mixture]


def sources_of(recipe: AnyRecipe) -> list[Recipe]:
    """The recipes of a mixture, or the recipe alone."""
    return list(recipe.recipes.values()) if isinstance(recipe, Mixture) else [recipe]


def slice_axes(recipe: AnyRecipe) -> set[int]:
    """The axes along which a recipe, or the sources of a mixture, slice NIfTI volumes."""
    return {source.image.slice_axis for source in sources_of(recipe)}


def _data_folder(recipe: str, written: str, given: Optional[Union[str, Path]], hint: str) -> Path:
    written = str(given) if given else written
    folder = Path(os.path.expandvars(written)).expanduser()
    if "$" in str(folder):
        raise UmedError(
            f"{recipe}: data_root is {written!r} and the variable is not set. Set it or give --data-root FOLDER. {hint}"
        )
    if not folder.is_dir():
        raise UmedError(f"{recipe}: there is no data folder {folder}. Give --data-root FOLDER. {hint}")
    return folder.resolve()


def classes_held_out(recipe: AnyRecipe) -> list[str]:
    """Plain names of the classes that are in the test alone."""
    return [] if recipe.hold_out is None else recipe.hold_out.classes


def shipped_recipes() -> dict[str, Path]:
    """Name -> YAML file of every recipe that comes with the plugin."""
    from umed_plugin import data_recipes

    return {path.stem: path for path in sorted(Path(data_recipes.__file__).parent.glob("*.yaml"))}


def load_recipe(name_or_path: Union[str, Path]) -> AnyRecipe:
    """Load a shipped recipe by name, or a YAML file by path. A recipe with ``sources`` is a mixture.

    Raises:
        UsageError: there is neither a recipe nor a file of that name.
        UmedError: the file has faults; all are listed with their key.

    Example:
        >>> from umed_plugin import load_recipe
        >>> recipe = load_recipe("kvasir_seg")
        >>> recipe.annotations.reader, recipe.split.by
        ('json', 'patient')
        >>> recipe.names
        {'polyp': ['polyp', 'colorectal polyp', 'colon polyp']}
    """
    path = Path(name_or_path)
    if not path.is_file():
        shipped = shipped_recipes()
        if str(name_or_path) not in shipped:
            raise UsageError(unknown_name("recipe", str(name_or_path), shipped) + " Or the path of a YAML file.")
        path = shipped[str(name_or_path)]
    raw = path.read_bytes()
    data = parse_yaml(raw, path)
    if not isinstance(data, dict):
        raise UmedError(
            f"{path}: holds a {type(data).__name__}; a recipe is a mapping. See: umed recipe show demo_studies"
        )
    faults = Faults()
    for key in dict.fromkeys(Recipe.filled_in_ + Mixture.filled_in_):
        if key in data:
            faults.add(key, "is filled in by umed; remove it")
    data = {**data, "path": str(path), "sha256": hashlib.sha256(raw).hexdigest()}
    loaded = _mixture(data, faults) if "sources" in data else _recipe(data, faults)
    faults.raise_if_any(str(path))
    return loaded


def _recipe(data: dict[str, Any], faults: Faults) -> Any:
    options = _reader_options(data.get("annotations"), faults)
    recipe = validated(Recipe, data | ({"annotations": options} if "annotations" in data else {}), "", faults)
    if recipe is not None and options is not None:
        check_together(recipe, faults)
    return recipe


def _mixture(data: dict[str, Any], faults: Faults) -> Any:
    mixture = validated(Mixture, data, "", faults)
    if mixture is None:
        return None
    recipes: dict[str, Recipe] = {}
    for name in mixture.sources:
        beside = Path(mixture.path).parent / name
        try:
            recipe = load_recipe(beside if beside.is_file() else name)
        except UmedError as error:
            faults.add(f"sources.{name}", str(error))
            continue
        if isinstance(recipe, Mixture):
            faults.add(f"sources.{name}", "is a mixture itself; name its sources here")
        elif recipe.hold_out is not None:
            faults.add(f"sources.{name}", "has a hold_out of its own; write it in the mixture")
        else:
            owner = next((other for other, known in recipes.items() if known.name == recipe.name), None)
            if owner is not None:
                faults.add(
                    f"sources.{name}", f"has the name {recipe.name!r}, like {owner}; ids of records begin with it"
                )
            recipes[name] = recipe
    # The selected images depend on the sources' recipes too.
    digests = "".join([mixture.sha256, *(recipe.sha256 for recipe in recipes.values())])
    mixture = mixture.model_copy(update={"sha256": hashlib.sha256(digests.encode()).hexdigest()})
    recipes = {name: _as_source(recipe, mixture) for name, recipe in recipes.items()}
    classes = {name for recipe in recipes.values() for name in recipe.names}
    check_hold_out(mixture.hold_out, classes, set(recipes), faults)
    return mixture.model_copy(update={"recipes": recipes})


def _as_source(recipe: Recipe, mixture: Mixture) -> Recipe:
    split = recipe.split
    if split.by == "patient":
        split = split.model_copy(update={"seed": mixture.split.seed, "fractions": mixture.split.fractions})
    return recipe.model_copy(update={"split": split, "mixture": f"{mixture.name} {mixture.sha256}"})


def _reader_options(written: Any, faults: Faults) -> Optional[ReaderOptions]:
    if written is None:  # a missing key is reported by Recipe itself
        return None
    reader = written.get("reader") if isinstance(written, dict) else None
    if not isinstance(reader, str):
        faults.add("annotations.reader", f"missing. Allowed: {', '.join(READERS)} or my_module:my_reader")
        return None
    if ":" not in reader and reader not in READERS:
        faults.add(
            "annotations.reader",
            unknown_name("reader", reader, READERS) + " Or my_module:my_reader.",
        )
        return None
    try:
        return validated(reader_options(reader), written, "annotations.", faults)
    except UsageError as error:
        faults.add("annotations.reader", str(error))
        return None
