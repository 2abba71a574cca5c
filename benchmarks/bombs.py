"""Peak memory of `umed serve` while it takes files that claim, or unpack to, more than they should.

A real server runs in a process of its own, with a small checkpoint. "Above idle" is its peak resident memory while it takes,
opens and shows a file, less what it holds after one ordinary study. It must stay below 200 MB.

    python benchmarks/bombs.py [--help]
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode

ALLOWED_MB = 200
MB = 1 << 20


def arguments() -> argparse.Namespace:
    """Which bombs, from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", help="names of bombs (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


# Bombs. Each writes one file.


def zeros(file: Any, size: int) -> None:
    """Write so many zero bytes in pieces."""
    while size > 0:
        size -= file.write(bytes(min(size, MB)))


def written(path: Path, content: bytes) -> None:
    """Write the file."""
    path.write_bytes(content)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8, colour: int = 0) -> bytes:
    """A black PNG with more chunks between its header and its pixels."""
    samples = {0: 1, 2: 3, 6: 4}[colour]
    packer, packed = zlib.compressobj(9), []
    row = bytes(1 + width * samples * depth // 8)
    for _ in range(height):
        packed.append(packer.compress(row))
    data = b"".join(packed) + packer.flush()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *chunks, (b"IDAT", data)]
    content = b"\x89PNG\r\n\x1a\n"
    for name, value in [*parts, (b"IEND", b"")]:
        content += struct.pack(">I", len(value)) + name + value + struct.pack(">I", zlib.crc32(name + value))
    return content


def tiff(
    path: Path, width: int, height: int, strips: list[bytes], compression: int, rows: int, tiles: bool = False
) -> None:
    """A TIFF of 8 bits whose strips (or tiles) are these, in one piece of ``rows`` rows each."""
    count, data = len(strips), b"".join(strips)
    places, sizes, place = [], [], 8
    for strip in strips:
        places.append(place)
        sizes.append(len(strip))
        place += len(strip)
    lists = struct.pack(f"<{count}I", *places) + struct.pack(f"<{count}I", *sizes)
    names = (324, 325) if tiles else (273, 279)
    where = (place, place + 4 * count) if count > 1 else (places[0], sizes[0])
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
    ]
    tags += [(322, 4, 1, rows), (323, 4, 1, rows)] if tiles else [(278, 4, 1, rows)]
    tags += [(names[0], 4, count, where[0]), (names[1], 4, count, where[1])]
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags)) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", place + len(lists)) + data + lists + table)


def dicom(path: Path, pixels: bytes, syntax: str, private: int = 0, **tags: Any) -> None:
    """A DICOM file with these pixels, and so many bytes in a private element before them."""
    from pydicom import dcmwrite
    from pydicom.dataset import Dataset, FileMetaDataset

    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3", "1.2.4"
    about = {"Rows": 512, "Columns": 512, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "SamplesPerPixel": 1}
    for name, value in {**about, "PixelRepresentation": 0, "PhotometricInterpretation": "MONOCHROME2", **tags}.items():
        setattr(data, name, value)
    if private:
        data.add_new(0x00091001, "OB", bytes(private))
    data.PixelData = pixels
    data["PixelData"].VR = "OB" if data.BitsAllocated == 8 else "OW"
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = data.SOPClassUID, "1.2.3"
    if data.file_meta.TransferSyntaxUID.is_encapsulated:
        data["PixelData"].is_undefined_length = True
    dcmwrite(path, data, enforce_file_format=True)


def nifti(path: Path, shape: tuple[int, ...], kind: str) -> None:
    """A compressed volume of zeros."""
    import nibabel
    import numpy as np

    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(kind)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    with gzip.open(path, "wb", 9) as file:
        file.write(header.binaryblock + bytes(4))
        zeros(file, int(np.prod(shape)) * np.dtype(kind).itemsize)


def packed(path: Path, method: int, name: str, head: bytes, size: int, end: bytes = b"") -> None:
    """A zip of one file: a head, zeros, and an end."""
    with zipfile.ZipFile(path, "w", method) as archive, archive.open(name, "w", force_zip64=True) as file:
        file.write(head)
        zeros(file, size)
        file.write(end)


def packed_dicom(path: Path, frames: int, private: int = 0, syntax: str = "1.2.840.10008.1.2.1", **tags: Any) -> None:
    """A deflated zip of one DICOM file."""
    plain = path.with_suffix(".plain")
    pixels = tags.pop("pixels", None) or bytes(frames * 512 * 512)
    dicom(plain, pixels, syntax, private, NumberOfFrames=frames, **tags)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(plain, "a.dcm")
    plain.unlink()


