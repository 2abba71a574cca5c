"""From a recipe and the data on disk to records that plain LLaVA trains on: ``umed recipe build R --out train.json``.

LLaVA opens images with ``Image.open(path).convert("RGB")``. Files that this shows correctly (8-bit PNG, JPEG) are named by their
absolute path and not copied. All others (DICOM, NIfTI slices, 16-bit PNG) are rendered as 8-bit PNG under ``out_dir/images`` and
named relative to ``out_dir``, so ``--image_folder out_dir`` serves both. Only pixels are written, nothing of a DICOM header.
"""

from __future__ import annotations

import contextlib
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Callable, Optional, Union

from umed_plugin.data.annotations import Annotated, AnnotationSet, read_annotations
from umed_plugin.data.annotations.one_image import in_one_image
from umed_plugin.data.leaks import evaluation_pictures
from umed_plugin.data.preparation import Looks, leave_what_is_seen, missing_image, prepare, requests_of
from umed_plugin.data.prepared import FindsBoxes, Prepared, check_finder
from umed_plugin.data.probes import probe_records
from umed_plugin.data.reading import look_at_all
from umed_plugin.data.reading.looks import NO_PIXELS
from umed_plugin.data.recipes.recipe import AnyRecipe, classes_held_out, slice_axes
from umed_plugin.data.record_writer import written_record
from umed_plugin.data.records import Record
from umed_plugin.data.shards import Shard
from umed_plugin.data.splits import SPLITS
from umed_plugin.data.volumes import choose_slices
from umed_plugin.errors import UmedError, UsageError, unknown_name, warn
from umed_plugin.faults import Faults
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.terminal.progress import tracked


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
    probes: bool = True,
    skipped: Optional[list[UmedError]] = None,
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
        probes: add the probes that the recipe asks for. False: `with_probes` adds them once the studies are final.
        skipped: a list that gets a fault for each image that is skipped.

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
    evaluated = evaluation_pictures(against, slice_axes(recipe))
    annotations = read_annotations(recipe, data_root)
    keep = [item for item in annotations.items if split in (None, item.split)]
    missing = [item for item in annotations.missing if split in (None, item.split)]
    bad_images = [missing_image(item, number < Faults.SHOWN) for number, item in enumerate(missing)]
    records: list[Record] = []
    tally = {"lost": 0, "cut": 0, "emptied": 0}
    out = Path(out_dir) if render else None
    held_out = classes_held_out(recipe)

    def known_or_read(items: Sequence[Annotated]) -> Looks:
        requests = requests_of(items, out)
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
        if leave_what_is_seen(prepared, geometry, tally):
            records.append(written_record(prepared, out, geometry, box_decimals, seed, held_out))
    _report(annotations, bad_images, tally, recipe, on_bad_image)
    if skipped is not None:
        skipped += bad_images
    _check_ids(records, recipe)
    if not records:
        raise UmedError(
            f"{recipe.path}: no images{f' in split {split!r}' if split else ''} under {annotations.root}. "
            f"Look with: umed recipe check {shlex.quote(recipe.path)} --data-root {shlex.quote(str(annotations.root))}"
        )
    return with_probes(records, recipe, seed) if probes else records


def _check_ids(records: Sequence[Record], recipe: AnyRecipe) -> None:
    """Refuse two records of one id: kept answers, shares and reviews know a record by its id alone."""
    first: dict[str, Record] = {}
    repeated = [
        (record, known) for record in records if (known := first.setdefault(record["id"], record)) is not record
    ]
    if repeated:
        record, known = repeated[0]
        raise UmedError(
            f"{recipe.path}: {len(repeated)} records have the id of another one. The first: {record['id']!r}, of "
            f"{known['image']} and of {record['image']}. Name each image once in the annotations, by its plain path."
        )


def with_probes(records: Sequence[Record], recipe: AnyRecipe, seed: int) -> list[Record]:
    """The records, and the probes that the recipe asks for, of the training split; says which kinds there are none of.

    Args:
        records: the studies as they will be trained on, after writers and reviewers.
        recipe: of the records.
        seed: as for `build_records`.
    """
    rule = recipe.probes
    training = [record for record in records if record["split"] == "train"]
    if rule is None or not training:
        return list(records)
    made, found = probe_records(training, rule.share, seed, rule.kinds, classes_held_out(recipe))
    for line in found.told():
        warn(f"{recipe.name}: {line}")
    return [*records, *made]


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
    evaluated = evaluation_pictures(against, slice_axes(recipe))
    annotations = read_annotations(recipe, data_root)
    annotations.faults.raise_if_any(f"{recipe.path} with data in {annotations.root}")
    bad_images: list[UmedError] = []
    wanted = [item for item in annotations.items if split in (None, item.split)]
    items = choose_slices(wanted, bad_images, annotations.left_out)
    requests = shard.of(requests_of(items, Path(out_dir)))
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
    found = len(in_one_image(annotations.items))
    if annotations.wanted is not None and found < annotations.wanted:
        warn(f"{recipe.name}: {annotations.wanted} images wanted, {found} found")
    for line in annotations.told():
        warn(f"{recipe.name}: {line}")
    if tally["lost"] or tally["cut"]:
        warn(
            f"{recipe.name}: LLaVA's centre crop (image_aspect_ratio square) removes {tally['lost']} lesions, which are not "
            f"trained on, and trims {tally['cut']}; {tally['emptied']} images are left out because no lesion remains. "
            "`--image-aspect-ratio pad` keeps all of them."
        )
