"""The reward `localization_curriculum`: its threshold's path, its state, and the questions of several processes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from umed_plugin.errors import UsageError
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.rewards import (
    REWARDS,
    advance_rewards,
    collect_metrics,
    load_reward_states,
    make_rewards,
    reward_metric_names,
    reward_states,
)
from umed_plugin.rewards.terms.localization_curriculum import _DEMANDS, _STEPS, MARGIN, WINDOW, LocalizationCurriculum

SQUARE = ImageGeometry(100, 100)
STUDY = {"objects": {"ref": ["cyst"], "bbox": [[0, 0, 50, 100]]}, "terms": {"cyst": ["cyst"]}}
NEGATIVE = {"objects": {"ref": [], "bbox": []}, "terms": {"cyst": ["cyst"]}}


def answer(iou: float) -> str:
    return f"A cyst at [0.00, 0.00, {0.5 * iou:.3f}, 1.00]."


def ask(curriculum, ious, study=STUDY):
    texts = [answer(iou) if iou else "No." for iou in ious]
    return curriculum([""] * len(ious), texts, record=[study] * len(ious), geometry=[SQUARE] * len(ious))


def test_an_answer_that_reaches_the_threshold_scores_1():
    curriculum = LocalizationCurriculum()
    assert ask(curriculum, [1.0, 0.31, 0.29, 0.0]) == [1.0, 1.0, 0.0, 0.0]
    assert ask(curriculum, [0.0, 0.5], NEGATIVE) == [1.0, 0.0], "no box, and a box where nothing is"
    assert curriculum.for_all_processes() == [None]
    curriculum.threshold = 0.8
    assert ask(curriculum, [1.0, 0.79]) == [1.0, 0.0]


def test_the_threshold_rises_with_the_model_and_ends_at_08():
    curriculum, path = LocalizationCurriculum(), [0.3]
    for _ in range(40):
        ask(curriculum, [1.0, 0.95])
        for _ in range(WINDOW // 2):
            curriculum.advance(curriculum.for_all_processes())
        path.append(curriculum.threshold)
    assert list(dict.fromkeys(path)) == [0.3, 0.45, 0.6, 0.7, 0.8]
    assert path[1] == 0.3 and path[2] == 0.45 and path[3] == 0.6, "a full window, and then the half that was dropped"


@pytest.mark.parametrize(
    ("threshold", "questions", "rises"),
    [
        (0.3, [[0.5, 0.5]] * WINDOW, True),
        (0.3, [[0.5, 0.5]] * (WINDOW - 1), False),  # not full
        (0.3, [[0.39, 0.39]] * WINDOW, False),  # margin of 0.1
        (0.3, [[0.9, 0.9]] * 23 + [[0.0, 0.9]] * 7, False),  # hit rate 0.88, but its standard deviation is 0.21
        (0.3, [[0.9, 0.2]] * WINDOW, False),  # hit rate 0.5
        (0.3, [[0.9, 0.9]] * 24 + [[0.0, 0.9]] * 6, True),  # 0.2 will do
        (0.6, [[0.9, 0.9, 0.9, 0.1]] * 10 + [[0.9] * 4] * 20, True),
        (0.6, [[0.9, 0.9]] * 23 + [[0.0, 0.9]] * 7, True),  # from 0.6 on the demands are lower
        (0.7, [[0.95, 0.95]] * 24 + [[0.65, 0.65]] * 6, False),  # standard deviation 0.4
        (0.7, [[0.95, 0.95]] * 26 + [[0.65, 0.65]] * 4, True),
        # One answer a question, or answers that are all alike: the standard deviation decides.
        (0.3, [[0.9]] * 29 + [[0.0]], True),
        (0.45, [[0.9] * 4] * 28 + [[0.0] * 4] * 2, False),
        (0.6, [[0.9]] * 26 + [[0.0]] * 4, True),
        (0.7, [[1.0]] * 25 + [[0.0]] * 5, False),
        (0.8, [[1.0, 1.0]] * WINDOW, False),
    ],
)
def test_when_the_threshold_rises(threshold, questions, rises):
    curriculum = LocalizationCurriculum()
    curriculum.threshold = threshold
    curriculum.advance(questions)
    assert (curriculum.threshold > threshold) is rises


def thresholds_on_the_way() -> list[float]:
    """The thresholds of a model that masters each, up to the last."""
    curriculum, seen = LocalizationCurriculum(), []
    while not seen or curriculum.threshold > seen[-1]:
        seen.append(curriculum.threshold)
        curriculum.advance([[1.0, 1.0]] * WINDOW)
    return seen


def test_every_row_of_the_tables_is_met_on_the_thresholds_way():
    way = thresholds_on_the_way()
    assert way == [0.3, 0.45, 0.6, 0.7, 0.8]
    demands = {next(row for row in _DEMANDS if threshold >= row[0]) for threshold in way[:-1]}
    steps = {next(row for row in _STEPS if threshold < row[0]) for threshold in way[:-1]}
    assert demands == {*_DEMANDS} and steps == {*_STEPS}


def test_the_docs_have_each_demand_on_the_thresholds_way():
    """Each threshold is in the row of its demands."""
    rows = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text().splitlines()
    for threshold in thresholds_on_the_way()[:-1]:
        least, largest = next(demand for start, *demand in _DEMANDS if threshold >= start)
        (row,) = [line for line in rows if re.match(rf"  \| ([\d.]+, )?{threshold}(,| \|)", line)]
        assert f"| {least:.0%} or more".replace("%", " %") in row and f"| {largest:.2f} or less" in row
        assert f"threshold + {MARGIN}" in row


def test_hits_are_counted_against_todays_threshold():
    """IoUs of 0.42 reach 0.3 and not 0.45: what is left in the window after a rise does not raise it again."""
    curriculum = LocalizationCurriculum()
    curriculum.advance([[0.42, 0.42]] * WINDOW)
    assert curriculum.threshold == 0.45
    ask(curriculum, [0.42])
    assert curriculum.metrics()["localization_curriculum/hit_rate"] == 0


def test_studies_without_a_lesion_are_left_out_of_the_window():
    curriculum = LocalizationCurriculum()
    curriculum.advance([None, [0.5], []] * (WINDOW - 1))
    assert curriculum.threshold == 0.3
    curriculum.advance([[0.5]])
    assert curriculum.threshold == 0.45


def test_a_resumed_run_takes_the_same_path_to_the_bit():
    whole, stopped = LocalizationCurriculum(), LocalizationCurriculum()
    iou = iter([0.3 + 0.007 * (step % 90) for step in range(400)])
    for step in range(100):
        question = [[next(iou), 1 / 3 + next(iou) / 3]]
        if step == 37:
            kept = json.loads(json.dumps(reward_states({"localization_curriculum": stopped})))
            stopped = LocalizationCurriculum()
            assert load_reward_states({"localization_curriculum": stopped}, kept) == []
        for curriculum in (whole, stopped):
            curriculum.advance(question)
        assert whole.state() == stopped.state()
    assert whole.threshold > 0.3
    assert load_reward_states({"localization_curriculum": stopped}, {}) == ["localization_curriculum"]


def test_a_run_makes_its_own_and_logs_its_threshold():
    flags = UmedFlags(umed_stage="rewarding", umed_rewards="localization_curriculum")
    first, second = make_rewards(flags, "."), make_rewards(flags, ".")
    (reward,) = first.values()
    assert reward is not second["localization_curriculum"]
    ask(reward, [0.5, 0.7])
    advance_rewards(first, lambda own: own * WINDOW)  # as if there were 30 processes
    ask(reward, [0.5, 0.7])
    logged = collect_metrics(first)
    assert set(logged) == set(reward_metric_names(first))
    assert logged["localization_curriculum/threshold"] == 0.45
    assert logged["localization_curriculum/mean_iou"] == pytest.approx(0.6, abs=1e-3)


def test_two_questions_about_the_same_record_are_two_questions():
    """A sampling with several questions may draw a record twice, as one object."""
    flags = UmedFlags(umed_stage="rewarding", umed_rewards="localization_curriculum", umed_num_candidates=2)
    (reward,) = make_rewards(flags, ".").values()
    ask(reward, [1.0, 1.0, 0.0, 0.0])
    reward.advance(reward.for_all_processes())
    assert [sum(question) / 2 for question in reward.state()["window"]] == [pytest.approx(1, abs=1e-2), 0]
    reward(  # a study without a lesion between two questions about one with
        [""] * 6, ["No."] * 6, record=[STUDY, STUDY, NEGATIVE, NEGATIVE, STUDY, STUDY], geometry=[SQUARE] * 6
    )
    assert reward.for_all_processes() == [[0.0, 0.0], None, [0.0, 0.0]]


def test_without_a_run_the_answers_with_one_record_object_are_a_question():
    curriculum = LocalizationCurriculum()
    curriculum([""] * 3, ["No."] * 3, record=[STUDY, STUDY, dict(STUDY)], geometry=[SQUARE] * 3)
    assert curriculum.for_all_processes() == [[0.0, 0.0], [0.0]]


@pytest.mark.llava
def test_trl_which_keeps_no_state_of_rewards_is_refused():
    from umed_plugin.rewards.trl import CombinedReward

    with pytest.raises(UsageError, match="localization_curriculum.* TRL's checkpoints keep nothing of a reward"):
        CombinedReward({"localization_curriculum": REWARDS.get("localization_curriculum")}, 2)