def png_in_zip(path: Path, chunk: bytes, size: int) -> None:
    """A small PNG with one huge chunk of this name, in a zip."""
    value = (b"Exif\0\0" if chunk == b"eXIf" else b"Comment\0") + bytes(size)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png(64, 64, (chunk, value)))


def small_text(text: int) -> tuple[bytes, bytes]:
    """A zTXt chunk of so many zeros."""
    return b"zTXt", b"Comment\0\0" + zlib.compress(bytes(text), 9)


def international(text: int) -> tuple[bytes, bytes]:
    """An iTXt chunk of so many zeros."""
    return b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(text), 9)


def profile(text: int) -> tuple[bytes, bytes]:
    """An iCCP chunk of so many zeros."""
    return b"iCCP", b"p\0\0" + zlib.compress(bytes(text), 9)


def gif(path: Path) -> None:
    """A GIF with a screen of 65,535 x 65,535 pixels and one small frame."""
    from PIL import Image

    small = io.BytesIO()
    Image.new("P", (4, 4)).save(small, "GIF")
    content = bytearray(small.getvalue())
    content[6:10] = struct.pack("<HH", 65535, 65535)
    path.write_bytes(bytes(content))


def webp(path: Path) -> None:
    """A WebP picture of 16,000 x 5,000 pixels."""
    from PIL import Image

    Image.new("RGB", (16000, 5000)).save(path, "WEBP", lossless=True)


def jpeg2000_dicom(path: Path) -> None:
    """A DICOM of 512 x 512 whose JPEG 2000 stream holds 9,000 x 9,000 pixels."""
    from PIL import Image
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless

    stream = io.BytesIO()
    Image.new("L", (9000, 9000)).save(stream, "JPEG2000")
    dicom(path, encapsulate([stream.getvalue()]), JPEG2000Lossless)


def jpeg_ls_dicom(path: Path) -> None:
    """A DICOM of 9,000 x 9,000 pixels with a JPEG-LS stream that says so and holds nothing."""
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGLSLossless

    frame = b"\xff\xd8\xff\xf7" + struct.pack(">HBHHBBBB", 11, 8, 9000, 9000, 1, 1, 0x11, 0)
    frame += b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 0, 0, 0) + bytes(1000) + b"\xff\xd9"
    dicom(path, encapsulate([frame]), JPEGLSLossless, Rows=9000, Columns=9000)


