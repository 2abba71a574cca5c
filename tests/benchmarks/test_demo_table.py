"""The table of the demo in docs/results.md: each folder's own figures, and the paired differences of all of them together."""

from __future__ import annotations

import demo_table
from intervals import mean_difference

from umed_plugin.evaluation.benchmarks.recipe import RECIPE
from umed_plugin.evaluation.metrics.metric import Row, measure
from umed_plugin.evaluation.results import Evaluation, Prediction


def demo_folder(folder, ious_before, ious_after):
    """What `umed demo` writes, of four studies of which the last has no lesion; accuracy is 1 but 0.75 after stage 2."""
    stages = {"base": [0.0] * 4, "instruction_tuning": ious_before, "rewarding": ious_after}
    for stage, ious in stages.items():
        first_is_right = float(stage != "rewarding")
        studies = []
        for number, iou in enumerate(ious):
            values = {"accuracy": 1.0 if number else first_is_right, **({"mean_iou": iou} if number < 3 else {})}
            true = [] if number == 3 else [[0.1, 0.1, 0.2, 0.2]]
            details = {"true_classes": ["cyst"] * len(true), "true_boxes": true, "boxes": [], "set_iou": iou}
            question = (str(number), "", "", "", "", values, str(number))
            studies.append(Prediction(*question, details=details, groups={"source": ""}))
        rows = [study.row() for study in studies]
        metrics = measure(RECIPE.metrics(rows), rows)
        Evaluation("recipe", stage, "umed_mistral", studies, metrics).save(folder / "evaluation" / stage)
    return folder


def interval(*seeds):
    """Of the differences of each seed's studies 0, 1, ..., each of a patient of its own."""
    names = sorted((f"seed{seed}/{n}", value) for seed, values in enumerate(seeds) for n, value in enumerate(values))
    ends = mean_difference([Row(name, name, {"difference": value}) for name, value in names])[1]
    return "" if ends is None else f" [{ends[0]:+.3f}, {ends[1]:+.3f}]"


def test_iou_counts_lesions_and_accuracy_every_study(tmp_path, capsys):
    first = demo_folder(tmp_path / "seed0", [0.0, 0.1, 0.2, 1.0], [0.6, 0.1, 0.2, 0.0])
    second = demo_folder(tmp_path / "seed1", [0.0, 0.0, 0.0, 0.0], [0.3, 0.0, 0.0, 1.0])
    demo_table.main([str(first), str(second)])
    _, _, *lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.strip().splitlines()]
    of_first, of_second, of_all = [[cell.strip() for cell in line] for line in lines]
    assert of_first[:5] == ["seed0", "0.000", "0.100", "0.300", f"+0.200{interval([0.6, 0.0, 0.0])}"]
    assert of_first[5:] == ["1.000", "1.000", "0.750", f"-0.250{interval([-1.0, 0.0, 0.0, 0.0])}"]
    assert of_second[:2] == ["seed1", "0.000"]
    assert of_all[4] == f"+0.150{interval([0.6, 0.0, 0.0], [0.3, 0.0, 0.0])}"
    assert of_all[8] == f"-0.250{interval(*[[-1.0, 0.0, 0.0, 0.0]] * 2)}"
