"""JSON with one entry per image, such as Kvasir-SEG's: ``{"name": {"width": .., "height": .., "bbox": [{..}, ..]}, ..}``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

from pydantic import Field, field_validator, model_validator

from umed_plugin.data.annotations.base import Annotated, as_xyxy, four_numbers, in_unit, is_pixels, stated_size
from umed_plugin.data.annotations.cells import name_of
from umed_plugin.data.annotations.effects import Applied
from umed_plugin.data.annotations.finding import ImageFolders, annotation_file
from umed_plugin.data.annotations.labels import labels_of
from umed_plugin.data.annotations.phrases import by_phrase, checked_phrase
from umed_plugin.data.recipes.options import Convention, Unit, checked_template
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.data.texts import read_json as read_file
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box


class JsonOptions(ReaderOptions):
    """JSON with one entry per image: an object of image name and entry, or a list of entries."""

    names_images_ = True
    yaml_example_ = """
annotations:
  reader: json
  files: boxes.json
  image: images/{key}.jpg
  boxes: bbox
  box: [xmin, ymin, xmax, ymax]
  lesion: label
  size: [width, height]
"""

    image: str = Field(
        description="Path of an image. ``{key}`` is its name in the object, ``{field}`` a field of its entry."
    )
    boxes: Optional[str] = Field(
        None,
        description="Field of the entry that lists the boxes. An empty list marks a negative image. Without this key the entries "
        "are labels of images, for ``pseudo_boxes``.",
    )
    box: Union[str, list[str], None] = Field(
        None,
        description="Four fields of a box, in the order of ``convention``, or one field that holds four numbers. Needed with "
        "``boxes``.",
    )
    lesion: Optional[str] = Field(
        None,
        description="Field of a box that names the class. Leave it out if ``only_class`` is given. Without ``boxes``: field of "
        "the entry that holds a label or a list of labels.",
    )
    only_class: Optional[str] = Field(None, description="Class of every box, if no field names it.")
    no_finding: list[str] = Field(
        [],
        description="For labels without boxes: labels that say that the image has no lesion. An empty text stands for an empty "
        "label or list.",
    )
    size: Optional[tuple[str, str]] = Field(
        None, description="Fields of the entry that hold the image's width and height, in pixels."
    )
    patient: Optional[str] = Field(None, description="Field of the entry that names the patient.")
    reader_field: Optional[str] = Field(
        None,
        description="Field of a box, or else of its entry, that names who read the image. See ``annotations.readers``. With a "
        "field of the entry, a reader who found nothing is an entry with an empty list.",
    )
    phrase: Optional[str] = Field(
        None,
        description="Field of a box, or else of its entry, that holds a sentence, such as ``label_text`` of MS-CXR. Each "
        "pair of image and sentence is a record then: the question asks where the sentence is seen, and the answer is its boxes.",
    )
    convention: Convention = "xyxy"
    normalised: Unit = False

    @field_validator("image")
    @classmethod
    def _plain_fields(cls, value: str) -> str:
        return checked_template(value)

    @field_validator("box")
    @classmethod
    def _four(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) != 4:
            raise ValueError(f"{len(value)} fields given; needed: 4, or one field that holds 4 numbers")
        return value

    @model_validator(mode="after")
    def _one_class_source(self) -> JsonOptions:
        if (self.lesion is None) == (self.only_class is None):
            raise ValueError("give either lesion or only_class")
        if self.readers is not None and self.reader_field is None:
            raise ValueError("readers needs reader_field, the field that names who read the image")
        if (self.boxes is None) != (self.box is None):
            raise ValueError("give boxes and box, or neither of them for labels without boxes")
        if self.labels_only:
            given = [key for key in ("convention", "normalised", "reader_field") if key in self.model_fields_set]
            if given:
                raise ValueError(
                    f"{' and '.join(given)} would have no effect without boxes; give boxes, or remove them"
                )
        elif self.no_finding:
            raise ValueError("no_finding is for labels without boxes; with boxes, an empty list marks a negative image")
        return self

    @property
    def labels_only(self) -> bool:
        """True if no field holds boxes."""
        return self.boxes is None


@register_reader("json", JsonOptions)
def read_json(options: JsonOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read every entry of each file."""
    items: list[Annotated] = []
    applied = Applied({"annotations.no_finding": options.no_finding})
    for split, name in options.files.items():
        path = annotation_file(root, name, faults)
        if path is None:
            continue
        folders = ImageFolders(options, root, split, path.parent, faults)
        for key, entry in _entries(path, faults):
            item = _item(key, entry, f"{path} entry {key}", folders, options, faults)
            if item is None:
                continue
            item.split = split
            if options.labels_only:
                _add_labels(item, entry, options, applied, faults)
                items.append(item)
            else:
                items += _by_phrase_and_reader(item, entry, options, faults)
    if not faults.messages:
        applied.tell(faults)
    return items


