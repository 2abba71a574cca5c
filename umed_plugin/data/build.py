"""From a recipe and the data on disk to records that plain LLaVA trains on: ``umed recipe build R --out train.json``.

LLaVA opens images with ``Image.open(path).convert("RGB")``. Files that this shows correctly (8-bit PNG, JPEG) are named by their
absolute path and not copied. All others (DICOM, NIfTI slices, 16-bit PNG) are rendered as 8-bit PNG under ``out_dir/images`` and
named relative to ``out_dir``, so ``--image_folder out_dir`` serves both. Only pixels are written, nothing of a DICOM header.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np

from umed_plugin.data import phrase_writer, report_writer
from umed_plugin.data.annotations import Annotated, AnnotationSet, read_annotations
from umed_plugin.data.annotations.finding import did_you_mean_file
from umed_plugin.data.images.frames import BoxFrame, frame_remarks, size_fault
from umed_plugin.data.images.options import UsedOptions
from umed_plugin.data.images.windows import plain_window
from umed_plugin.data.leaks import evaluation_pictures
from umed_plugin.data.looks import looks_question
from umed_plugin.data.prepared import FindsBoxes, Prepared, check_finder
from umed_plugin.data.probes import probe_records
from umed_plugin.data.reading import Request, Seen, look_at_all
from umed_plugin.data.reading.looks import NO_PIXELS, look_at
from umed_plugin.data.recipes.options import SPLITS, ProbesRule
from umed_plugin.data.recipes.recipe import AnyRecipe, Recipe
from umed_plugin.data.records import PSEUDO, Record
from umed_plugin.data.shards import Shard
from umed_plugin.data.template_writer import write_conversation
from umed_plugin.data.volumes import MontageItem, choose_slices, shown_slices
from umed_plugin.errors import UmedError, UsageError, unknown_name, warn
from umed_plugin.faults import Faults
from umed_plugin.grounding.answer_types import GROUNDED, NEGATIVE, PHRASE, REPORT
from umed_plugin.grounding.boxes import Box, is_degenerate
from umed_plugin.grounding.geometry import ImageGeometry, Montage
from umed_plugin.grounding.terms import find_terms
from umed_plugin.terminal.progress import tracked

WRITER = "templates-1"
_WRITERS = {PHRASE: phrase_writer.WRITER, REPORT: report_writer.WRITER}
# A lesion is not trained on when LLaVA's centre crop leaves less than this fraction of its area: nobody could find it.
LEAST_VISIBLE = 0.1


def build_records(
    recipe: AnyRecipe,
    *,
    out_dir: Union[str, Path],
    image_aspect_ratio: str = "pad",
    box_decimals: int = 2,
    seed: int = 0,
    split: Optional[str] = None,
    data_root: Optional[Union[str, Path]] = None,
    on_bad_image: str = "stop",
    against: Sequence[Union[str, Path]] = (),
    progress: bool = False,
    render: bool = True,
    workers: Optional[int] = None,
    find_boxes: Optional[FindsBoxes] = None,
) -> list[Record]:
    r"""Build the records of a recipe, or of one of its splits, and render images that LLaVA cannot read.

    Args:
        out_dir: folder for rendered images; the ``image_folder`` of the records.
        image_aspect_ratio: ``pad`` or ``square``, as set for training. Boxes in text are 0-1 of that square.
        box_decimals: decimals of the coordinates in text.
        seed: of the wording. The same seed gives the same records.
        split: build only this split: ``train``, ``val`` or ``test``.
        data_root: folder of the data set; overrides the recipe's.
        on_bad_image: ``stop`` at missing or unreadable images, or ``skip`` them with a warning.
        against: folders with the images of evaluation sets. An image that is also in one of them is left out.
        progress: show a progress bar.
        render: True: write images that LLaVA cannot read as PNG. False: a record names the file itself and holds the arguments of
            `images.load_image` under ``reading``, which only this plugin's training understands.
        workers: processes that read images. 1: this one. None: by the number of CPUs and images. The records are the same.
        find_boxes: gives boxes to images that have a label and none, as a recipe's ``pseudo_boxes`` asks for:
            `umed_plugin.pseudo_boxes.PseudoBoxes`.

    What was seen of each image is kept in ``out_dir/.umed_checked.jsonl``: the next build reads only what has changed since.

    Raises:
        UmedError: the annotations or (unless skipped) the images have faults; all are named.
        UsageError: an argument has a value that is not allowed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from umed_plugin import build_records, load_recipe
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("L", (200, 100)).save(folder / "a.png")
        >>> rows = ["file,x1,y1,x2,y2,finding", "a.png,50,25,100,75,cyst"]
        >>> _ = (folder / "boxes.csv").write_text("\n".join(rows))
        >>> _ = (folder / "drawn.yaml").write_text('''
        ... name: drawn
        ... description: One drawn image.
        ... terms: {licence: CC0, url: "https://example.org"}
        ... annotations:
        ...   reader: csv
        ...   files: boxes.csv
        ...   columns: {file: file, box: [x1, y1, x2, y2], lesion: finding}
        ... classes: {cyst: {name: cyst}}
        ... split: {by: patient, fractions: {train: 1}}
        ... ''')
        >>> recipe = load_recipe(folder / "drawn.yaml")
        >>> (record,) = build_records(recipe, out_dir=folder / "built", data_root=folder)
        >>> record["id"], record["objects"]
        ('drawn/a.png', {'ref': ['cyst'], 'bbox': [[50.0, 25.0, 100.0, 75.0]], 'bbox_type': 'real'})
    """
    _check_arguments(split, on_bad_image)
    check_finder(recipe, find_boxes, render)
    evaluated = evaluation_pictures(against)
    annotations = read_annotations(recipe, data_root)
    keep = [item for item in annotations.items if split in (None, item.split)]
    missing = [item for item in annotations.missing if split in (None, item.split)]
    bad_images = [missing_image(item, number < Faults.SHOWN) for number, item in enumerate(missing)]
    records: list[Record] = []
    tally = {"lost": 0, "cut": 0, "emptied": 0}
    out = Path(out_dir) if render else None

    def known_or_read(items: Sequence[Annotated]) -> Looks:
        requests = [_request(item, out) for item in items]
        for seen in look_at_all(requests, evaluated, kept_in=Path(out_dir), workers=workers):
            yield seen, NO_PIXELS

    images: Iterable[Prepared] = prepare(
        keep, annotations, bad_images, recipe.name if progress else None, known_or_read
    )
    if find_boxes is not None:
        images = _with_pseudo_boxes(
            images, annotations, find_boxes, image_aspect_ratio, bad_images, on_bad_image, known_or_read
        )
    for prepared in images:
        if prepared.evaluated:
            annotations.left_out["in an evaluation set too"] += 1
            continue
        geometry = ImageGeometry(*prepared.size, image_aspect_ratio)
        if _leave_what_is_seen(prepared, geometry, tally):
            records.append(written_record(prepared, out, geometry, box_decimals, seed))
    _report(annotations, bad_images, tally, recipe, on_bad_image)
    if not records:
        raise UmedError(
            f"{recipe.path}: no images{f' in split {split!r}' if split else ''} under {annotations.root}. "
            f"Look with: umed recipe check {recipe.name} --data-root {annotations.root}"
        )
    return records if recipe.probes is None else records + _probes(recipe.probes, records, seed, recipe.name)


def _probes(rule: ProbesRule, records: Sequence[Record], seed: int, name: str) -> list[Record]:
    """Probes of the training split; says which kinds there are none of."""
    training = [record for record in records if record["split"] == "train"]
    if not training:
        return []
    made, found = probe_records(training, rule.share, seed, rule.kinds)
    for line in found.told():
        warn(f"{name}: {line}")
    return made


def read_shard(
    recipe: AnyRecipe,
    shard: Shard,
    *,
    out_dir: Union[str, Path],
    split: Optional[str] = None,
    data_root: Optional[Union[str, Path]] = None,
    against: Sequence[Union[str, Path]] = (),
    progress: bool = False,
    workers: Optional[int] = None,
) -> tuple[int, list[str]]:
    """Read and render one process's share of the images that `build_records` needs, and keep what was seen.

    `build_records` with the same ``out_dir`` then reads only what no shard has read.

    Returns:
        The number of images in this share, and the faults of those that cannot be read.

    Raises:
        UmedError: the annotations have faults.
    """
    evaluated = evaluation_pictures(against)
    annotations = read_annotations(recipe, data_root)
    annotations.faults.raise_if_any(f"{recipe.path} with data in {annotations.root}")
    bad_images: list[UmedError] = []
    items = choose_slices([item for item in annotations.items if split in (None, item.split)], bad_images)
    requests = shard.of([_request(item, Path(out_dir)) for item in items])
    looks = look_at_all(requests, evaluated, kept_in=Path(out_dir), workers=workers, shard=shard)
    with contextlib.closing(looks):
        title = f"{recipe.name}, shard {shard}: images"
        shown = tracked(looks, title, "image", len(requests)) if progress else looks
        return len(requests), [seen.fault for seen in shown if seen.fault is not None]


def _with_pseudo_boxes(
    images: Iterable[Prepared],
    annotations: AnnotationSet,
    find_boxes: FindsBoxes,
    image_aspect_ratio: str,
    bad_images: list[UmedError],
    on_bad_image: str,
    look: Callable[[Sequence[Annotated]], Looks],
) -> list[Prepared]:
    """The images, those that have a label and no box with a pseudo-box; those that get none are left out and counted.

    Args:
        images: all that are asked for.
        look: reads normal images of other splits.
    """
    images = list(images)
    here = {id(image.item) for image in images}
    missing = [item for item in find_boxes.normals(annotations.normals) if id(item) not in here]
    # What is said of images is about those of the build.
    remarks, read = annotations.image_remarks, annotations.read
    annotations.image_remarks = defaultdict(list)
    normals = list(prepare(missing, annotations, bad_images, None, look))
    annotations.image_remarks, annotations.read = remarks, read
    # A map takes a while: what stops the build anyway is told before.
    if not annotations.faults.messages and not (bad_images and on_bad_image == "stop"):
        find_boxes(images, normals, annotations, image_aspect_ratio)
    return [image for image in images if not image.labels]


def _check_arguments(split: Optional[str], on_bad_image: str) -> None:
    if split is not None and split not in SPLITS:
        raise UsageError(unknown_name("split", split, SPLITS))
    if on_bad_image not in ("stop", "skip"):
        raise UsageError(unknown_name("on_bad_image", on_bad_image, ("stop", "skip")))


def missing_image(item: Annotated, look_for_near: bool = True) -> UmedError:
    """The error for an annotated image that is not on disk; with the name that was probably meant, which takes time to find."""
    meant = did_you_mean_file(item.image, item.root) if look_for_near else ""
    return UmedError(
        f"{item.image}: no such image, but {item.where} names it.{meant} Get it from {item.recipe.terms.url}"
    )


# What was seen of each image, and its pixels (empty where they were not read).
Looks = Generator[tuple[Seen, np.ndarray], None, None]


def prepare(
    items: Sequence[Annotated],
    annotations: AnnotationSet,
    bad_images: list[UmedError],
    title: Optional[str] = None,
    look: Optional[Callable[[Sequence[Annotated]], Looks]] = None,
) -> Iterator[Prepared]:
    """Read every image and fit its boxes.

    Wrong boxes are added to ``annotations.faults``, images left out to ``annotations.left_out``, unreadable ones to
    ``bad_images``.

    Args:
        title: of the progress bar; None shows none.
        look: gives what is seen of each image; None: reads them here, with their pixels.
    """
    used, whole = UsedOptions(), len(items) == len(annotations.items)
    items = choose_slices(items, bad_images)
    with contextlib.closing((look or _read_here)(items)) as looks:
        # The looks come first: at their end they tidy up.
        pairs = zip(looks, items)
        for (seen, pixels), item in pairs if title is None else tracked(pairs, f"{title}: images", "image", len(items)):
            if seen.fault is not None:
                bad_images.append(UmedError(seen.fault))
                continue
            prepared = _fit_to_image(item, seen, pixels, annotations)
            if prepared is not None:
                used.add(item.recipe, item.image, is_grey_levels=prepared.is_grey_levels, exif=prepared.exif)
                yield prepared
    if whole and not bad_images:
        annotations.unused_options += used.unused()


def _read_here(items: Sequence[Annotated]) -> Looks:
    for item in items:
        try:
            yield look_at(_request(item, None))
        except UmedError as error:
            yield Seen(fault=str(error)), NO_PIXELS


def _request(item: Annotated, out_dir: Optional[Path]) -> Request:
    """What to read of an item.

    Args:
        out_dir: folder for rendered images; None renders none.
    """
    return Request(
        path=str(item.image),
        slice=item.slice,
        reading=_reading(item),
        no_window=item.recipe.image.window == "column" and item.window is None,
        out_dir=None if out_dir is None else str(out_dir),
        rendered=_rendered_name(item),
    )


def _fit_to_image(item: Annotated, seen: Seen, pixels: np.ndarray, annotations: AnnotationSet) -> Optional[Prepared]:
    """An image with its boxes; None after a fault, or if it is left out."""
    options, shown = item.recipe.image, seen.shown(pixels)
    if seen.window_missing:
        annotations.faults.add(item.where, "the window column is empty, and image.window is 'column'")
        return None
    frame = BoxFrame(options.box_frame, shown)
    claimed = tuple(item.size or frame.size)
    fault = size_fault(claimed, frame, item.image.name, options.other_size)
    if fault:
        annotations.faults.add(item.where, fault)
        return None
    annotations.read += 1
    for kind, detail in frame_remarks(frame, bool(item.boxes)):
        annotations.image_remarks[kind].append(f"{item.image.name}{f': {detail}' if detail else ''}")
    boxes = [_in_pixels(box, item.normalised, options.box_axes == "yx", frame.size, claimed) for box in item.boxes]
    fitted = [_fit(box, frame.size, item, annotations) for box in boxes]
    kept = [i for i, box in enumerate(fitted) if box is not None]
    if item.boxes and not kept:
        annotations.left_out["only degenerate boxes"] += 1
        return None  # an image with lesions must not become a negative
    # Boxes follow the image: first as the slice is turned for display, then to their tile of a montage.
    moved = frame.to_shown([box for box in fitted if box is not None])
    size = shown.orientation.size
    if isinstance(item, MontageItem):
        montage = Montage(*size, len(item.tiles))
        size, moved = montage.size, montage.apply_boxes(moved, [item.tile_of_box[i] for i in kept])
    order = sorted(range(len(kept)), key=lambda i: (moved[i][1], moved[i][0]))
    return Prepared(
        item,
        size,
        boxes=[moved[i] for i in order],
        classes=[item.classes[kept[i]] for i in order],
        shown=pixels,
        by_llava=seen.by_llava,
        reading={} if seen.by_llava else _reading(item),
        is_grey_levels=seen.is_grey_levels,
        exif=seen.exif,
        evaluated=seen.evaluated,
        rendered=seen.rendered,
        burned_in=seen.burned_in,
        labels=list(item.labels),
    )


def _reading(item: Annotated) -> dict[str, Any]:
    """Arguments of `load_image` for an image that LLaVA cannot read itself."""
    options = item.recipe.image
    return {
        "window": item.window if options.window == "column" else plain_window(options.window),
        "offset": options.offset,
        "orientation": options.orientation,
        "slice": shown_slices(item),
        "slice_axis": options.slice_axis,
        "volume": options.volume,
        "pixels": options.pixels,
        **({"beside": [str(view) for view in item.views]} if item.views else {}),
    }


def _in_pixels(box: Box, normalised: bool, swapped: bool, frame: tuple[int, int], claimed: tuple[int, ...]) -> Box:
    """A box of the annotations in pixels of the file.

    Args:
        swapped: the box is yxyx.
        frame: width and height of the file, in pixels.
        claimed: width and height on which the box was drawn, in pixels.
    """
    x1, y1, x2, y2 = (box[1], box[0], box[3], box[2]) if swapped else box
    width, height = frame if normalised else (frame[0] / claimed[0], frame[1] / claimed[1])
    return (x1 * width, y1 * height, x2 * width, y2 * height)


def _fit(box: Box, frame: tuple[int, int], item: Annotated, annotations: AnnotationSet) -> Optional[Box]:
    """The box cut to its image if it leaves it by no more than the tolerance; None after a fault or when dropped."""
    recipe, faults = item.recipe, annotations.faults
    width, height = frame
    outside = max(-box[0], -box[1], box[2] - width, box[3] - height)
    rounded = [round(value, 2) for value in box]
    if not all(map(math.isfinite, box)):
        faults.add(item.where, f"box {rounded} of {item.image.name} is not of numbers. A box has four finite ones")
        return None
    if not is_degenerate(box) and outside > recipe.box_tolerance:
        faults.add(
            item.where,
            f"box {rounded} leaves {item.image.name} ({width}x{height}) by {outside:.1f} px. "
            f"Allowed: {recipe.box_tolerance:g} (box_tolerance). Is annotations.convention right?",
        )
        return None
    x1, y1, x2, y2 = box
    fitted = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if is_degenerate(fitted) or min(fitted[2] - fitted[0], fitted[3] - fitted[1]) < recipe.least_box_side:
        if recipe.degenerate_boxes == "stop":
            thin = f"is thinner than least_box_side {recipe.least_box_side:g}" if not is_degenerate(fitted) else ""
            faults.add(
                item.where,
                f"box {rounded} of {item.image.name} {thin or 'has no area'}. Is annotations.convention right? "
                "To leave slivers out: degenerate_boxes: drop",
            )
        else:
            annotations.dropped_boxes += 1
        return None
    return fitted


def _leave_what_is_seen(prepared: Prepared, geometry: ImageGeometry, tally: dict[str, int]) -> bool:
    """Drop lesions that the centre crop removes and trim the others to what the model sees; False if none is left."""
    if not prepared.boxes:
        return True
    shares = [geometry.visible_fraction(box) for box in prepared.boxes]
    seen = [i for i, share in enumerate(shares) if share >= LEAST_VISIBLE]
    tally["lost"] += len(shares) - len(seen)
    tally["cut"] += sum(LEAST_VISIBLE <= share < 1 for share in shares)
    tally["emptied"] += not seen
    prepared.classes = [prepared.classes[i] for i in seen]
    # A box that is entirely visible keeps its exact numbers.
    trimmed = geometry.from_square(geometry.to_square(prepared.boxes))
    prepared.boxes = [prepared.boxes[i] if shares[i] == 1 else trimmed[i] for i in seen]
    return bool(seen)


def written_record(
    prepared: Prepared, out_dir: Optional[Path], geometry: ImageGeometry, decimals: int, seed: int
) -> Record:
    """The record of an image, with its question and answer.

    Args:
        out_dir: folder of rendered images; None: the record says how the file is read.
        geometry: of the image.
        decimals: of coordinates in the text.
        seed: of the wording.
    """
    record = _record(prepared, out_dir, geometry, decimals, seed)
    # Seeded per record: a record's wording does not depend on which others are built.
    rng = random.Random(f"{seed}:{record['id']}")
    if record["answer_type"] == PHRASE:
        record["conversations"] = phrase_writer.write_phrase_conversation(record, geometry, rng, decimals)
    elif record["answer_type"] == REPORT:
        record["conversations"] = report_writer.write_report_conversation(prepared.item.report, rng)
    else:
        asked = looks_question(record, prepared.item.recipe.looks_share, seed) if record["split"] == "train" else None
        if asked:
            record["asked"] = asked
        record["conversations"] = write_conversation(record, geometry, rng, decimals)
    return record


def _record(prepared: Prepared, out_dir: Optional[Path], geometry: ImageGeometry, decimals: int, seed: int) -> Record:
    item, recipe = prepared.item, prepared.item.recipe
    image, reading = str(item.image), {}
    if not prepared.by_llava and out_dir is None:
        reading = {"reading": prepared.reading}
    elif not prepared.by_llava:
        image = prepared.rendered
    return {
        "id": _name(item),
        "image": image,
        **reading,
        "conversations": [],
        "objects": {
            "ref": _named_in(item.report, recipe) if item.report else prepared.classes,
            "bbox": [[round(value, 3) for value in box] for box in prepared.boxes],
            "bbox_type": "real",
        },
        "image_size": list(prepared.size),
        "terms": recipe.names,
        **({"looks": recipe.looks} if recipe.looks else {}),
        "source": recipe.name,
        "modality": item.modality,
        "patient": item.patient,
        "split": item.split,
        "answer_type": answer_type_of(prepared),
        **({"phrase": item.phrase} if item.phrase else {}),
        **({"augment": recipe.augment.model_dump()} if recipe.augment is not None else {}),
        **({"held_out": True} if item.held_out else {}),
        "provenance": {
            "recipe": recipe.name,
            "recipe_sha256": recipe.sha256,
            **({"mixture": recipe.mixture} if recipe.mixture else {}),
            "writer": _WRITERS.get(answer_type_of(prepared), WRITER),
            "seed": seed,
            "image_aspect_ratio": geometry.mode,
            "box_decimals": decimals,
            "original": os.path.relpath(item.image, item.root),
            "slice": shown_slices(item),
            **({"burned_in_annotation": prepared.burned_in} if prepared.burned_in else {}),
            **({} if prepared.box_score is None else {"boxes": PSEUDO, "box_score": prepared.box_score}),
        },
    }


def answer_type_of(prepared: Prepared) -> str:
    """What the record of an image asks for: one of `umed_plugin.grounding.answer_types.ANSWER_TYPES`."""
    if prepared.item.report:
        return REPORT
    if prepared.item.phrase:
        return PHRASE
    return GROUNDED if prepared.boxes else NEGATIVE


def _named_in(report: str, recipe: Recipe) -> list[str]:
    """The classes that a report names and does not rule out, in the order of their first mention."""
    return list(dict.fromkeys(name for _, _, name in find_terms(report, recipe.names)))


def _name(item: Annotated) -> str:
    """The id of an item's record."""
    return _picture(item) + (f": {item.phrase}" if item.phrase else "")


