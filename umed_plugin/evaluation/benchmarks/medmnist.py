"""MedMNIST v2: classification by the likelihood of class names, with MedMNIST's AUC and ACC.

Yang et al. (Scientific Data 2023). ``<set>.npz`` or ``<set>_224.npz`` with ``{train,val,test}_images`` [n, h, w(, 3)] uint8
and ``_labels`` [n, classes or 1]. A model that writes text gives no class scores: it is asked what the image shows, and each
class name's likelihood as the answer is its score (`umed_plugin.evaluation.metrics.classification.likelihoods`). Class names
are those of MedMNIST's own list, in lower case and with the grades of RetinaMNIST in words.

A set with several labels an image (ChestMNIST) is asked one yes-or-no question for each label, all about one image. Images are
written as PNG, losslessly, and go through the loader that training uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from umed_plugin import files
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, Question
from umed_plugin.evaluation.metrics.classification import auc, likelihoods, macro_auc
from umed_plugin.evaluation.metrics.figures import Columns, Figure, Row, Statistic, mean
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

_ORGANS = (
    ("bladder", "left femur", "right femur", "heart", "left kidney", "right kidney")
    + ("liver", "left lung", "right lung", "pancreas", "spleen")
)  # fmt: skip
# Set -> (what its images are, class names in the order of its labels).
SETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pathmnist": (
        "colon pathology slide",
        ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa")
        + ("cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
    ),
    "chestmnist": (
        "chest X-ray",
        ("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax")
        + ("consolidation", "edema", "emphysema", "fibrosis", "pleural thickening", "hernia"),
    ),
    "dermamnist": (
        "dermatoscopic image",
        ("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions")
        + ("dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions"),
    ),
    "octmnist": (
        "retinal OCT image",
        ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal retina"),
    ),
    "pneumoniamnist": ("chest X-ray", ("normal", "pneumonia")),
    "retinamnist": (
        "fundus photograph",
        ("no diabetic retinopathy", "mild diabetic retinopathy", "moderate diabetic retinopathy")
        + ("severe diabetic retinopathy", "proliferative diabetic retinopathy"),
    ),
    "breastmnist": ("breast ultrasound image", ("malignant", "normal or benign")),
    "bloodmnist": (
        "blood cell microscope image",
        ("basophil", "eosinophil", "erythroblast", "immature granulocytes", "lymphocyte", "monocyte", "neutrophil")
        + ("platelet",),
    ),
    "tissuemnist": (
        "kidney cortex microscope image",
        ("collecting duct, connecting tubule", "distal convoluted tubule", "glomerular endothelial cells")
        + ("interstitial endothelial cells", "leukocytes", "podocytes", "proximal tubule segments")
        + ("thick ascending limb",),
    ),
    "organamnist": ("abdominal CT, axial", _ORGANS),
    "organcmnist": ("abdominal CT, coronal", _ORGANS),
    "organsmnist": ("abdominal CT, sagittal", _ORGANS),
}
MULTI_LABEL = ("chestmnist",)


def questions(root: Path, split: str, work: Path) -> list[Question]:
    """One question an image, or one a label of it, for every set that is there."""
    found: list[Question] = []
    for name, (what, classes) in SETS.items():
        files = sorted([*root.glob(f"{name}.npz"), *root.glob(f"{name}_*.npz")])
        if files:
            found += _of_set(files[-1], name, what, classes, split, work)
    if not found:
        raise UmedError(
            f"{root}: holds none of {', '.join(f'{name}.npz' for name in SETS)}, of which medmnist needs one."
        )
    return found


def _of_set(file: Path, name: str, what: str, classes: Sequence[str], split: str, work: Path) -> list[Question]:
    import numpy as np

    with np.load(file) as arrays:
        missing = [key for key in (f"{split}_images", f"{split}_labels") if key not in arrays]
        if missing:
            raise UmedError(f"{file}: has no {', '.join(missing)}; it has {', '.join(arrays)}. Is it MedMNIST's file?")
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    several = name in MULTI_LABEL
    wide = labels.shape[1] if labels.ndim == 2 else 1
    if wide != (len(classes) if several else 1) or len(labels) != len(images) or labels.max(initial=0) >= len(classes):
        raise UmedError(
            f"{file}: labels {labels.shape} up to {labels.max(initial=0)} do not fit {name}, which has {len(classes)} classes."
        )
    found = []
    for index, label in enumerate(labels.reshape(len(labels), -1)):
        image = str(work / "medmnist" / file.stem / split / f"{index}.png")
        about = {"file": str(file), "split": split, "index": index}
        if several:
            for disease, present in zip(classes, label):
                identity, groups = f"{name}/{index}/{disease}", {"part": name, "label": disease}
                text, truth = f"Does this {what} show {disease}? Answer yes or no.", "yes" if present else "no"
                found.append(
                    Question(identity, image, text, truth, ("no", "yes"), groups=groups, about=about, write=False)
                )
        else:
            text, truth = (
                f"What does this {what} show? Answer with one of: {'; '.join(classes)}.",
                classes[int(label[0])],
            )
            identity, groups = f"{name}/{index}", {"part": name}
            found.append(Question(identity, image, text, truth, classes, groups=groups, about=about, write=False))
    return found


def write_images(asked: Sequence[Question]) -> None:
    """Write the images of these questions as PNG, where they are not there already."""
    import numpy as np
    from PIL import Image

    by_array: dict[tuple[str, str], dict[str, int]] = {}
    for question in asked:
        about = question.about
        by_array.setdefault((about["file"], about["split"]), {})[question.image] = about["index"]
    for (file, split), places in by_array.items():
        with np.load(file) as arrays:
            images = arrays[f"{split}_images"]
        for path, index in places.items():
            target = Path(path)
            if not target.exists() or target.stat().st_mtime < Path(file).stat().st_mtime:
                with files.replacing(target, durable=False) as partial:
                    Image.fromarray(images[index]).save(partial, format="PNG")


def score(question: Question, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    """The likelihood of each class, which is right, and whether the likeliest is."""
    classes = question.options
    scores, right = likelihoods(answer.losses), classes.index(question.truth)
    values = {f"score_{place}": value for place, value in enumerate(scores)}
    return {**values, "truth": float(right), "acc": float(scores.index(max(scores)) == right)}


def figures(rows: Sequence[Row]) -> list[Figure]:
    """``auc/<set>`` and ``acc/<set>`` as MedMNIST defines them.

    AUC of two classes is that of the second, of several the mean of each against the rest, of several labels the mean over the
    labels. ACC is the share of images whose likeliest class is right; of several labels the share of labels.
    """
    found = []
    for name in SETS:
        mine = [row for row in rows if row.groups["part"] == name]
        if not mine:
            continue
        columns = tuple(key for key in mine[0].values if key.startswith("score_"))
        where = {"part": name}
        if name in MULTI_LABEL:
            found.append(Figure(f"auc/{name}", _mean_over_labels, ("score_1", "truth", "label"), where))
        else:
            found.append(Figure(f"auc/{name}", _of_classes(columns), (*columns, "truth"), where))
        found.append(Figure(f"acc/{name}", mean("acc"), ("acc",), where))
    return found


def _of_classes(names: Sequence[str]) -> Statistic:
    def statistic(columns: Columns) -> float:
        import numpy as np

        return macro_auc(np.stack([columns[name] for name in names], axis=1), columns["truth"])

    return statistic


def _mean_over_labels(columns: Columns) -> float:
    import numpy as np

    labels = np.unique(columns["label"])
    each = [
        auc(columns["score_1"][columns["label"] == label], columns["truth"][columns["label"] == label] == 1)
        for label in labels
    ]
    return float(sum(each) / len(each))


MEDMNIST = Benchmark(
    name="medmnist",
    title="MedMNIST v2, classification by likelihood of class names",
    needs="`pneumoniamnist.npz`, `breastmnist_224.npz`, ...: those that are there are asked",
    url="https://medmnist.com (CC BY 4.0; DermaMNIST CC BY-NC)",
    reported="AUC and ACC of each set, as MedMNIST's evaluator defines them",
    questions=questions,
    score=score,
    figures=figures,
    splits=("test", "val", "train"),
    prepare=write_images,
)