def _add_labels(item: Annotated, entry: dict[str, Any], options: JsonOptions, applied: Applied, faults: Faults) -> None:
    written = [options.only_class] if options.only_class is not None else entry.get(str(options.lesion))
    texts = written if isinstance(written, list) else ["" if written is None else written]
    wrong = [text for text in texts if not isinstance(text, (str, int)) or isinstance(text, bool)]
    if wrong:
        faults.add(
            item.where,
            f"{options.lesion!r} (annotations.lesion) holds {wrong[0]!r}; needed: a label, or a list of labels",
        )
        return
    names = [str(text) for text in texts] or [""]
    for name in names:
        applied.meet("annotations.no_finding", name.strip())
    item.classes = labels_of(names, options.no_finding, item.where, faults) or []


def _by_phrase_and_reader(item: Annotated, entry: Any, options: JsonOptions, faults: Faults) -> list[Annotated]:
    """One item for each phrase, and for each reader whom ``reader_field`` names."""
    if not item.boxes:
        of_entry = None if options.reader_field is None else entry.get(options.reader_field)
        item.reader = "" if of_entry is None else str(of_entry)
        return [item]
    names = _of_boxes(options.reader_field, entry, options)
    if options.reader_field is None and len(names) != len(item.boxes):
        return [item]  # a box that cannot be read is a fault already
    if any(not isinstance(name, (str, int)) for name in names) or len(names) != len(item.boxes):
        faults.add(item.where, f"has a box without {options.reader_field!r} (annotations.reader_field)")
        return [item]
    phrases = [""] * len(names)
    if options.phrase is not None:
        phrases = [
            checked_phrase(text, f"{item.where} box {number}", options.phrase, faults)
            for number, text in enumerate(_of_boxes(options.phrase, entry, options))
        ]
    return by_phrase(item, phrases, [str(name) for name in names])


def _of_boxes(field: Optional[str], entry: Any, options: JsonOptions) -> list[Any]:
    """The value of a field in each box, or else in its entry; empty texts without a field."""
    boxes = [written for written in entry[options.boxes] if isinstance(written, dict)]
    return ["" if field is None else written.get(field, entry.get(field)) for written in boxes]


def _entries(path: Path, faults: Faults) -> list[tuple[str, Any]]:
    before = len(faults.messages)
    content = faults.read(read_file, path)
    if len(faults.messages) > before:
        return []
    if isinstance(content, dict):
        return list(content.items())
    if isinstance(content, list):
        return [(str(number), entry) for number, entry in enumerate(content)]
    faults.add(
        path, f"holds a {type(content).__name__}; needed: an object of image name -> entry, or a list of entries"
    )
    return []


def _item(
    key: str, entry: Any, where: str, folders: ImageFolders, options: JsonOptions, faults: Faults
) -> Optional[Annotated]:
    if not isinstance(entry, dict) or not (options.boxes is None or isinstance(entry.get(options.boxes), list)):
        content = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
        wanted = f"list {options.boxes!r} (annotations.boxes)" if options.boxes else "fields"
        faults.add(where, f"has no {wanted}; it holds {content or 'nothing'}")
        return None
    try:
        image = options.image.format_map({**entry, "key": key})
    except KeyError as error:
        faults.add(where, f"has no field {error} (annotations.image); it holds {', '.join(entry)}")
        return None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        faults.add(where, f"does not fit annotations.image {options.image!r}: {error}")
        return None
    size = _size(entry, where, options, faults)
    item = Annotated(folders.find([image]), [], [], where, size, bool(options.normalised))
    item.patient = name_of(entry.get(options.patient)) if options.patient is not None else ""
    for number, written in enumerate(entry[options.boxes] if options.boxes is not None else []):
        box = _box(written, options)
        lesion = options.only_class or (written.get(options.lesion) if isinstance(written, dict) else None)
        if box is None:
            faults.add(f"{where} box {number}", f"is {written!r}; needed: {options.box}, numbers in pixels")
        elif "original_width" in written and options.normalised != "percent":
            faults.add(
                f"{where} box {number}",
                "has original_width, as Label Studio writes it, whose boxes are in percent. Add normalised: percent, and for its "
                "x, y, width, height convention: xywh. Or use reader: label_studio, which knows turned boxes and annotators too",
            )
        elif not isinstance(lesion, (str, int)):
            faults.add(f"{where} box {number}", f"has no {options.lesion!r} (annotations.lesion): {written!r}")
        else:
            item.boxes.append(box)
            item.classes.append(str(lesion))
    return item


def _box(written: Any, options: JsonOptions) -> Optional[Box]:
    if isinstance(options.box, str):
        values = written.get(options.box) if isinstance(written, dict) else None
    else:
        values = [written.get(name) for name in options.box or []] if isinstance(written, dict) else None
    numbers = four_numbers(values)
    return None if numbers is None else in_unit(as_xyxy(numbers, options.convention), options.normalised)


def _size(entry: dict[str, Any], where: str, options: JsonOptions, faults: Faults) -> Optional[tuple[int, int]]:
    if options.size is None:
        return None
    width, height = (entry.get(name) for name in options.size)
    if not is_pixels(width) or not is_pixels(height):
        faults.add(where, f"{' and '.join(options.size)} are {[width, height]}; needed: whole numbers of pixels")
        return None
    return stated_size(width, height)
