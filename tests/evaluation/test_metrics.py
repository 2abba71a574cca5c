"""Metrics of rows, their intervals and paired differences, against scipy's and cases worked out by hand."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.metrics import metric
from umed_plugin.evaluation.metrics.metric import (
    Metric,
    Row,
    by_group,
    compare_rows,
    mean,
    mean_of_groups,
    means,
    measure,
    ratio,
)
from umed_plugin.evaluation.tables import direction_note, from_fewer, interval_notes, of_fewest


def row(name, value=None, cluster=None, **groups):
    return Row(name, cluster or name, {} if value is None else {"x": float(value)}, groups)


def test_metrics_by_hand():
    rows = [row("a", 1, source="u"), row("b", 0, source="u"), row("c", 1, source="v"), row("d", source="v")]
    (x,) = means("x")
    found = measure(
        [x, *by_group(x, "source", rows), Metric("mean", mean_of_groups("x", "source"), ("x", "source"))], rows
    )
    assert found["x"]["value"] == pytest.approx(2 / 3) and found["x"]["n"] == 3, "a row without the column is left out"
    assert (found["x/u"]["value"], found["x/v"]["value"]) == (0.5, 1.0)
    assert found["mean"]["value"] == pytest.approx(0.75), "every group weighs the same"
    assert found["x"] == {"value": 2 / 3, "ci95": None, "n": 3, "units": 3, "interval": "too few"}
    nothing = {"value": None, "ci95": None, "n": 0, "units": 0, "interval": "undefined"}
    assert measure(means("y"), rows)["y"] == nothing


def test_the_interval_is_scipy_s_where_every_row_is_drawn_alone():
    values = np.random.default_rng(1).random(200)
    found = measure(means("x"), [row(str(i), value) for i, value in enumerate(values)])["x"]["ci95"]
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=9999, random_state=0).confidence_interval
    assert found == pytest.approx([theirs.low, theirs.high], abs=0.004)


def test_questions_about_one_image_are_drawn_together():
    """Ten copies of each answer tell no more than one: the interval must not become narrower."""
    values = np.random.default_rng(1).random(40)
    alone = [row(str(i), value) for i, value in enumerate(values)]
    copies = [row(f"{i}-{k}", value, cluster=str(i)) for i, value in enumerate(values) for k in range(10)]
    as_if_independent = [row(one.id, one.values["x"]) for one in copies]
    width = {
        name: np.ptp(measure(means("x"), rows)["x"]["ci95"])
        for name, rows in {"alone": alone, "copies": copies, "independent": as_if_independent}.items()
    }
    assert width["copies"] == pytest.approx(width["alone"], rel=0.1)
    assert width["independent"] < 0.5 * width["copies"]


def test_clusters_of_different_size_keep_all_their_rows():
    rows = [row("a", 0, cluster="one"), *[row(f"b{i}", 1, cluster="two") for i in range(3)]]
    drawn = [sorted(chosen) for chosen in metric._draws([one.cluster for one in rows])]
    assert {tuple(chosen) for chosen in drawn} == {(0, 0), (0, 1, 2, 3), (1, 1, 2, 2, 3, 3)}
    five = [row(f"{n}{name}", x, cluster=f"{name}{n}") for n in range(5) for name, x in (("one", 0), *[("two", 1)] * 3)]
    low, high = measure(means("x"), five)["x"]["ci95"]
    assert 0.3 < low < 0.75 < high <= 1


def test_what_is_undefined_on_too_many_draws_has_no_interval():
    rows = [Row(str(i), str(i), {"hit": 0.0, "counted": float(i == 0)}) for i in range(4)]
    found = measure([Metric("r", ratio("hit", "counted"), ("hit", "counted"))], rows)["r"]
    assert found["value"] == 0 and found["ci95"] is None


def test_a_paired_difference_is_narrower_than_two_intervals():
    generator = np.random.default_rng(2)
    before = generator.random(100)
    after = before + 0.02 + 0.01 * generator.standard_normal(100)
    rows = [[row(str(i), value) for i, value in enumerate(values)] for values in (before, after)]
    found = compare_rows(means("x"), rows[0], list(reversed(rows[1])))["x"]
    assert found["difference"] == pytest.approx((after - before).mean()) and found["n"] == 100
    low, high = found["ci95"]
    assert 0 < low < found["difference"] < high < 0.03
    with pytest.raises(UmedError, match="same questions"):
        compare_rows(means("x"), rows[0], rows[1][1:])


def test_a_constant_whose_limits_are_unknown_has_no_interval():
    """Not [1, 1]: no width would look like certainty."""
    for count, why in ((2, "too few"), (50, "undefined")):
        found = measure([Metric("x", mean("x"), ("x",))], [row(str(n), 1) for n in range(count)])["x"]
        assert (found["value"], found["ci95"], found["interval"]) == (1, None, why)


@pytest.mark.parametrize("n", [1, 3, 4, 40])
def test_a_rate_of_0_or_1_has_the_interval_of_clopper_and_pearson(n):
    for hits in (0, n):
        found = measure(means("x"), [row(str(i), float(hits > 0)) for i in range(n)])["x"]
        theirs = binomtest(hits, n).proportion_ci(method="exact")
        assert found["interval"] == "exact" and found["ci95"] == pytest.approx([theirs.low, theirs.high])


def test_copies_of_a_patient_do_not_make_a_rate_surer():
    copies = [row(f"{i}-{k}", 0.0, cluster=str(i)) for i in range(3) for k in range(100)]
    found = measure(means("x"), copies)["x"]
    assert found["ci95"] == pytest.approx([0, 0.7076], abs=1e-4) and (found["n"], found["units"]) == (300, 3)


def test_no_difference_in_any_pair_is_not_certainty():
    four = [row(str(i), 0.25 * i) for i in range(4)]
    found = compare_rows(means("x"), four, four)["x"]
    assert found["difference"] == 0 and found["ci95"] == pytest.approx([-0.6024, 0.6024], abs=1e-4)
    none, all_ = ([row(str(i), value) for i in range(40)] for value in (0.0, 1.0))
    assert compare_rows(means("x"), none, all_)["x"]["ci95"] == pytest.approx([1 - 2 * 0.0881, 1], abs=1e-3)


def test_clusters_whose_denominator_is_0_do_not_count():
    rows = [Row(str(i), str(i), {"hit": 0.0, "of": float(i < 6)}) for i in range(12)]
    found = measure([Metric("r", ratio("hit", "of"), ("hit", "of"), limits=(0, 1))], rows)["r"]
    assert found["ci95"] == pytest.approx([0, 1 - 0.025 ** (1 / 6)])


def test_a_ratio_that_few_clusters_say_anything_about_has_no_interval():
    metric = Metric("r", ratio("hit", "of"), ("hit", "of"), limits=(0, 1))
    rows = [Row(str(i), str(i), {"hit": float(i < 2), "of": float(i < 4)}) for i in range(40)]
    found = measure([metric], rows)["r"]
    assert (found["value"], found["units"], found["interval"], found["n"]) == (0.5, 4, "too few", 40)
    others = [Row(str(i), str(i), {"hit": float(i == 3), "of": float(i < 20)}) for i in range(40)]
    found = compare_rows([metric], rows, others)["r"]
    assert (found["units"], found["interval"]) == (4, "too few"), "those of the side with fewer"
    late = [Row(str(i), str(i), {"hit": float(i % 2), "of": float(i >= 20)}) for i in range(40)]
    found = compare_rows([metric], others, late)["r"]
    assert (found["units"], found["interval"]) == (20, "bootstrap"), "20 each, and none in which both are defined"
    found = measure([metric], others)["r"]
    assert (found["units"], found["interval"]) == (20, "bootstrap")
    (note,) = interval_notes({"r": found}, "patient")
    assert note.startswith("Few patients (fewer than 30): r (20).")


def test_every_cluster_is_looked_at_once_for_an_exact_interval():
    """4,000 studies without a hit: a search of all rows for each took 25 seconds."""
    seen = []

    def hits(columns):
        seen.append(len(columns["x"]))
        return float(columns["x"].mean())

    rows = [row(f"{i}-{k}", 0.0, cluster=f"p{i % 1000}") for i in range(2000) for k in range(2)]
    found = measure([Metric("x", hits, ("x",), limits=(0, 1))], rows)["x"]
    assert found["interval"] == "exact" and found["units"] == 1000
    assert sorted(seen)[:1000] == [4] * 1000


def test_the_words_below_a_table():
    many, few = ([row(str(i), i % 2) for i in range(count)] for count in (40, 12))
    assert interval_notes(measure(means("x"), many), "patient") == []
    (note,) = interval_notes(measure(means("x"), few), "patient")
    assert note.startswith("Few patients (fewer than 30): x (12).")
    assert interval_notes(measure(means("x"), few[:3]), "image") == [
        "Too few images for an interval (fewer than 5): x (3)."
    ]
    nothing = measure([Metric("r", ratio("x", "x"), ("x",), limits=(0, 1))], [row(str(i), 0) for i in range(9)])
    assert interval_notes(nothing) == ["Undefined here, as a ratio over 0 is: r."]
    rare = [row(str(i), i in (0, 1)) for i in range(40)]
    (note,) = interval_notes(measure([Metric("r", ratio("x", "x"), ("x",))], rare))
    assert note.startswith("No interval, since ") and note.endswith(": r.")
    (note,) = interval_notes(measure(means("x"), [row(str(i), 1) for i in range(40)]))
    assert note.startswith("Exact intervals (Clopper-Pearson)")
    (iou,), (false_boxes,) = means("iou"), [replace(metric, lower_is_better=True) for metric in means("false")]
    both = compare_rows([iou, false_boxes], *[[Row("a", "a", {"iou": 0.5, "false": 1.0})]] * 2)
    assert direction_note(both) == "A positive difference is an improvement, except for false: there less is better."


def test_differences_of_fewer_studies_than_the_metric_are_told_too():
    """60 studies after, of which the evaluation before knows 12: its own interval is fine, and that of the difference is not."""
    after, before = [row(str(i), i % 2) for i in range(60)], [row(str(i), i % 3 == 0) for i in range(60)]
    before = [one if int(one.id) < 12 else replace(one, values={}) for one in before]
    own, differences = measure(means("x"), after), compare_rows(means("x"), before, after)
    assert interval_notes(own) == [] and own["x"]["units"] == 60 and differences["x"]["units"] == 12
    (note,) = interval_notes(from_fewer(differences, own))
    assert note.startswith("Few images (fewer than 30): difference of x (12).")
    assert from_fewer(differences, {"x": {**own["x"], "units": 12}}) == {}, "the metric's own sentence says it"
    few = measure(means("x"), after[:3])
    assert of_fewest([few, own]) == of_fewest([own, few]) == few


def test_the_bootstrap_holds_one_draw_at_a_time(monkeypatch):
    monkeypatch.setattr(metric, "RESAMPLES", 200)
    rows = [Row(str(number), str(number), {"iou": number % 7 / 7}) for number in range(20_000)]
    measure(means("iou"), rows[:10])
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        measure(means("iou"), rows)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 8e6, "all draws at once take 32 MB"
