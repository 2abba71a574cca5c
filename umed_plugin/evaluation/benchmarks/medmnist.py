"""MedMNIST v2: classification by the likelihood of class names, with MedMNIST's AUC and ACC.

Yang et al. (Scientific Data 2023). ``<set>.npz`` or ``<set>_224.npz`` with ``{train,val,test}_images`` [n, h, w(, 3)] uint8
and ``_labels`` [n, classes or 1]: `umed_plugin.evaluation.benchmarks.medmnist_files`. A model that writes text gives no class
scores. It is asked what the image shows, and a class's score is the likelihood of its name as the answer
(`umed_plugin.evaluation.metrics.classification.likelihoods`). Two classes' scores sum to 1, so the likeliest class is the one
that MedMNIST's evaluator takes by its threshold of 0.5.

ChestMNIST has several labels per image: the model is asked one yes-or-no question for each label. Images are written as PNG,
losslessly, and go through the loader that training uses.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion, questions_of_rows
from umed_plugin.evaluation.benchmarks.medmnist_files import SETS, files_of_sets, labels_of
from umed_plugin.evaluation.metrics.classification import auc, likelihoods, macro_auc
from umed_plugin.evaluation.metrics.metric import RATE, Columns, Metric, Row, Statistic, mean
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

_COARSEST = 2 * 10**9  # nanoseconds: FAT keeps even seconds


def questions(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
    """One question per image, or per image and label, of every set whose file is there."""
    return [
        question
        for name, file in files_of_sets(root).items()
        for question in _of_set(file, name, split, work / "medmnist" / file.stem / split)
    ]


def _of_set(file: Path, name: str, split: str, folder: Path) -> list[BenchmarkQuestion]:
    known = SETS[name]

    def asked(row: dict[str, Any], where: str) -> list[BenchmarkQuestion]:
        label = _checked_labels(row["label"], where, 2 if known.several else len(known.classes))
        image = str(folder / f"{row['index']}.png")
        about = {"file": str(file), "split": split, "index": row["index"]}
        if known.several:
            return [
                BenchmarkQuestion(
                    f"{name}/{row['index']}/{disease}",
                    image,
                    f"Does this {known.what} show {disease}? Answer yes or no.",
                    "yes" if present else "no",
                    ("no", "yes"),
                    groups={"part": name, "label": disease},
                    about=about,
                    write=False,
                    made_from=str(file),
                )
                for disease, present in zip(known.classes, label)
            ]
        text = f"What does this {known.what} show? Answer with one of: {'; '.join(known.classes)}."
        identity, groups, truth = f"{name}/{row['index']}", {"part": name}, known.classes[label[0]]
        return [
            BenchmarkQuestion(
                identity,
                image,
                text,
                truth,
                known.classes,
                groups=groups,
                about=about,
                write=False,
                made_from=str(file),
            )
        ]

    rows = (
        (f"{file.name}:{split}_labels[{index}]", {"index": index, "label": label})
        for index, label in enumerate(labels_of(file, name, split))
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
    """Write the images of these questions as PNG, but for those that exist already.

    A picture has its data file's time of change. So another data file is noticed, be it newer or older, and processes that
    write side by side need no file in which they note what was written. Where nothing can be written, a newer one is taken too:
    a copy of the folder may have lost its times.
    """
    import numpy as np
    from PIL import Image

    by_array: dict[tuple[str, str], dict[str, int]] = {}
    for question in asked:
        about = question.about
        by_array.setdefault((about["file"], about["split"]), {})[question.image] = about["index"]
    for (file, split), places in by_array.items():
        changed = Path(file).stat().st_mtime_ns
        with np.load(file) as arrays:
            images = arrays[f"{split}_images"]
        for path, index in places.items():
            target = Path(path)
            if not _is_written(target, changed):
                with files.replacing(target, durable=False) as partial:
                    Image.fromarray(images[index]).save(partial, format="PNG")
                    os.utime(partial, ns=(changed, changed))


def _is_written(picture: Path, changed: int) -> bool:
    """Whether a picture is there and made from a data file of this time of change, as far as the disk tells."""
    if not picture.exists():
        return False
    later = picture.stat().st_mtime_ns - changed
    return abs(later) <= _COARSEST or (later > 0 and not os.access(picture.parent, os.W_OK))


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
        if SETS[name].several:
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
