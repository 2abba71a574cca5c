"""Annotation readers by name: the function that reads a format, and the recipe keys that it takes.

A reader is one file in `umed_plugin.data.annotations`. It holds a function under `register_reader` and, beside it, a model of its
options. All modules of that package are imported when a reader is first looked up, so no list names them. Readers in a user's own
file are named ``my_module:my_reader``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Optional, Union

from pydantic import BeforeValidator, ConfigDict, Field, field_validator

from umed_plugin.data.recipes.options import InWords, ReadersRule, checked_template
from umed_plugin.data.splits import Split
from umed_plugin.faults import Faults, StrictModel
from umed_plugin.registry import Registry


def _by_split(value: Any) -> Any:
    return {"": value} if isinstance(value, (str, int)) else value


# A path for all splits, or one per split; the key of the former is "".
FilesBySplit = Annotated[
    dict[Literal["", "train", "val", "test"], str],
    BeforeValidator(_by_split),
    Field(min_length=1),
    InWords("path or pattern, or mapping of split to path or pattern"),
]
ImageRoot = Annotated[
    Union[str, list[str], dict[Split, Union[str, list[str]]], None],
    InWords("folder, list of folders, or mapping of split to either"),
]


class ReaderOptions(StrictModel):
    """Keys of ``annotations`` that every reader takes.

    A reader's own options derive from this class, give each field a ``description``, and set ``yaml_example_``: the text of an
    ``annotations`` block. The recipe reference is generated from them.
    """

    # True if boxes are computed from arrays as they are stored, so that `image.box_frame` and `box_axes` cannot be others.
    stored_frame_: ClassVar[bool] = False
    # True if boxes are computed from pictures of the lesions, as x and y, so that `image.box_axes` cannot be another.
    from_masks_: ClassVar[bool] = False
    # True if the format states boxes in percent of the image alone, so that no key says so.
    in_percent_: ClassVar[bool] = False
    # True if every record is a report, and none an answer of the template writer.
    reports_only_: ClassVar[bool] = False
    # True if the annotations name each image: a file beside them that none names may be a normal image that is lost.
    names_images_: ClassVar[bool] = False
    yaml_example_: ClassVar[str] = ""  # with an underscore at its end, so that a reader may take a key ``example``

    reader: str = Field(description="Format of the annotations: name of a reader, or ``my_module:my_reader``.")
    files: FilesBySplit = Field(
        description="Annotation file, folder or pattern under the data root, or one per split (train, val, test). For coco, csv "
        "and json a pattern stands for the one file that it matches."
    )
    image_root: ImageRoot = Field(
        None,
        description="Folder of the images under the data root, or a list of folders that are searched in order, or either per "
        "split. ``*`` stands for any part of a name, ``{split}`` for the split. Default: the folder of the annotation file "
        "(coco, csv, json) or the data root (the others).",
    )

    readers: Optional[ReadersRule] = Field(
        None,
        description="Whose boxes count where several people read an image and the annotations name them (csv ``columns.reader``, "
        "coco and json ``reader_field``, label_studio, padchest_gr).",
    )

    @property
    def labels_only(self) -> bool:
        """True if the annotations say what an image shows and not where."""
        return False

    @property
    def names_split(self) -> bool:
        """True if the annotations themselves say the split of each image, for ``split.by: column``."""
        return False

    @field_validator("image_root")
    @classmethod
    def _only_the_split(cls, value: Any) -> Any:
        given = list(value.values()) if isinstance(value, dict) else [value]
        for folder in (folder for part in given for folder in (part if isinstance(part, list) else [part])):
            checked_template(folder or "", ("split",))
        return value

    def image_roots(self, split: str) -> list[str]:
        """The folders of a split's images as the recipe writes them; empty if the recipe leaves them to the reader."""
        given = self.image_root.get(split) if isinstance(self.image_root, dict) else self.image_root  # type: ignore[call-overload]
        listed = [given] if isinstance(given, str) else given or []
        return [folder.format(split=split) for folder in listed]


class FreeOptions(ReaderOptions):
    """Options of a user's own reader that declares none: every further key is allowed and passed on."""

    model_config = ConfigDict(extra="allow", frozen=True)


# A reader takes its options (recipe.annotations), the data root, and where to note faults; it returns `annotations.Annotated`.
Reader = Callable[[Any, Path, Faults], list[Any]]
READERS: Registry[Reader] = Registry("annotation reader", package="umed_plugin.data.annotations")
_OPTIONS: dict[Reader, type[ReaderOptions]] = {}


def register_reader(name: str, options: type[ReaderOptions] = FreeOptions) -> Callable[[Reader], Reader]:
    """Return a decorator that makes a function the annotation reader called ``name``.

    The function takes the validated options, the data root as `Path`, and a `Faults` to note mistakes in the data. It returns one
    `Annotated` for each image, or for each slice of a volume. Boxes are xyxy, half-open, in pixels.

    A recipe names it as ``reader: my_module:my_reader``, or by ``name`` once its module has been imported.

    Args:
        name: of the format, unique among readers.
        options: model of the keys under ``annotations``. The default allows every key.

    Raises:
        ValueError: another reader has this name.

    Example:
        >>> from pydantic import Field
        >>> from umed_plugin.data.annotations import Annotated, ReaderOptions, register_reader
        >>> class ZoneOptions(ReaderOptions):
        ...     margin: float = Field(0, ge=0, description="Added around each circle, in pixels.")
        >>> @register_reader("zones", ZoneOptions)
        ... def read_zones(options, root, faults):
        ...     items = []
        ...     for line in (root / options.files[""]).read_text().splitlines():
        ...         image, x, y, radius, lesion = line.split()
        ...         x, y, r = float(x), float(y), float(radius) + options.margin
        ...         box = (x - r, y - r, x + r, y + r)
        ...         items.append(Annotated(root / image, [box], [lesion], where=line))
        ...     return items
        >>> ZoneOptions(reader="zones", files="zones.txt", margin=2).margin
        2.0
    """

    def add(read: Reader) -> Reader:
        _OPTIONS[READERS.register(name)(read)] = options
        return read

    return add


def reader_options(name: str) -> type[ReaderOptions]:
    """The model of a reader's options, by the reader's name or as ``my_module:my_reader``.

    Raises:
        UsageError: there is no such reader.
    """
    return _OPTIONS.get(READERS.get(name), FreeOptions)
