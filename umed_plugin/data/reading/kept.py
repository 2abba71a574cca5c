"""Keep what was seen of images in a file, so that the next build reads only what has changed.

One line for each image: a checksum, then JSON with a digest of what was asked (path, slice, window and the like, evaluation sets,
version of the readers), the state of the files (size and time), and what was seen. A line that is damaged, or of another version,
is not used, and the image is read again. The file may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, Optional

from umed_plugin import files
from umed_plugin.data.images import READERS, Remark
from umed_plugin.data.own_files import CHECKED
from umed_plugin.data.reading.looks import Dated, Request, Seen, rendered_state, state_of_all
from umed_plugin.data.shards import Shard
from umed_plugin.errors import warn
from umed_plugin.files import parse_json
from umed_plugin.grounding.geometry import Orientation

# Raise it whenever other images are refused, or a PNG is written differently; READERS changes with the pixels.
_FORMAT = "looks-2"


class KeptLooks:
    """What earlier builds saw, and what this one sees; used in a ``with`` block.

    Args:
        folder: of the files ``.umed_checked*.jsonl``; all of them are read.
        evaluated: digest of the evaluation sets with which images are compared.
        shard: writes a file of its own, which `tidy` of a later build joins with the others.
    """

    def __init__(self, folder: Path, evaluated: str, shard: Optional[Shard] = None) -> None:
        self._folder, self._evaluated = folder, evaluated
        self.path = folder / f"{CHECKED}{f'.{shard.file_part}' if shard else ''}.jsonl"
        self._main = folder / f"{CHECKED}.jsonl"
        self._lines: dict[str, bytes] = {}
        self._written: Any = None
        self._cannot_write = False
        self._superseded = 0
        self._files = sorted(folder.glob(f"{CHECKED}*.jsonl")) if folder.is_dir() else []
        for file in self._files:
            self._read(file)

    def __enter__(self) -> KeptLooks:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._written is not None:
            self._written.close()
            self._written = None

    def _read(self, file: Path) -> None:
        try:
            lines = file.read_bytes().split(b"\n")
        except OSError:
            return
        for line in filter(None, lines):
            key = _key_of(line)
            self._superseded += key is None or key in self._lines
            if key is not None:
                self._lines[key] = line

    def find(self, request: Request) -> Optional[Seen]:
        """What was seen of an image whose files, and whose rendered image, have not changed since; else None."""
        line = self._lines.get(self._key(request))
        if line is None:
            return None
        try:
            fields = parse_json(line[9:])
            seen = _seen(fields["seen"])
        except (ValueError, LookupError, TypeError):
            return None
        if fields["state"] != state_of_all(request):
            return None
        return None if seen.rendered and fields["rendered"] != rendered_state(request, seen) else seen

    def add(self, request: Request, dated: Dated) -> None:
        """Keep what was seen. What may change unnoticed, and an image that cannot be read, is looked at again next time."""
        if dated.state is None or dated.seen.fault is not None:
            return
        key = self._key(request)
        fields = {
            "key": key,
            "path": request.path,
            "state": dated.state,
            "rendered": rendered_state(request, dated.seen) if dated.seen.rendered else None,
            "seen": _plain(dated.seen),
        }
        text = json.dumps(fields, separators=(",", ":")).encode()
        line = b"%08x %s" % (zlib.crc32(text), text)
        self._superseded += key in self._lines
        self._lines[key] = line
        self._write(line)

    def _write(self, line: bytes) -> None:
        if self._cannot_write:
            return
        try:
            if self._written is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                # Unbuffered: a line is one write, so it is in the file whatever happens to this process.
                self._written = self.path.open("ab", buffering=0)
                # A killed build may have left half a line.
                line = b"\n" + line
            self._written.write(line + b"\n")
        except OSError as error:
            self._cannot_write = True
            warn(
                f"{self.path}: cannot be written ({error.strerror}). Records are built all the same; the next build reads every "
                "image again."
            )

    def tidy(self) -> None:
        """Join the files of shards into one, and leave out lines that are damaged, foreign or superseded."""
        others = [file for file in self._files if file != self._main]
        if self._cannot_write or not (others or self._superseded):
            return
        try:
            files.write_bytes(self._main, b"".join(line + b"\n" for line in self._lines.values()), durable=False)
            for file in others:
                file.unlink(missing_ok=True)
        except OSError:
            return  # what was kept is still there

    def _key(self, request: Request) -> str:
        asked = [
            request.path,
            request.slice,
            request.reading,
            request.no_window,
            request.rendered if request.out_dir is not None else None,
            self._evaluated,
            [_FORMAT, READERS],
        ]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def _key_of(line: bytes) -> Optional[str]:
    """The key of a whole line of ours; None for any other."""
    checksum, _, text = line.partition(b" ")
    try:
        if len(checksum) != 8 or int(checksum, 16) != zlib.crc32(text):
            return None
        return str(json.loads(text)["key"])
    except (ValueError, LookupError, TypeError):
        return None


def _plain(seen: Seen) -> list[Any]:
    # `rendered` stays the last: `umed_plugin.data.own_files` finds it there.
    turned = seen.orientation
    return [
        seen.by_llava,
        [turned.width, turned.height, turned.transpose, turned.flip_x, turned.flip_y, turned.square_size],
        seen.exif,
        seen.is_grey_levels,
        [[remark.kind, remark.detail] for remark in seen.remarks],
        seen.burned_in,
        seen.evaluated,
        seen.rendered,
    ]


def _seen(plain: list[Any]) -> Seen:
    by_llava, turned, exif, is_grey_levels, remarks, burned_in, evaluated, rendered = plain
    width, height, transpose, flip_x, flip_y, square = turned
    return Seen(
        by_llava=by_llava,
        orientation=Orientation(width, height, transpose, flip_x, flip_y, square and (square[0], square[1])),
        exif=exif,
        is_grey_levels=is_grey_levels,
        remarks=tuple(Remark(*remark) for remark in remarks),
        burned_in=burned_in,
        evaluated=evaluated,
        rendered=rendered,
    )