def _picture(item: Annotated) -> str:
    """The name of what an item shows."""
    original = os.path.relpath(item.image, item.root)
    return f"{item.recipe.name}/{original}" + ("" if item.slice is None else f"#{item.slice}")


def _rendered_name(item: Annotated) -> str:
    """Where the item's image is rendered to, relative to ``out_dir``, if no other picture is there."""
    return (Path("images") / (_picture(item).replace("../", "").replace("#", "_slice") + ".png")).as_posix()


def _report(
    annotations: AnnotationSet, bad_images: list[UmedError], tally: dict[str, int], recipe: AnyRecipe, on_bad_image: str
) -> None:
    """Raise the faults that stop the build, and warn about what was left out."""
    if on_bad_image == "stop":
        annotations.faults.messages += [str(error) for error in bad_images]
    elif bad_images:
        shown = "\n  ".join(str(error) for error in bad_images[:5])
        warn(f"{recipe.name}: {len(bad_images)} images skipped, the first:\n  {shown}")
    title = f"{recipe.path} with data in {annotations.root}"
    annotations.faults.raise_if_any(title + (" (--on-bad-image skip leaves bad images out)" if bad_images else ""))
    if annotations.wanted is not None and len(annotations.items) < annotations.wanted:
        warn(f"{recipe.name}: {annotations.wanted} images wanted, {len(annotations.items)} found")
    for line in annotations.told():
        warn(f"{recipe.name}: {line}")
    if tally["lost"] or tally["cut"]:
        warn(
            f"{recipe.name}: LLaVA's centre crop (image_aspect_ratio square) removes {tally['lost']} lesions, which are not "
            f"trained on, and trims {tally['cut']}; {tally['emptied']} images are left out because no lesion remains. "
            "`--image-aspect-ratio pad` keeps all of them."
        )