def rle_dicom(path: Path, rows: int, columns: int) -> None:
    """An RLE frame of runs of zeros, of this size."""
    from pydicom.encaps import encapsulate
    from pydicom.uid import RLELossless

    runs = b"\x81\x00" * (rows * columns // 128 + 1)
    frame = struct.pack("<16I", 1, 64, *[0] * 14) + runs + (b"\0" if len(runs) % 2 else b"")
    dicom(path, encapsulate([frame]), RLELossless, Rows=rows, Columns=columns)


def grouped_dicom(path: Path) -> None:
    """A DICOM whose header holds 400,000 items."""
    from pydicom.uid import ExplicitVRLittleEndian

    dicom(path, bytes(512 * 512), ExplicitVRLittleEndian)
    content = path.read_bytes()
    item = b"\xfe\xff\x00\xe0" + struct.pack("<I", 8 + 2) + b"\x08\x00\x00\x01SH\x02\x00ab"
    group = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + item * 400_000 + b"\xfe\xff\xdd\xe0\0\0\0\0"
    place = content.index(b"\x20\x00\x0e\x00UI")
    path.write_bytes(content[:place] + group + content[place:])


def million_folders(path: Path) -> None:
    """A zip of a million folders."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(1_000_000):
            archive.writestr(zipfile.ZipInfo(f"{number}/"), b"")


def one_strip(path: Path, side: int) -> None:
    """A deflated TIFF in one strip."""
    tiff(path, side, side, [zlib.compress(bytes(side * side), 9)], 8, side)


def lzw_strips(path: Path) -> None:
    """An LZW TIFF of 13,350 x 13,350 pixels (178 megapixels) in one strip."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    Image.new("L", (13350, 13350)).save(path, compression="tiff_lzw")


def many_tiles(path: Path) -> None:
    """A TIFF of a million tiles of 16 x 16 pixels, 256 megapixels in all."""
    tiff(path, 16000, 16000, [zlib.compress(bytes(256), 9)] * 1_000_000, 8, 16, tiles=True)


def many_pages(path: Path) -> None:
    """A TIFF of 20,000 pages of 64 x 64 pixels."""
    strip = zlib.compress(bytes(64 * 64), 9)
    content, place = b"", 8 + len(strip)
    tags = [(256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (273, 8), (277, 1), (278, 64), (279, len(strip))]
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    for number in range(20_000):
        following = place + (number + 1) * (len(table) + 4)
        content += table + struct.pack("<I", following if number < 19_999 else 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", place) + strip + content)


_PNG = b"\x89PNG\r\n\x1a\n"
_NATIVE, _DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
BOMBS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "zip, bzip2: 1.5 GB": ("a.zip", lambda path: packed(path, zipfile.ZIP_BZIP2, "a.png", _PNG, 1500 * MB)),
    "zip, LZMA: 1.5 GB": ("a.zip", lambda path: packed(path, zipfile.ZIP_LZMA, "a.png", _PNG, 1500 * MB)),
    "zip, deflate: 1.5 GB": ("a.zip", lambda path: packed(path, zipfile.ZIP_DEFLATED, "a.png", _PNG, 1500 * MB)),
    "zip of a million folders": ("a.zip", million_folders),
    "DICOM, deflated: 1 GB in a private element": (
        "a.dcm",
        lambda path: dicom(path, bytes(512 * 512), _DEFLATED, 1000 * MB),
    ),
    "DICOM, deflated: 60 MB in a private element": (
        "a.dcm",
        lambda path: dicom(path, bytes(512 * 512), _DEFLATED, 60 * MB),
    ),
    "DICOM in a zip: 900 MB in a private element": ("a.zip", lambda path: packed_dicom(path, 1, 900 * MB)),
    "DICOM in a zip: 3,600 frames, 900 MB": ("a.zip", lambda path: packed_dicom(path, 3600)),
    "DICOM, deflated: 3,600 frames, 900 MB": (
        "a.dcm",
        lambda path: dicom(path, bytes(3600 << 18), _DEFLATED, NumberOfFrames=3600),
    ),
    "DICOM of 400,000 items in its header": ("a.dcm", grouped_dicom),
    "DICOM, JPEG 2000 of 81 megapixels, header says 512 x 512": ("a.dcm", jpeg2000_dicom),
    "DICOM, JPEG-LS of 81 megapixels": ("a.dcm", jpeg_ls_dicom),
    "DICOM, RLE: 81 megapixels": ("a.dcm", lambda path: rle_dicom(path, 9000, 9000)),
    "DICOM, 16 bits, deflated: 16 megapixels": (
        "a.dcm",
        lambda path: dicom(
            path, bytes(32 * 10**6), _DEFLATED, Rows=4000, Columns=4000, BitsAllocated=16, BitsStored=12, HighBit=11
        ),
    ),
    "NIfTI, 9,000 x 9,000 x 1 of float64": ("a.nii.gz", lambda path: nifti(path, (9000, 9000, 1), "float64")),
    "NIfTI, 512 x 512 x 1,900 of int16": ("a.nii.gz", lambda path: nifti(path, (512, 512, 1900), "int16")),
    "NIfTI, 64 x 64 x 10 x 12,000": ("a.nii.gz", lambda path: nifti(path, (64, 64, 10, 12000), "int16")),
    "TIFF, LZW: 178 megapixels": ("a.tif", lzw_strips),
    "TIFF, deflate, one strip: 178 megapixels": ("a.tif", lambda path: one_strip(path, 13350)),
    "TIFF, a million tiles": ("a.tif", many_tiles),
    "TIFF of 20,000 pages": ("a.tif", many_pages),
    "PNG, 90 megapixels of 8 bits RGBA": ("a.png", lambda path: written(path, png(9500, 9500, colour=6))),
    "PNG, 16 megapixels of 8 bits RGBA": ("a.png", lambda path: written(path, png(4000, 4000, colour=6))),
    "PNG, 16 megapixels of 16 bits": ("a.png", lambda path: written(path, png(4000, 4000, depth=16))),
    "PNG with a zTXt chunk of 1 GB": (
        "a.png",
        lambda path: written(path, png(64, 64, small_text(1 << 30))) and None,
    ),
    "PNG with an iTXt chunk of 1 GB": (
        "a.png",
        lambda path: written(path, png(64, 64, international(1 << 30))) and None,
    ),
    "PNG with a colour profile of 1 GB": (
        "a.png",
        lambda path: written(path, png(64, 64, profile(1 << 30))) and None,
    ),
    "PNG in a zip: EXIF of 900 MB": ("a.zip", lambda path: png_in_zip(path, b"eXIf", 900 * MB)),
    "PNG in a zip: text of 900 MB": ("a.zip", lambda path: png_in_zip(path, b"tEXt", 900 * MB)),
    "PNG in a zip: unknown chunk of 900 MB": ("a.zip", lambda path: png_in_zip(path, b"abCd", 900 * MB)),
    "GIF of 65,535 x 65,535 named .png": ("a.png", gif),
    "WebP of 80 megapixels named .png": ("a.png", webp),
}


# The server.


@contextmanager
def served(checkpoint: Path, folder: Path) -> Iterator[Any]:
    """A running `umed serve`: its process and its address."""
    command = [
        sys.executable,
        "-m",
        "umed_plugin.cli",
        "serve",
        str(checkpoint),
        "--port",
        "0",
        "--max-new-tokens",
        "8",
    ]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    process: Any = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        for line in process.stdout:
            found = re.search(r"http://([\d.]+):(\d+)/", line)
            if found:
                process.address = (found[1], int(found[2]))
                break
        yield process
    finally:
        process.terminate()  # a shell's background job would ignore SIGINT
        process.wait(30)


def asked(
    server: Any, method: str, path: str, body: bytes | BinaryIO = b"", size: int | None = None
) -> tuple[int, bytes]:
    """Status and content of one request."""
    connection = http.client.HTTPConnection(*server.address, timeout=300)
    headers = {"Content-Length": str(size)} if size is not None else {}
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    status, content = reply.status, reply.read()
    connection.close()
    return status, content


def shown(server: Any, file: Path, name: str) -> str:
    """Upload a file as the page does, show its first and its last plane, and say what came of it."""
    study = json.loads(asked(server, "POST", "/studies")[1])["study"]
    try:
        with file.open("rb") as stream:
            status, content = asked(
                server, "PUT", f"/studies/{study}/files?name={quote(name)}", stream, file.stat().st_size
            )
        if status == 200:
            status, content = asked(server, "POST", f"/studies/{study}/open")
        if status != 200:
            return f"{status}: {json.loads(content)['error']}"
        return _pictures(server, study, json.loads(content)["items"][0])
    finally:
        asked(server, "POST", f"/studies/{study}/forget")


def _pictures(server: Any, study: str, item: dict[str, Any]) -> str:
    said = ""
    for plane in (item["planes"][0], item["planes"][-1]):
        for number in (0, plane["slices"] - 1):
            view = {"item": 0, "axis": plane["axis"], "slice": number, "volume": item["volumes"] - 1}
            window = (item["windows"] or ["file"])[-1]
            status, content = asked(server, "GET", f"/studies/{study}/picture?{urlencode({**view, 'window': window})}")
            said = f"shown, {plane['slices']} slices" if status == 200 else f"{status}: {json.loads(content)['error']}"
    return said


def memory(process: Any, name: str) -> int:
    """A memory figure of a process in bytes: ``VmRSS`` now, ``VmHWM`` its peak."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def measured(server: Any, idle: int, name: str, folder: Path) -> dict[str, Any]:
    """One bomb: its size, the server's peak above idle, seconds, and the result."""
    file_name, write = BOMBS[name]
    file = folder / file_name
    made = os.fork()  # what makes a bomb takes memory too
    if not made:
        write(file)
        os._exit(0)
    if os.waitpid(made, 0)[1]:
        raise SystemExit(f"{name}: could not be made")
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # the peak begins anew
    begin = time.perf_counter()
    said = shown(server, file, file_name)
    took = time.perf_counter() - begin
    size = file.stat().st_size
    file.unlink()
    return {
        "bomb": name,
        "bytes": size,
        "above_idle_mb": (memory(server, "VmHWM") - idle) / MB,
        "seconds": took,
        "result": said,
    }


def main() -> int:
    """Print one line for each bomb."""
    given = arguments()
    unknown = set(given.only or ()) - set(BOMBS)
    if unknown:
        raise SystemExit(f"No such bombs: {', '.join(sorted(unknown))}. Allowed: {'; '.join(BOMBS)}")
    from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint
    from umed_plugin.patches import prepare_llava

    prepare_llava()
    figures = []
    with tempfile.TemporaryDirectory(prefix="umed-bombs-") as temporary:
        folder = Path(temporary)
        with served(make_checkpoint(folder / "llava-mistral"), folder) as server:
            ordinary = folder / "ordinary.dcm"
            dicom(ordinary, bytes(512 * 512), _NATIVE)
            print(f"ordinary study: {shown(server, ordinary, 'ordinary.dcm')}")
            idle = memory(server, "VmRSS")
            print(
                f"idle: {idle / MB:.0f} MB\n\n| bomb | size | peak above idle | seconds | result |\n"
                "| --- | --- | --- | --- | --- |"
            )
            for name in given.only or BOMBS:
                figures.append(measured(server, idle, name, folder))
                print(
                    "| {bomb} | {bytes:,} | {above_idle_mb:.0f} MB | {seconds:.1f} | {result} |".format(**figures[-1]),
                    flush=True,
                )
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))
    too_much = [each["bomb"] for each in figures if each["above_idle_mb"] > ALLOWED_MB]
    print(f"\nabove {ALLOWED_MB} MB: {'; '.join(too_much) or 'none'}")
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
