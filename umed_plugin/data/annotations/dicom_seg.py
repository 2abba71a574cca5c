"""DICOM SEG: segments of source images; each connected region of a frame is a lesion of the image that the frame refers to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
from pydantic import Field, field_validator

from umed_plugin.data.annotations.base import Annotated, drop_box
from umed_plugin.data.annotations.effects import Applied
from umed_plugin.data.annotations.finding import (
    ImageFolders,
    add_not_fetched,
    matches,
    matching_files,
    tell_own_files,
)
from umed_plugin.data.annotations.shapes import regions
from umed_plugin.data.images.stored import unreadable
from umed_plugin.data.own_files import OwnFiles
from umed_plugin.data.recipes.options import with_text_keys
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.errors import UmedError
from umed_plugin.faults import Faults

_SEGMENTATION, _LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"
_SAME_PLACE = 1e-2  # mm of a position, and components of directions
_MOST_PIXELS = 2**30  # of all frames of one file


class DicomSegOptions(ReaderOptions):
    """DICOM segmentations. ``files`` is a pattern of SEG files, ``image_root`` the folder with their source images, which are
    found by their SOPInstanceUID. Each connected region of a segment in a frame is a lesion.
    """

    stored_frame_ = True
    yaml_example_ = """
annotations:
  reader: dicom_seg
  files: seg/*.dcm
  image_root: ct
  ignore_segments: [Liver]
"""

    segments: dict[str, str] = Field(
        {}, description="SegmentLabel, or number of a segment, and its class. Default: the SegmentLabel is the class."
    )
    ignore_segments: list[str] = Field(
        [], description="SegmentLabels or numbers of segments that are no lesion, such as organs."
    )
    threshold: float = Field(
        0.5, gt=0, le=1, description="For FRACTIONAL segmentations: the lowest fraction that belongs to the segment."
    )
    min_area: int = Field(1, ge=1, description="Regions with fewer pixels in a frame are left out as slivers.")
    negative_slices: Literal["drop", "keep"] = Field(
        "drop", description="Images of the segmented series without a lesion. ``keep``: they are negative images."
    )

    @field_validator("segments", mode="before")
    @classmethod
    def _keys_as_text(cls, value: Any) -> Any:
        return with_text_keys(value) if isinstance(value, dict) else value

    @field_validator("ignore_segments", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return [str(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class _Source:
    """One file that a frame may refer to, by its header."""

    path: Path
    uid: str
    series: str
    size: tuple[int, int]
    frames: int
    place: Optional[tuple[float, ...]]  # position, then orientation


@dataclass
class _Met:
    """What the SEG files of a split are about: several may segment one series, such as one file for each lesion.

    Attributes:
        series: UID of each segmented series -> the first file that segments it.
        marked: images with a region, of whatever file.
    """

    series: dict[str, Path] = field(default_factory=dict)
    marked: set[tuple[Path, Optional[int]]] = field(default_factory=set)


@register_reader("dicom_seg", DicomSegOptions)
def read_dicom_seg(options: DicomSegOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read every SEG file, and find the image of each of its frames."""
    items: list[Annotated] = []
    applied = Applied(
        {"annotations.segments": list(options.segments), "annotations.ignore_segments": options.ignore_segments}
    )
    for split, pattern in options.files.items():
        folders = ImageFolders(options, root, split, root, faults)
        sources: Optional[list[_Source]] = None
        met = _Met()
        for path in matching_files(root, pattern, faults):
            if sources is None:
                sources = _sources(folders.folders, faults)
            try:
                # pydicom raises an AttributeError for each tag that a file lacks.
                with unreadable(path, "a DICOM segmentation"):
                    items += _SegFile(options, path, sources, split, applied, faults).items(met)
            except UmedError as error:
                faults.messages.append(str(error))
        items += _others(options, sources or [], met, split, faults)
    applied.tell(faults)
    return items


def _sources(folders: Sequence[Path], faults: Faults) -> list[_Source]:
    """The headers of all DICOM images in the folders and below. Other files, and SEG files, are no sources."""
    from pydicom import dcmread

    tags = ["SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "Rows", "Columns", "NumberOfFrames"]
    tags += ["ImagePositionPatient", "ImageOrientationPatient"]
    found = []
    paths = []
    for folder in folders:
        own = OwnFiles(folder)
        paths += own.without(matches(folder, "**/*"))
        tell_own_files(own, folder, faults)
    # A slice that is not there would be missed as a negative image, or by its UID.
    add_not_fetched(paths, faults)
    for path in (path for path in paths if path.is_file()):
        try:
            header = dcmread(path, stop_before_pixels=True, specific_tags=tags)
            uid, size = str(header.SOPInstanceUID), (int(header.Columns), int(header.Rows))
            if str(header.get("SOPClassUID")) in (_SEGMENTATION, _LABEL_MAP):
                continue
            place = _place(header.get("ImagePositionPatient"), header.get("ImageOrientationPatient"))
            frames = int(header.get("NumberOfFrames") or 1)
        # Any file may lie there. One that a frame refers to is missed by its UID, and named.
        except Exception:  # noqa: BLE001
            continue
        found.append(_Source(path, uid, str(header.get("SeriesInstanceUID", "")), size, frames, place))
    return found


