"""NIfTI label volumes, as of MSD, BraTS and nnU-Net: each connected region of a slice is a lesion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
from pydantic import Field, field_validator, model_validator

from umed_plugin.data.annotations.base import Annotated, drop_box
from umed_plugin.data.annotations.effects import Applied
from umed_plugin.data.annotations.finding import did_you_mean_file, matches, matching_files, without_ending
from umed_plugin.data.annotations.shapes import regions
from umed_plugin.data.endings import NIFTI_ENDINGS
from umed_plugin.data.recipes.options import checked_template, compiled
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.errors import UmedError
from umed_plugin.faults import Faults

# By how much the affines of image and labels may differ, in mm.
_SAME_PLACE = 1e-2
_MOST_BYTES = 2**31  # of one label volume in memory


class NiftiLabelsOptions(ReaderOptions):
    """NIfTI label volumes. ``files`` is a pattern of the image volumes. Each connected region of a slice is a lesion, and each
    slice with a lesion an image. Labels must lie on the grid of their image.
    """

    stored_frame_ = True
    yaml_example_ = """
annotations:
  reader: nifti_labels
  files: imagesTr/*_0000.nii.gz
  case_pattern: '^(.*)_0000$'
  labels: labelsTr/{case}.nii.gz
  values: {2: tumor}
  ignore_values: [1]
"""

    labels: str = Field(
        description="Path of an image's label volume. ``{stem}`` is the image's name without ending, ``{case}`` what "
        "``case_pattern`` finds in it, ``{split}`` the split."
    )
    case_pattern: Optional[str] = Field(
        None, description="Regular expression on the image's name without ending. Its first group is ``{case}``."
    )
    values: dict[int, str] = Field(min_length=1, description="Label value and its class.")
    ignore_values: list[int] = Field([], description="Label values that mark no lesion, such as an organ.")
    join_values: bool = Field(
        False,
        description="``true``: values of one class are one lesion where they touch, as the parts of a tumor in BraTS. ``false``: "
        "each value is a lesion of its own.",
    )
    min_area: int = Field(1, ge=1, description="Regions with fewer pixels in a slice are left out as slivers.")
    negative_slices: Literal["drop", "keep"] = Field(
        "drop",
        description="Slices without a lesion. ``keep``: they are negative images. ``negatives.per_positive`` limits them.",
    )
    slice_axis: Literal[0, 1, 2] = Field(
        2, description="Stored axis along which slices are numbered, as ``image.slice_axis``."
    )

    @field_validator("labels")
    @classmethod
    def _known_places(cls, value: str) -> str:
        return checked_template(value, ("stem", "case", "split"))

    @field_validator("case_pattern")
    @classmethod
    def _has_group(cls, value: Optional[str]) -> Optional[str]:
        if value is not None and not compiled(value).groups:
            raise ValueError("needs a group in parentheses around the case")
        return value

    @model_validator(mode="after")
    def _values_are_one_thing(self) -> NiftiLabelsOptions:
        both = sorted(set(self.values) & set(self.ignore_values))
        if both or 0 in self.values:
            raise ValueError(
                f"{both or 0} cannot be in values" + (" and in ignore_values" if both else "; 0 is no label")
            )
        if ("{case}" in self.labels) != (self.case_pattern is not None):
            raise ValueError("give case_pattern and {case} in labels together")
        return self


@register_reader("nifti_labels", NiftiLabelsOptions)
def read_nifti_labels(options: NiftiLabelsOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read the label volume of every image volume, which must have its shape and its place."""
    items: list[Annotated] = []
    owners: dict[Path, Path] = {}
    applied = Applied(
        {
            "annotations.values": [str(value) for value in options.values],
            "annotations.ignore_values": [str(value) for value in options.ignore_values],
        }
    )
    for split, pattern in options.files.items():
        images = matching_files(root, pattern, faults)
        for image in images:
            labels = _labels_of(image, split, options, root, faults)
            if labels is None:
                continue
            if owners.setdefault(labels, image) != image:
                faults.add(labels, f"is the label volume of {owners[labels]} and of {image}; needed: one image each")
                continue
            try:
                values = _read(image, labels)
            except UmedError as error:
                faults.messages.append(str(error))
                continue
            found = set(np.unique(values).tolist())
            for value in found:
                applied.meet("annotations.values", str(value))
                applied.meet("annotations.ignore_values", str(value))
            unknown = sorted(found - {0} - set(options.values) - set(options.ignore_values))
            if unknown:
                faults.add(
                    labels,
                    f"holds the values {unknown[:10]}. Allowed: 0, {options.values}, and annotations.ignore_values",
                )
                continue
            items += _slices(image, labels, values, split, options, faults)
    applied.tell(faults)
    _tell_unused(options, root, owners, faults)
    return items


def _labels_of(image: Path, split: str, options: NiftiLabelsOptions, root: Path, faults: Faults) -> Optional[Path]:
    stem = without_ending(image.name)
    case = ""
    if options.case_pattern is not None:
        matched = re.search(options.case_pattern, stem)
        if matched is None or not matched.group(1):
            faults.add(image, f"annotations.case_pattern does not match {stem!r}")
            return None
        case = matched.group(1)
    labels = root / options.labels.format(stem=stem, case=case, split=split)
    if not labels.is_file():
        meant = did_you_mean_file(labels, root)
        faults.add(
            labels, f"no such label volume (annotations.labels).{meant} A case without a lesion needs one of zeros"
        )
        return None
    return labels


def _tell_unused(options: NiftiLabelsOptions, root: Path, owners: dict[Path, Path], faults: Faults) -> None:
    written = re.sub(r"\{(stem|case|split)\}", "*", options.labels)
    if owners and written != options.labels:
        unused = [path for path in matches(root, written) if path not in owners]
        if unused:
            faults.left_out["label volumes", "no image of annotations.files belongs to them"] += len(unused)
            faults.remark(
                root / written, f"{len(unused)} label volumes belong to no image. The first: {unused[0].name}"
            )


def _read(image: Path, labels: Path) -> np.ndarray:
    """Label values ``[x, y, z]`` as stored.

    Raises:
        UmedError: a file is damaged, image and labels differ in shape or place, or values are no whole numbers.
    """
    import nibabel

    opened: list[Any] = []
    for path in (image, labels):
        if not path.name.lower().endswith(NIFTI_ENDINGS):
            raise UmedError(
                f"{path}: is no NIfTI file; allowed: {', '.join(NIFTI_ENDINGS)}. nifti_labels takes image and labels as NIfTI "
                "on one grid. Convert a DICOM series first, with dcm2niix"
            )
        try:
            opened.append(nibabel.load(path))
        # nibabel raises errors of many kinds for damaged files.
        except Exception as error:
            raise UmedError(f"{path}: cannot be read as NIfTI: {error}") from error
    shapes = [tuple(int(side) for side in one.shape) for one in opened]
    shape = _without_ones(shapes[1])
    if len(shape) > 3:
        raise UmedError(f"{labels}: has the shape {shapes[1]}; needed: one volume of labels")
    if _without_ones(shapes[0])[:3] != shape:
        raise UmedError(
            f"{labels}: has the shape {shapes[1]}, and its image {image.name} {shapes[0]}. Labels must be on the same grid"
        )
    affines = [np.asarray(one.affine, dtype=float) for one in opened]
    if not np.allclose(affines[0], affines[1], rtol=0, atol=_SAME_PLACE):
        raise UmedError(
            f"{labels}: lies elsewhere than its image {image.name}: their affines differ by up to "
            f"{np.abs(affines[0] - affines[1]).max():.3g}. Resample the labels onto the image's grid (nibabel.processing."
            "resample_from_to, order 0)"
        )
    if 8 * int(np.prod(shape)) > _MOST_BYTES:
        raise UmedError(f"{labels}: has {int(np.prod(shape)):,} voxels, too many to label at once")
    try:
        values = np.asarray(opened[1].dataobj).reshape((*shape, 1, 1, 1)[:3])
        whole = np.rint(values)
    except Exception as error:
        raise UmedError(f"{labels}: cannot be read as NIfTI: {error}") from error
    if not np.isfinite(whole).all() or not (np.abs(values - whole) < 1e-3).all():
        raise UmedError(
            f"{labels}: holds values that are no whole numbers. Is it a label volume, and was it resampled with order 0?"
        )
    return whole.astype(np.int64)


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    sides = list(shape)
    while len(sides) > 3 and sides[-1] == 1:
        sides.pop()
    return tuple(sides)


def _slices(
    image: Path, labels: Path, values: np.ndarray, split: str, options: NiftiLabelsOptions, faults: Faults
) -> list[Annotated]:
    """One item for each slice with a lesion, and for the others if the recipe keeps them."""
    items: list[Annotated] = []
    empty = 0
    for index in range(values.shape[options.slice_axis]):
        plane = np.take(values, index, axis=options.slice_axis).T  # [row, column]: y along the second remaining axis
        item = Annotated(image, [], [], f"{labels} slice {index}", (plane.shape[1], plane.shape[0]), slice=index)
        item.split = split
        for name, layer in _layers(plane, options):
            for box, area in regions(layer):
                if area < options.min_area:
                    drop_box(item, f"regions below annotations.min_area {options.min_area}", faults)
                else:
                    item.boxes.append(box)
                    item.classes.append(name)
        is_empty = not item.boxes and not item.dropped_boxes
        empty += is_empty
        if not is_empty or options.negative_slices == "keep":
            items.append(item)
    if empty and options.negative_slices == "drop":
        faults.left_out["slices", "without a label; annotations.negative_slices"] += empty
    return items


def _layers(plane: np.ndarray, options: NiftiLabelsOptions) -> list[tuple[str, np.ndarray]]:
    present = set(np.unique(plane).tolist())
    if not options.join_values:
        return [(name, plane == value) for value, name in options.values.items() if value in present]
    classes = dict.fromkeys(options.values.values())
    return [
        (name, np.isin(plane, [value for value, of in options.values.items() if of == name]))
        for name in classes
        if any(of == name and value in present for value, of in options.values.items())
    ]
