"""MedMNIST v2: classification by the likelihood of class names, with MedMNIST's AUC and ACC.

Yang et al. (Scientific Data 2023). ``<set>.npz`` or ``<set>_224.npz`` with ``{train,val,test}_images`` [n, h, w(, 3)] uint8
and ``_labels`` [n, classes or 1]. A model that writes text gives no class scores. It is asked what the image shows, and a class's
score is the likelihood of its name as the answer (`umed_plugin.evaluation.metrics.classification.likelihoods`). Class names are
those of MedMNIST's own list, in lower case and with the grades of RetinaMNIST in words.

ChestMNIST has several labels per image: the model is asked one yes-or-no question for each label. Images are written as PNG,
losslessly, and go through the loader that training uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion, questions_of_rows
from umed_plugin.evaluation.metrics.classification import auc, likelihoods, macro_auc
from umed_plugin.evaluation.metrics.metric import RATE, Columns, Metric, Row, Statistic, mean
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

_ORGANS = (
    ("bladder", "left femur", "right femur", "heart", "left kidney", "right kidney")
    + ("liver", "left lung", "right lung", "pancreas", "spleen")
)  # fmt: skip
# Set -> (what its images are, class names in label order).
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


def questions(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
    """One question per image, or per image and label, of every set whose file is there."""
    listed: list[BenchmarkQuestion] = []
    for name, (what, classes) in SETS.items():
        files = sorted([*root.glob(f"{name}.npz"), *root.glob(f"{name}_*.npz")])
        if files:
            listed += _of_set(files[-1], name, what, classes, split, work)
    if not listed:
        raise UmedError(
            f"{root}: holds none of {', '.join(f'{name}.npz' for name in SETS)}; medmnist needs one of them. Is it the right "
            "--data-root?"
        )
    return listed


def _of_set(
    file: Path, name: str, what: str, classes: Sequence[str], split: str, work: Path
) -> list[BenchmarkQuestion]:
    import numpy as np

    with np.load(file) as arrays:
        missing = [key for key in (f"{split}_images", f"{split}_labels") if key not in arrays]
        if missing:
            raise UmedError(f"{file}: has no {', '.join(missing)}; it has {', '.join(arrays)}. Is it MedMNIST's file?")
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    several = name in MULTI_LABEL
    wide = labels.shape[1] if labels.ndim == 2 else 1
    if wide != (len(classes) if several else 1) or len(labels) != len(images):
        raise UmedError(
            f"{file}: labels {labels.shape} of {len(images)} images do not fit {name}, which has {len(classes)} classes."
        )

    def asked(row: dict[str, Any], where: str) -> list[BenchmarkQuestion]:
        label = _checked_labels(row["label"], where, 2 if several else len(classes))
        image = str(work / "medmnist" / file.stem / split / f"{row['index']}.png")
        about = {"file": str(file), "split": split, "index": row["index"]}
        if several:
            return [
                BenchmarkQuestion(
                    f"{name}/{row['index']}/{disease}",
                    image,
                    f"Does this {what} show {disease}? Answer yes or no.",
                    "yes" if present else "no",
                    ("no", "yes"),
                    groups={"part": name, "label": disease},
                    about=about,
                    write=False,
                )
                for disease, present in zip(classes, label)
            ]
        text = f"What does this {what} show? Answer with one of: {'; '.join(classes)}."
        identity, groups, truth = f"{name}/{row['index']}", {"part": name}, classes[label[0]]
        return [BenchmarkQuestion(identity, image, text, truth, classes, groups=groups, about=about, write=False)]

    rows = (
        (f"{file.name}:{split}_labels[{index}]", {"index": index, "label": label})
        for index, label in enumerate(labels.reshape(len(labels), -1))
    )
    return questions_of_rows(rows, asked, "medmnist")


def _checked_labels(labels: Any, where: str, classes: int) -> list[int]:
    """The labels of an image as indices from 0.

    Raises:
        UmedError: one is no whole number from 0 to below ``classes``; a negative one would count from the end.
    """
    for label in labels.tolist():
        if label != label or int(label) != label or not 0 <= label < classes:
            raise UmedError(f"{where}: the label {label} is none of the {classes} classes, which count from 0.")
    return [int(label) for label in labels.tolist()]


def write_images(asked: Sequence[BenchmarkQuestion]) -> None:
    """Write the images of these questions as PNG, unless an up-to-date file exists."""
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


def score(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    """The likelihood of each class, the index of the true one, and whether the likeliest is right."""
    classes = question.options
    scores, right = likelihoods(answer.losses), classes.index(question.truth)
    values = {f"score_{index}": value for index, value in enumerate(scores)}
    return {**values, "truth": float(right), "acc": float(scores.index(max(scores)) == right)}


def metrics(rows: Sequence[Row]) -> list[Metric]:
    """``auc/<set>`` and ``acc/<set>`` as MedMNIST defines them.

    AUC: of two classes, that of the second; of more, the mean of each class against the rest; of several labels, the mean over
    labels. ACC: share of images whose likeliest class is right; of several labels, share of labels.
    """
    reported = []
    for name in SETS:
        of_set = [row for row in rows if row.groups["part"] == name]
        if not of_set:
            continue
        columns = tuple(key for key in of_set[0].values if key.startswith("score_"))
        where = {"part": name}
        if name in MULTI_LABEL:
            reported.append(Metric(f"auc/{name}", _mean_over_labels, ("score_1", "truth", "label"), where))
        else:
            reported.append(Metric(f"auc/{name}", _of_classes(columns), (*columns, "truth"), where))
        reported.append(Metric(f"acc/{name}", mean("acc"), ("acc",), where, RATE))
    return reported


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


BENCHMARK = Benchmark(
    name="medmnist",
    title="MedMNIST v2, classification by likelihood of class names",
    needs="`pneumoniamnist.npz`, `breastmnist_224.npz`, ...: those that are there are asked",
    url="https://medmnist.com (CC BY 4.0; DermaMNIST CC BY-NC)",
    reported="AUC and ACC of each set, as MedMNIST's evaluator defines them",
    questions=questions,
    score=score,
    metrics=metrics,
    order=4,
    splits=("test", "val", "train"),
    prepare=write_images,
)