def _place(position: Any, orientation: Any) -> Optional[tuple[float, ...]]:
    if not position or not orientation:
        return None
    return tuple(float(value) for value in (*position, *orientation))


class _SegFile:
    """One SEG file, read frame by frame."""

    def __init__(
        self,
        options: DicomSegOptions,
        path: Path,
        sources: Sequence[_Source],
        split: str,
        applied: Applied,
        faults: Faults,
    ) -> None:
        self.options, self.path, self.sources, self.split = options, path, sources, split
        self.applied, self.faults = applied, faults

    def items(self, met: _Met) -> list[Annotated]:
        """One item for each source image that a frame marks; adds them to ``met``.

        Raises:
            UmedError: the file is no SEG, or is damaged.
        """
        header = self._header()
        classes = self._classes(header)
        found: dict[tuple[Path, Optional[int]], Annotated] = {}
        for number, (frame, groups) in enumerate(zip(self._frames(header), self._groups(header))):
            where = f"{self.path} frame {number + 1}"
            source, index = self._source(where, groups, frame.shape)
            if source is None:
                continue
            met.series.setdefault(source.series, self.path)
            item = found.setdefault(
                (source.path, index),
                Annotated(source.path, [], [], where, source.size, slice=index, split=self.split),
            )
            for segment, layer in self._layers(where, header, groups, frame):
                name = classes.get(segment)
                if segment not in classes:
                    self.faults.add(where, f"segment {segment} is not in the SegmentSequence")
                elif name is not None:
                    self._add(item, name, layer)
        marked = [item for item in found.values() if item.boxes or item.dropped_boxes]
        met.marked.update((item.image, item.slice) for item in marked)
        return marked

    def _header(self) -> Any:
        from pydicom import dcmread

        try:
            header = dcmread(self.path)
            kind = str(header.get("SOPClassUID"))
        except Exception as error:
            raise UmedError(f"{self.path}: cannot be read as DICOM: {error}") from error
        if kind not in (_SEGMENTATION, _LABEL_MAP):
            raise UmedError(f"{self.path}: is no DICOM segmentation (SOP class {kind}). Check annotations.files")
        return header

    def _classes(self, header: Any) -> dict[int, Optional[str]]:
        """Segment number -> class, or None if it is ignored."""
        found: dict[int, Optional[str]] = {}
        for segment in header.get("SegmentSequence") or []:
            number, label = int(segment.SegmentNumber), str(segment.get("SegmentLabel", "")).strip()
            names = (label, str(number))
            for name in names:
                self.applied.meet("annotations.segments", name)
                self.applied.meet("annotations.ignore_segments", name)
            if any(name in self.options.ignore_segments for name in names):
                found[number] = None
            else:
                found[number] = next((self.options.segments[n] for n in names if n in self.options.segments), label)
        return found

    def _frames(self, header: Any) -> np.ndarray:
        """Values ``[frame, row, column]``."""
        pixels = int(header.get("NumberOfFrames") or 1) * int(header.Rows) * int(header.Columns)
        if pixels > _MOST_PIXELS:
            raise UmedError(f"{self.path}: has {pixels:,} pixels in its frames, too many to read at once")
        try:
            values = np.asarray(header.pixel_array)
        except Exception as error:
            raise UmedError(f"{self.path}: its pixels cannot be read: {error}") from error
        return values.reshape(-1, *values.shape[-2:])

    def _groups(self, header: Any) -> list[Any]:
        """The functional groups of each frame, as a function of a sequence's name: the frame's own, else the shared one."""
        shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
        frames = list(header.get("PerFrameFunctionalGroupsSequence") or [])
        if len(frames) != int(header.get("NumberOfFrames") or 1):
            raise UmedError(
                f"{self.path}: has {len(frames)} functional groups, and NumberOfFrames {header.get('NumberOfFrames')}"
            )

        def of(frame: Any) -> Any:
            return lambda name: list(frame.get(name) or (shared.get(name) if shared is not None else None) or [])

        return [of(frame) for frame in frames]

    def _source(self, where: str, groups: Any, shape: tuple[int, ...]) -> tuple[Optional[_Source], Optional[int]]:
        """The image of a frame, and its frame index there; None after a fault."""
        references = [
            image for one in groups("DerivationImageSequence") for image in one.get("SourceImageSequence") or []
        ]
        positions, directions = groups("PlanePositionSequence"), groups("PlaneOrientationSequence")
        place = None
        if positions and directions:
            place = _place(positions[0].get("ImagePositionPatient"), directions[0].get("ImageOrientationPatient"))
        uids = sorted({str(image.ReferencedSOPInstanceUID) for image in references})
        if len(uids) > 1:
            self.faults.add(where, f"refers to {len(uids)} source images; needed: one, whose pixels it marks")
            return None, None
        if uids:
            near, named = [source for source in self.sources if source.uid == uids[0]], f"SOPInstanceUID {uids[0]}"
        else:
            near, named = [source for source in self.sources if _same(source.place, place)], "its position"
        if len({source.path for source in near}) != 1:
            names = ", ".join(str(source.path) for source in near[:3])
            self.faults.add(
                where,
                f"{len(near)} images in annotations.image_root have {named}{f': {names}' if near else ''}; needed: one",
            )
            return None, None
        source = near[0]
        if source.size != (shape[1], shape[0]):
            self.faults.add(
                where, f"is {shape[1]}x{shape[0]}, and its source {source.path.name} {source.size[0]}x{source.size[1]}"
            )
        elif source.frames == 1 and None not in (place, source.place) and not _same(source.place, place):
            self.faults.add(
                where, f"is turned or shifted against its source {source.path.name}, so its pixels are others"
            )
        elif source.frames > 1 and not (references and references[0].get("ReferencedFrameNumber")):
            self.faults.add(where, f"names no frame of its source {source.path.name}, which has {source.frames}")
        else:
            return source, self._index(references) if source.frames > 1 else None
        return None, None

    def _index(self, references: Sequence[Any]) -> int:
        number = references[0].ReferencedFrameNumber
        return int(number if isinstance(number, (int, str)) else number[0]) - 1

    def _layers(self, where: str, header: Any, groups: Any, frame: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Segment number and pixels of each segment in a frame."""
        kind = str(header.get("SegmentationType", "BINARY")).upper()
        if kind == "LABELMAP":
            return [(int(value), frame == value) for value in np.unique(frame) if value]
        named = groups("SegmentIdentificationSequence")
        if not named:
            self.faults.add(where, "names no segment (SegmentIdentificationSequence)")
            return []
        if kind == "FRACTIONAL":
            most = float(header.get("MaximumFractionalValue") or 255)
            return [(int(named[0].ReferencedSegmentNumber), frame >= self.options.threshold * most)]
        return [(int(named[0].ReferencedSegmentNumber), frame > 0)]

    def _add(self, item: Annotated, name: str, layer: np.ndarray) -> None:
        for box, area in regions(layer):
            if area < self.options.min_area:
                drop_box(item, f"regions below annotations.min_area {self.options.min_area}", self.faults)
            else:
                item.boxes.append(box)
                item.classes.append(name)


def _others(
    options: DicomSegOptions, sources: Sequence[_Source], met: _Met, split: str, faults: Faults
) -> list[Annotated]:
    """Images of the segmented series that no file marks, if they are kept; else their number is told."""
    places = [
        (source, index)
        for source in sources
        if source.series in met.series
        for index in ([None] if source.frames == 1 else range(source.frames))
        if (source.path, index) not in met.marked
    ]
    if options.negative_slices == "keep":
        return [
            Annotated(source.path, [], [], str(met.series[source.series]), source.size, slice=index, split=split)
            for source, index in places
        ]
    if places:
        faults.left_out["images", "of a segmented series, without a region; annotations.negative_slices"] += len(places)
    return []


def _same(one: Optional[tuple[float, ...]], other: Optional[tuple[float, ...]]) -> bool:
    return one is not None and other is not None and bool(np.allclose(one, other, rtol=0, atol=_SAME_PLACE))
