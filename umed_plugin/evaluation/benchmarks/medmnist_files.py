"""MedMNIST's files: which sets there are, and which file of a set is read.

Taken over from the authors' package (MedMNIST/MedMNIST at 805b742, version 3.0.2: ``info.py``, ``dataset.py``, README): names of
sets and classes, numbers of images, ``<set>.npz`` for 28 pixels and ``<set>_64``, ``_128``, ``_224``. All sizes of a set hold the
same images in the same order. Class names differ from theirs where a model should be able to say them: lower case, "left femur"
for "femur-left", "pleural thickening" for "pleural", "normal retina" for "normal", "normal or benign" for "normal, benign",
immature granulocytes without their three kinds, and the grades 0 to 4 of RetinaMNIST in words.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.data.places import check_fetched
from umed_plugin.errors import UmedError, warn
from umed_plugin.evaluation.benchmarks.benchmark import check_whole

SIZES = (28, 64, 128, 224)
SPLITS = ("train", "val", "test")
_OF_VOLUMES = ("organmnist3d", "nodulemnist3d", "adrenalmnist3d", "fracturemnist3d", "vesselmnist3d", "synapsemnist3d")
_ORGANS = (
    ("bladder", "left femur", "right femur", "heart", "left kidney", "right kidney")
    + ("liver", "left lung", "right lung", "pancreas", "spleen")
)  # fmt: skip


@dataclass(frozen=True)
class MnistSet:
    """One set.

    Attributes:
        what: its images are, in words.
        classes: names in the order of the labels.
        counts: images of `SPLITS`.
        several: an image may have several of the labels.
    """

    what: str
    classes: tuple[str, ...]
    counts: tuple[int, int, int]
    several: bool = False


SETS = {
    "pathmnist": MnistSet(
        "colon pathology slide",
        ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa")
        + ("cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
        (89_996, 10_004, 7_180),
    ),
    "chestmnist": MnistSet(
        "chest X-ray",
        ("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax")
        + ("consolidation", "edema", "emphysema", "fibrosis", "pleural thickening", "hernia"),
        (78_468, 11_219, 22_433),
        several=True,
    ),
    "dermamnist": MnistSet(
        "dermatoscopic image",
        ("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions")
        + ("dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions"),
        (7_007, 1_003, 2_005),
    ),
    "octmnist": MnistSet(
        "retinal OCT image",
        ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal retina"),
        (97_477, 10_832, 1_000),
    ),
    "pneumoniamnist": MnistSet("chest X-ray", ("normal", "pneumonia"), (4_708, 524, 624)),
    "retinamnist": MnistSet(
        "fundus photograph",
        ("no diabetic retinopathy", "mild diabetic retinopathy", "moderate diabetic retinopathy")
        + ("severe diabetic retinopathy", "proliferative diabetic retinopathy"),
        (1_080, 120, 400),
    ),
    "breastmnist": MnistSet("breast ultrasound image", ("malignant", "normal or benign"), (546, 78, 156)),
    "bloodmnist": MnistSet(
        "blood cell microscope image",
        ("basophil", "eosinophil", "erythroblast", "immature granulocytes", "lymphocyte", "monocyte", "neutrophil")
        + ("platelet",),
        (11_959, 1_712, 3_421),
    ),
    "tissuemnist": MnistSet(
        "kidney cortex microscope image",
        ("collecting duct, connecting tubule", "distal convoluted tubule", "glomerular endothelial cells")
        + ("interstitial endothelial cells", "leukocytes", "podocytes", "proximal tubule segments")
        + ("thick ascending limb",),
        (165_466, 23_640, 47_280),
    ),
    "organamnist": MnistSet("abdominal CT, axial", _ORGANS, (34_561, 6_491, 17_778)),
    "organcmnist": MnistSet("abdominal CT, coronal", _ORGANS, (12_975, 2_392, 8_216)),
    "organsmnist": MnistSet("abdominal CT, sagittal", _ORGANS, (13_932, 2_452, 8_827)),
}


def files_of_sets(root: Path) -> dict[str, Path]:
    """The file of each set that is there, in the order of `SETS`: the largest size.

    Raises:
        UmedError: there is none, or one is a link to a file that is not there.
    """
    found: dict[str, Path] = {}
    for name in SETS:
        there = {size: root / f"{name}{'' if size == SIZES[0] else f'_{size}'}.npz" for size in SIZES}
        for file in there.values():
            check_fetched(file)
        sizes = [size for size, file in there.items() if file.is_file()]
        if sizes:
            found[name] = there[max(sizes)]
        if len(sizes) > 1:
            warn(f"medmnist: {name} is there in {len(sizes)} sizes; {found[name].name} is asked, the largest.")
    if found:
        return found
    volumes = sorted({file.name for name in _OF_VOLUMES for file in root.glob(f"{name}*.npz")})
    raise UmedError(
        f"{root}: holds none of {', '.join(f'{name}.npz' for name in SETS)}, with _64, _128 or _224 behind the name for larger "
        f"images; medmnist needs one of them. Is it the right --data-root?"
        + (f" {', '.join(volumes)}: volumes are not asked, since LLaVA sees one image." if volumes else "")
    )


def labels_of(file: Path, name: str, split: str) -> Any:
    """The labels [n, L] of a split; L is 1, or the number of classes where an image may have several.

    The images are looked at by their header alone, since those of a set of 224 pixels are gigabytes.

    Raises:
        UmedError: the file is not whole, or not MedMNIST's.
    """
    import numpy as np

    check_whole(file)
    try:
        with np.load(file) as arrays:
            missing = [key for key in (f"{split}_images", f"{split}_labels") if key not in arrays]
            if missing:
                raise UmedError(
                    f"{file}: has no {', '.join(missing)}; it has {', '.join(arrays)}. Is it MedMNIST's file?"
                )
            labels = arrays[f"{split}_labels"]
        shape, kind = _header(file, f"{split}_images")
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UmedError(
            f"{file}: cannot be read ({error}). Was the download cut off? Get it again; medmnist.com has its MD5."
        ) from error
    if kind != "uint8" or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
        raise UmedError(
            f"{file}: {split}_images are {kind} {shape}; MedMNIST's are uint8 [n, height, width] or [n, height, width, 3]."
        )
    known = SETS[name]
    wide = labels.shape[1] if labels.ndim == 2 else 1
    if labels.ndim not in (1, 2) or wide != (len(known.classes) if known.several else 1) or len(labels) != shape[0]:
        raise UmedError(
            f"{file}: labels {labels.shape} of {shape[0]} images do not fit {name}, which has {len(known.classes)} classes."
        )
    published = dict(zip(SPLITS, known.counts))[split]
    if len(labels) != published:
        warn(
            f"medmnist: {file.name} has {len(labels)} {split} images, and the published file has {published}: the figures are "
            "not comparable with printed ones."
        )
    return labels.reshape(len(labels), -1)


def _header(file: Path, key: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of an array in an ``npz``, without reading it."""
    from numpy.lib import format as npy

    with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as stream:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, kind = read(stream)
    return tuple(shape), str(kind)
