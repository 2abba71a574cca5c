"""README's table of the demo: each folder's own summary, and the paired differences of all of them together."""

from __future__ import annotations

import json

import demo_table

from umed_plugin.evaluate import mean_interval

LESION, NONE = [[0, 0, 8, 8]], []


def demo_folder(folder, ious_before, ious_after):
    """What `umed demo` writes, of four studies of which the last has no lesion; accuracy is 1 before and 0.75 after."""
    boxes = [LESION, LESION, LESION, NONE]
    for stage, ious, right in (("instruction_tuning", ious_before, 1.0), ("rewarding", ious_after, 0.0)):
        studies = [
            {"set_iou": iou, "accuracy": 1.0 if number else right, "true_boxes": true}
            for number, (iou, true) in enumerate(zip(ious, boxes))
        ]
        (folder / "evaluation" / stage).mkdir(parents=True)
        lines = "\n".join(json.dumps(study) for study in studies)
        (folder / "evaluation" / stage / "predictions.jsonl").write_text(lines)
    summary = {stage: {"mean_iou": 0.25, "accuracy": 0.5} for stage in ("base", "instruction_tuning", "rewarding")}
    summary["comparison"] = {key: {"difference": 0.1, "ci95": [-0.05, 0.2]} for key in ("mean_iou", "accuracy")}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_all_folders_together_count_lesions_for_iou_and_every_study_for_accuracy(tmp_path, capsys):
    first = demo_folder(tmp_path / "seed0", [0.0, 0.1, 0.2, 1.0], [0.5, 0.1, 0.2, 0.0])
    second = demo_folder(tmp_path / "seed1", [0.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 1.0])
    demo_table.main([str(first), str(second)])
    _, _, *folders, together = capsys.readouterr().out.strip().splitlines()
    difference = "+0.100 [-0.050, +0.200]"
    found = [cell.strip() for cell in folders[0].split("|")[1:-1]]
    assert found == ["seed0", *["0.250"] * 3, difference, *["0.500"] * 3, difference]
    ious = [0.5, 0.0, 0.0, 0.1, 0.0, 0.0]
    low, high = mean_interval(ious)
    cells = [cell.strip() for cell in together.split("|")]
    assert cells[5] == f"+0.100 [{low:+.3f}, {high:+.3f}]"
    assert cells[9].startswith("-0.250 [")
