"""Made-up files laid out as the five downloads of MAU are once they are unpacked, with the quirks of each.

Every picture is dark and uneven, with a bright patch that fills each of its boxes.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

DL_HEADER = (
    "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,Bounding_boxes,"
    "Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,Possibly_noisy,Slice_range,Spacing_mm_px_,"
    "Image_size,DICOM_windows,Patient_gender,Patient_age,Train_Val_Test\n"
)


def dl_row(name: str, box: str, kind: int, window: str = "-175, 275", noisy: int = 0) -> str:
    return (
        f'{name},{int(name[:6])},1,1,{int(name[-7:-4])},"1, 2","{box}","3, 4","0.1, 0.2, 0.3",{kind},{noisy},"1, 9",'
        f'"0.7, 0.7, 5","512, 512","{window}",F,50,3\n'
    )


def uneven(height: int, width: int, seed: int) -> np.ndarray:
    """Grey levels 20-120 ``[height, width]`` that are another picture for each seed."""
    from scipy.ndimage import zoom

    coarse = np.random.default_rng(seed).uniform(20, 120, (12, 12))
    return zoom(coarse, (height / 12, width / 12), order=1).clip(20, 120)


TBX_NAMES = ("ActiveTuberculosis", "ObsoletePulmonaryTuberculosis", "PulmonaryTuberculosis")


def write_tbx11k(root: Path, more: int = 0) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    """Image -> (class, box in 512 x 512). JSON in pixels of 512, XML in those of the original, as the archive has them.

    Args:
        more: so many further images with a lesion, and of healthy people.
    """
    boxes = {
        "tb/tb0003.png": [("ActiveTuberculosis", (51.2, 100.0, 153.6, 260.0))],
        "tb/tb0004.png": [
            ("ObsoletePulmonaryTuberculosis", (300.0, 40.0, 360.0, 100.0)),
            ("ActiveTuberculosis", (10.0, 20.0, 200.0, 300.0)),
        ],
        "tb/tb1199.png": [],
        "health/h0001.png": [],
        "sick/s0001.png": [],
        "health/h0002.png": [],
        **{f"tb/tb{i:04}.png": [("ActiveTuberculosis", (60.0 + i, 90.0, 170.0, 200.0))] for i in range(10, 10 + more)},
        **{f"health/h{i:04}.png": [] for i in range(10, 10 + more)},
    }
    original = (2048, 2560)
    (root / "annotations" / "json").mkdir(parents=True)
    (root / "annotations" / "xml").mkdir()
    for split, names in (("train", list(boxes)[:4]), ("val", list(boxes)[4:])):
        images = [{"id": i, "file_name": name, "width": 512, "height": 512} for i, name in enumerate(names)]
        found = [
            {
                "image_id": i,
                "category_id": TBX_NAMES.index(label) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "iscrowd": 0,
            }
            for i, name in enumerate(names)
            for label, (x1, y1, x2, y2) in boxes[name]
        ]
        categories = [{"id": i + 1, "name": name, "supercategory": "Tuberculosis"} for i, name in enumerate(TBX_NAMES)]
        content = {"images": images, "annotations": [{"id": i, **one} for i, one in enumerate(found)]}
        (root / "annotations" / "json" / f"TBX11K_{split}.json").write_text(
            json.dumps({**content, "categories": categories, "info": {}, "licenses": []})
        )
    for name, found_boxes in boxes.items():
        path = root / "imgs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = uneven(512, 512, zlib.crc32(name.encode())).astype(np.uint8)
        objects = ""
        for label, (x1, y1, x2, y2) in found_boxes:
            pixels[round(y1) : round(y2), round(x1) : round(x2)] = 220
            corners = zip(("xmin", "ymin", "xmax", "ymax"), (x1 * 4, y1 * 5, x2 * 4, y2 * 5))
            numbers = "".join(f"<{key}>{value:.0f}</{key}>" for key, value in corners)
            objects += f"<object><name>{label}</name><bndbox>{numbers}</bndbox></object>"
        Image.fromarray(pixels).save(path)
        size = f"<size><width>{original[0]}</width><height>{original[1]}</height></size>"
        (root / "annotations" / "xml" / f"{path.stem}.xml").write_text(
            f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"
        )
    return boxes


def write_kidney_stones(root: Path, stems: int = 60) -> None:
    """Copies of one slice, which Roboflow tells apart by what follows `.rf.`, stand in several of its splits."""
    (root / "data.yaml").parent.mkdir(parents=True, exist_ok=True)
    (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['Tas_Var']\n")
    for folder in ("train", "valid", "test"):
        for kind in ("images", "labels"):
            (root / folder / kind).mkdir(parents=True)
    for stem in range(stems):
        for copy, folder in (("ab1", "train"), ("cd2", "train"), ("ef3", ("train", "valid", "test")[stem % 3])):
            name = f"1-3-46-670589-33-1-{stem:03}_png_jpg.rf.{copy}{stem}"
            left, top = 40 + 4 * stem, 30 + 3 * stem
            pixels = uneven(320, 391, 30_000 + stem).astype(np.uint8)
            pixels[top : top + 9, left : left + 11] = 250
            Image.fromarray(pixels).convert("RGB").save(root / folder / "images" / f"{name}.jpg", quality=95)
            numbers = ((left + 5.5) / 391, (top + 4.5) / 320, 11 / 391, 9 / 320)
            (root / folder / "labels" / f"{name}.txt").write_text("0 " + " ".join(f"{one:.7f}" for one in numbers))


def write_deeplesion(root: Path, patients: int = 30) -> None:
    """Two slices a patient, two lesions on the second; every tenth patient is of the unknown type."""
    rows = []
    for patient in range(1, patients + 1):
        for number in (11, 12):
            name = f"{patient:06}_01_01_{number:03}.png"
            units = uneven(512, 512, patient * 100 + number) * 3 - 200
            boxes = [(100 + patient, 150, 160 + patient, 190), (300, 220, 340.5, 260.25)][: number - 10]
            for x1, y1, x2, y2 in boxes:
                units[round(y1) : round(y2), round(x1) : round(x2)] = 260
                kind = -1 if patient % 10 == 0 else 1 + patient % 8
                rows.append(dl_row(name, f"{x1}, {y1}, {x2}, {y2}", kind))
            target = root / "Images_png" / name[:12] / name[13:]
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((units + 32768).astype(np.uint16)).save(target, compress_level=1)
    (root / "DL_info.csv").write_text(DL_HEADER + "".join(rows))


NIH_CLASSES = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltrate", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
)


def write_nih(root: Path, positives: int = 16, negatives: int = 24) -> None:
    """Images of patients in two of the twelve folders; `Infiltrate` in one table is `Infiltration` in the other."""
    boxes = ["Image Index,Finding Label,Bbox [x,y,w,h],,,"]
    entries = ["Image Index,Finding Labels,Follow-up #,Patient ID"]
    for number in range(positives + negatives):
        name = f"{number + 1:08}_{number % 4:03}.png"
        pixels = uneven(1024, 1024, 10_000 + number)
        label = NIH_CLASSES[number % 8]
        if number < positives:
            pixels[400 : 400 + 200, 300 : 300 + 150] = 230
            boxes.append(f"{name},{label},300.0,400.0,150.0,200.0")
        found = label.replace("Infiltrate", "Infiltration") if number < positives else "No Finding"
        entries.append(f"{name},{found},0,{number + 1}")
        target = root / f"images_{1 + number % 2:03}" / "images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(target, compress_level=1)
    (root / "BBox_List_2017.csv").write_text("\n".join(boxes) + "\n")
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join(entries) + "\n")


def write_kvasir(root: Path, count: int = 20) -> None:
    """Frames of varying size with their boxes, some with a sliver at the border, and grey JPEG masks."""
    entries = {}
    for number in range(count):
        width, height = 620 + number, 530 + 2 * number
        polyps = [(120, 100 + number, 300, 260 + number)]
        if number % 5 == 0:
            polyps.append((width - 3, 150, width, 285))
        pixels = np.stack([uneven(height, width, 20_000 + number)] * 3, axis=2) * (1.4, 0.7, 0.6)
        mask = np.full((height, width), 3, np.uint8)
        for x1, y1, x2, y2 in polyps:
            pixels[y1:y2, x1:x2] = (250, 120, 110)
            mask[y1:y2, x1:x2] = 252
        stem = f"cju{number:02}qkwl35piu0993l0dewei2"
        for folder, values in (("images", pixels.astype(np.uint8)), ("masks", mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / folder / f"{stem}.jpg", quality=90)
        keys = ("xmin", "ymin", "xmax", "ymax")
        boxes = [{"label": "polyp", **dict(zip(keys, box))} for box in polyps]
        entries[stem] = {"height": height, "width": width, "bbox": boxes}
    (root / "kavsir_bboxes.json").write_text(json.dumps(entries))


def write_sources(root: Path) -> None:
    """All five, in the folders that `mau` names."""
    write_deeplesion(root / "DeepLesion")
    write_kidney_stones(root / "KidneyStone", stems=12)
    write_nih(root / "NIH")
    write_tbx11k(root / "TBX11K", more=10)
    write_kvasir(root / "Kvasir-SEG")
