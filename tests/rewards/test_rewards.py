"""The shipped rewards and their combination on hand-computed cases, new rewards, and the metrics of users' own."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from umed_plugin.errors import UmedError, UsageError
from umed_plugin.flags.names import LOCAL_JUDGE_NAMES, PAPER_REWARDS, SHIPPED_REWARDS
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.rewards import (
    REWARDS,
    collect_metrics,
    combine_rewards,
    filled_over_queries,
    localization,
    localization_diou,
    normalised_terms,
    relevance,
    reward_metric_names,
    run_rewards,
    scored_answers,
    start_rewards,
    vision_relevance,
)
from umed_plugin.rewards.contract import normalisation_of, register_reward
from umed_plugin.rewards.judges.lexical import LOCAL_JUDGES
from umed_plugin.rewards.terms.vision_relevance import even_share
from umed_plugin.training.advantages import group_advantages, has_signal

ROOT = Path(__file__).resolve().parents[2]
GEOMETRY = ImageGeometry(100, 100, "pad", 336, 14)
TERMS = {"nodule": ["nodule"], "cyst": ["cyst"]}
NODULE = {
    "objects": {"ref": ["nodule"], "bbox": [[20, 20, 60, 60]]},
    "terms": TERMS,
    "conversations": [{}, {"value": "One area at [0.20, 0.20, 0.60, 0.60] is a nodule."}],
}
NEGATIVE = {"objects": {"ref": [], "bbox": []}, "terms": TERMS, "conversations": [{}, {"value": "Nothing abnormal."}]}
WEIGHTS = {"relevance": 1.0, "localization": 1.0, "vision_relevance": 1.0}


def call(reward, completions, record, **columns):
    n = len(completions)
    return reward(["q"] * n, completions, record=[record] * n, geometry=[GEOMETRY] * n, **columns)


def test_localization_is_the_iou():
    # [0.2, 0.2, 0.4, 0.6] is the left half of the true box: IoU 0.5.
    answers = ["[0.20, 0.20, 0.60, 0.60]", "[0.20, 0.20, 0.40, 0.60]", "[0.7, 0.7, 0.9, 0.9]", "no box"]
    assert call(localization, answers, NODULE) == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert call(localization, ["no box", "[0.1, 0.1, 0.2, 0.2]"], NEGATIVE) == [1.0, 0.0]


def test_the_judge_of_classes_does_not_hear_the_wording():
    answers = ["A nodule.", "One area at [0.20, 0.20, 0.60, 0.60] is a cyst.", "A nodule and a cyst."]
    assert call(LOCAL_JUDGES["classes"], answers, NODULE) == pytest.approx([1.0, 0.0, 2 / 3])
    lexical = call(LOCAL_JUDGES["lexical"], answers, NODULE)
    assert lexical[0] < 1 and lexical[1] > 0
    assert tuple(LOCAL_JUDGES) == LOCAL_JUDGE_NAMES


def test_shaped_localization_ranks_misses_and_keeps_the_rest():
    answers = [
        "[0.20, 0.20, 0.60, 0.60]",
        "[0.60, 0.20, 1.00, 0.60]",
        "[0.60, 0.60, 1.00, 1.00]",
        "no box",
        "[2, 2, 1, 1]",
    ]
    right, beside, across, *wrong = call(localization_diou, answers, NODULE)
    # Centres 0.4 apart, the box around both 0.8 x 0.4; then 0.4 x 0.4 apart, 0.8 x 0.8.
    assert (right, beside, across) == pytest.approx((1.0, 0.25 * (1 - 0.16 / 0.8), 0.25 * (1 - 0.32 / 1.28)), abs=1e-5)
    assert wrong == [0.0, 0.0]
    assert call(localization_diou, ["no box", "[0.1, 0.1, 0.2, 0.2]"], NEGATIVE) == [1.0, 0.0]


def test_a_group_that_misses_whole_is_not_raised_to_one():
    values = call(localization_diou, ["[0.60, 0.20, 1.00, 0.60]", "[0.60, 0.60, 1.00, 1.00]"], NODULE)
    least = {"localization_diou": localization_diou.least_maximum}
    keywords = {"weights": {"localization_diou": 1.0}, "max_normalised": ["localization_diou"]}
    shaped = combine_rewards({"localization_diou": values}, 2, least_maxima=least, **keywords)
    torch.testing.assert_close(shaped, torch.tensor([values]) / 0.5)
    assert shaped.max() < 0.5
    assert combine_rewards({"localization_diou": values}, 2, **keywords).max() == 1, (
        "what the least maximum is there for"
    )
    hit = combine_rewards({"localization_diou": [0.8, values[0]]}, 2, least_maxima=least, **keywords)
    torch.testing.assert_close(hit, torch.tensor([[1.0, values[0] / 0.8]]))


def test_the_flags_know_every_reward():
    own = ("umed_plugin.rewards.terms.", "umed_plugin.rewards.judges.")  # not those that other tests register
    assert set(SHIPPED_REWARDS) == {name for name in REWARDS if REWARDS.get(name).__module__.startswith(own)}


def test_relevance_of_the_reference_is_one_and_falls_with_class_and_words():
    answers = [
        "One area at [0.90, 0.10, 0.95, 0.20] is a nodule.",  # relevance does not judge the box
        "One area at [0.20, 0.20, 0.60, 0.60] is a cyst.",  # class wrong: 0; words: 5 of 6
        "zzz",
    ]
    assert call(relevance, answers, NODULE) == pytest.approx([1.0, 0.5 * 5 / 6, 0.0])
    assert call(relevance, ["Nothing abnormal."], NEGATIVE) == [1.0]


def test_vision_relevance_hands_on_the_attention_and_leaves_negatives_out():
    assert call(vision_relevance, ["a", "b"], NODULE, attention_on_lesion=[0.3, 0.0]) == [0.3, 0.0]
    assert call(vision_relevance, ["a"], NEGATIVE, attention_on_lesion=[0.0]) == [None]


def test_sum_of_the_paper():
    values = {"relevance": [0.5, 1.0], "localization": [0.4, 0.8], "vision_relevance": [0.3, 0.2]}
    expected = [[0.5 + 0.4 / 0.8 + 0.3 / 0.3, 1.0 + 0.8 / 0.8 + 0.2 / 0.3]]
    torch.testing.assert_close(combine_rewards(values, 2, weights=WEIGHTS), torch.tensor(expected))


def test_maxima_are_those_of_the_query():
    values = {"localization": [0.2, 0.4, 0.5, 1.0]}
    torch.testing.assert_close(combine_rewards(values, 2, weights=WEIGHTS), torch.tensor([[0.5, 1.0], [0.5, 1.0]]))


def test_floor_keeps_a_tiny_maximum_from_scoring_one():
    values = {"localization": [0.02, 0.0]}
    torch.testing.assert_close(combine_rewards(values, 2, weights=WEIGHTS, floor=0.1), torch.tensor([[0.2, 0.0]]))


ATTENTION = [0.0021, 0.0024, 0.0027, 0.0030, 0.0032, 0.0035, 0.0037, 0.0039]


def small_lesion():
    """20 px of 512, as in DeepLesion: 0.0015 of the patches."""
    return {**NODULE, "objects": {"ref": ["nodule"], "bbox": [[100, 100, 120, 120]]}}, ImageGeometry(512, 512)


def test_attention_on_a_small_lesion_is_divided_by_its_maximum():
    study, geometry = small_lesion()
    columns = {"record": [study] * 8, "geometry": [geometry] * 8, "attention_on_lesion": ATTENTION}
    rewards = {"vision_relevance": vision_relevance}
    values = run_rewards(rewards, ["Where?"] * 8, ["a nodule"] * 8, **columns)
    normalised = normalisation_of(rewards, columns)
    assert normalised["scales"]["vision_relevance"] == pytest.approx([(20 / 512) ** 2] * 8)
    terms = combine_rewards(values, 8, weights=WEIGHTS, **normalised)
    torch.testing.assert_close(terms, torch.tensor([ATTENTION]) / 0.0039)


def test_the_floor_of_attention_is_a_multiple_of_the_even_share_of_each_query():
    """A floor of 1 asks for the even share: a third of it scores a third. The other query's share is 100 times as large."""
    values = {"vision_relevance": [0.0005, 0.0, 0.3, 0.15]}
    scales = {"vision_relevance": [0.0015, 0.0015, 0.15, 0.15]}
    terms = combine_rewards(values, 2, weights=WEIGHTS, floor=1.0, scales=scales)
    torch.testing.assert_close(terms, torch.tensor([[1 / 3, 0.0], [1.0, 0.5]]))


@pytest.mark.parametrize(("floor", "given"), [(0.1, 1.0), (1.0, 0.5)])
def test_the_only_candidate_that_names_the_lesion_is_paid_for_the_naming(floor, given):
    """The paper's maximum cannot tell it: half the even share is the group's maximum. A floor of 1 halves what it is given."""
    study, geometry = small_lesion()
    columns = {"record": [study] * 4, "geometry": [geometry] * 4}
    half = 0.5 * even_share(**columns)[0]
    values = {"vision_relevance": [half, 0.0, 0.0, 0.0]}
    scales = {"vision_relevance": even_share(**columns)}
    terms = combine_rewards(values, 4, weights=WEIGHTS, floor=floor, scales=scales)
    torch.testing.assert_close(terms, torch.tensor([[given, 0.0, 0.0, 0.0]]))


def test_a_lesion_that_the_crop_removes_gives_0_and_no_nan():
    study = {**NODULE, "objects": {"ref": ["nodule"], "bbox": [[0, 0, 20, 20]]}}
    columns = {"record": [study] * 2, "geometry": [ImageGeometry(200, 100, "square")] * 2}
    scales = {"vision_relevance": even_share(**columns)}
    assert scales["vision_relevance"] == [0.0, 0.0]
    terms = combine_rewards({"vision_relevance": [0.0, 0.0]}, 2, weights=WEIGHTS, scales=scales)
    assert terms.tolist() == [[0.0, 0.0]]


def test_a_users_reward_may_have_a_scale_and_a_least_maximum(registered):
    def tiny(completions, **kwargs):
        return [0.001 * len(text) for text in completions]

    register_reward("tiny", max_normalised=True, scale=0.001)(tiny)
    made = {"tiny": tiny}
    values = run_rewards(made, ["Where?"] * 2, ["ab", "abcd"])
    terms = combine_rewards(values, 2, weights={"tiny": 1.0}, **normalisation_of(made, {}))
    torch.testing.assert_close(terms, torch.tensor([[0.5, 1.0]]))
    normalised = {**normalisation_of(made, {}), "least_maxima": {"tiny": 0.008}}
    least = combine_rewards(values, 2, weights={"tiny": 1.0}, **normalised)
    torch.testing.assert_close(least, torch.tensor([[0.25, 0.5]]))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-9, 1e6])
def test_zscores_do_not_depend_on_the_size_of_the_values(scale):
    values = {"localization": [0.25 * scale, 0.75 * scale, 0.5 * scale, 0.5 * scale]}
    terms = combine_rewards(values, 4, weights=WEIGHTS, norm="zscore")
    torch.testing.assert_close(terms, torch.tensor([[-(2**0.5), 2**0.5, 0.0, 0.0]]))
    equal = combine_rewards({"localization": [0.1 * scale] * 7}, 7, weights=WEIGHTS, norm="zscore")
    assert equal.eq(0).all()


OPPOSED = {
    "two answers": ([0.31, 0.87], [0.6, 0.2]),
    "right or wrong": ([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.7, 0.7, 0.7, 0.7]),
    "one is the rest of the other": ([0.9003, 0.9001, 0.9007, 0.9002], [0.0997, 0.0999, 0.0993, 0.0998]),
}


@pytest.mark.parametrize("attention", [None, 0.2])
@pytest.mark.parametrize("case", OPPOSED)
def test_rewards_that_cancel_leave_no_signal_and_no_advantage(case, attention):
    first, second = OPPOSED[case]
    values = {"relevance": first, "localization": second, "vision_relevance": [attention] * len(first)}
    rewards = combine_rewards(values, len(first), weights=WEIGHTS, norm="zscore")
    assert rewards.abs().max() < 1e-6 and not has_signal(rewards).any()
    for spread in (None, 1.0, torch.tensor(0.0)):
        assert group_advantages(rewards, spread=spread).eq(0).all()


def test_sums_that_differ_by_rounding_around_another_value_leave_no_signal():
    values = {"mine": [1000.1, 1000.2, 1000.3], "other": [-1000.0, -1000.1, -1000.2]}
    weights = dict.fromkeys(values, 1.0)
    rewards = combine_rewards(values, 3, weights=weights, norm="none")
    torch.testing.assert_close(rewards, torch.full((1, 3), 0.1))
    assert not has_signal(rewards).any() and group_advantages(rewards).eq(0).all()
    # A difference that the values have stays, however small it is beside them.
    rewards = combine_rewards({**values, "mine": [1000.1, 1000.2, 1000.31]}, 3, weights=weights, norm="none")
    torch.testing.assert_close(rewards, torch.tensor([[0.1, 0.1, 0.11]]))


def test_a_query_that_cancels_leaves_the_others_as_they_are():
    values = {"relevance": [0.2, 0.8, 0.2, 0.8], "localization": [0.9, 0.4, 0.4, 0.9]}
    rewards = combine_rewards(values, 2, weights=WEIGHTS, norm="zscore")
    torch.testing.assert_close(rewards[1], torch.tensor([-2.0, 2.0]))
    assert has_signal(rewards).tolist() == [[False], [True]]


def trl_form(completions, **kwargs):
    return [float(len(text)) for text in completions]


def with_prompts(prompts, completions, **kwargs):
    return [float(len(prompt)) for prompt in prompts]


def other_names(questions, answers, **columns):
    return [float(len(answer)) for answer in answers]


def all_by_keyword(*, completions, record, **columns):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("reward", "values"),
    [(trl_form, [1, 2]), (with_prompts, [6, 6]), (other_names, [1, 2]), (all_by_keyword, [1, 2])],
)
def test_a_reward_is_called_by_keyword_as_in_trl(reward, values):
    columns = {"record": [NODULE] * 2, "geometry": [GEOMETRY] * 2, "attention_on_lesion": [None] * 2}
    assert run_rewards({"own": reward}, ["Where?"] * 2, ["a", "bc"], **columns) == {"own": values}


def test_slow_work_begins_by_keyword_too():
    class Slow:
        def start(self, completions, **kwargs):
            self.started = completions, sorted(kwargs)

    slow = Slow()
    start_rewards({"slow": slow}, ["Where?"], ["a"], record=[NODULE])
    assert slow.started == (["a"], ["prompts", "record"])


def test_group_of_zeros_stays_zero():
    assert combine_rewards({"localization": [0.0] * 4}, 4, weights=WEIGHTS, floor=0.0).isnan().logical_not().all()
    assert combine_rewards({"localization": [0.0] * 4}, 4, weights=WEIGHTS).eq(0).all()


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_negative_rewards_are_divided_by_the_largest_absolute_value(floor):
    for values, expected in (([-0.5, -0.25], [-1.0, -0.5]), ([-4.0, 1.0], [-1.0, 0.25])):
        found = combine_rewards({"localization": values}, 2, weights=WEIGHTS, floor=floor)
        torch.testing.assert_close(found, torch.tensor([expected]))


def test_one_candidate_is_not_normalised():
    torch.testing.assert_close(
        combine_rewards({"localization": [0.3, 0.6]}, 1, weights=WEIGHTS), torch.tensor([[0.3], [0.6]])
    )


@pytest.mark.parametrize("norm", ["max", "none", "zscore"])
def test_none_leaves_the_term_out(norm):
    with_none = combine_rewards(
        {"relevance": [0.5, 0.9], "vision_relevance": [None, None]}, 2, weights=WEIGHTS, norm=norm
    )
    without = combine_rewards({"relevance": [0.5, 0.9]}, 2, weights=WEIGHTS, norm=norm)
    torch.testing.assert_close(with_none, without)


@pytest.mark.parametrize("norm", ["max", "none", "zscore"])
def test_none_is_the_mean_of_the_others_and_not_the_worst(norm):
    mixed = combine_rewards({"localization": [0.8, None, 0.4, 0.6]}, 4, weights=WEIGHTS, norm=norm)
    known = combine_rewards({"localization": [0.8, 0.4, 0.6]}, 3, weights=WEIGHTS, norm=norm)
    torch.testing.assert_close(mixed[:, [0, 2, 3]], known)
    torch.testing.assert_close(mixed[0, 1], known.mean())


def test_ppo_gives_a_question_without_a_value_the_mean_of_all_ranks_and_not_0():
    values = {"relevance": [0.9, None, None, None], "mine": [None, 1.0, None, None]}
    terms = normalised_terms(values, 2, missing=math.nan)
    both = filled_over_queries(terms, lambda *own: [(number + other) / 2 for number, other in zip(own, (0.6, 2, 0, 0))])
    torch.testing.assert_close(both["relevance"], torch.tensor([[0.9, 0.9], [0.6, 0.6]], dtype=torch.float64))
    assert both["mine"].eq(1).all()
    nowhere = filled_over_queries({"mine": torch.full((2, 1), math.nan)}, lambda *own: list(own))
    assert nowhere["mine"].eq(0).all()
    assert scored_answers(values, {"relevance": 1.0, "mine": 0.0}).tolist() == [True, False, False, False]
    assert scored_answers(values, {"relevance": 0.0, "mine": 0.0}).all()


def test_zscore_and_none():
    torch.testing.assert_close(
        combine_rewards({"localization": [0.0, 1.0]}, 2, weights=WEIGHTS, norm="zscore"), torch.tensor([[-1.0, 1.0]])
    )
    torch.testing.assert_close(
        combine_rewards({"localization": [0.2, 0.4]}, 2, weights={"localization": 2.0}, norm="none"),
        torch.tensor([[0.4, 0.8]]),
    )
    assert combine_rewards({"localization": [0.5, 0.5]}, 2, weights=WEIGHTS, norm="zscore").eq(0).all()


def test_a_users_own_reward_is_found_by_module_and_name(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def short(prompts, completions, **columns):\n    return [1 / (1 + len(text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert call(REWARDS.get("my_rewards:short"), ["", "abc"], NODULE) == [1.0, 0.25]
    with pytest.raises(UsageError, match="has no 'long'"):
        REWARDS.get("my_rewards:long")
    with pytest.raises(UsageError, match="Did you mean 'localization'"):
        REWARDS.get("localisation")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": [0.1, 0.2], "b": [0.1]}, "one value for each candidate"),
        ({"a": [0.1, 0.2, 0.3]}, "one value for each candidate"),
        ({"a": [0.1, float("nan")]}, "reward 'a' returned nan"),
    ],
)
def test_a_reward_that_gives_too_few_values_or_no_number_is_an_error(values, message):
    with pytest.raises(UmedError, match=message):
        combine_rewards(values, 2, weights=dict.fromkeys(values, 1.0))


NEW_REWARD = """
from umed_plugin.rewards.contract import register_reward

@register_reward("brevity", max_normalised=True, least_maximum=0.3)
def brevity(prompts, completions, **columns):
    return [1 / (1 + len(text)) for text in completions]
"""
USE_IT = """
import dataclasses, sys
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.names import SHIPPED_REWARDS
from umed_plugin.flags.rewards import find_reward_faults
assert not {"numpy", "torch"} & set(sys.modules), "the flags know the names without importing the rewards"
flags = UmedFlags(umed_stage="rewarding", umed_rewards="localization,brevity")
print(find_reward_faults(flags, imported=True), find_reward_faults(UmedFlags(umed_rewards="brevety"), imported=True))
print([flag.metadata["help"] for flag in dataclasses.fields(flags) if flag.name == "umed_rewards"])
from umed_plugin.rewards import REWARDS, brevity, make_rewards, normalisation_of
made = make_rewards(flags, ".")
print(made["brevity"] is brevity, brevity(["q"], ["abc"]), normalisation_of(made), set(REWARDS) == set(SHIPPED_REWARDS))
"""


def test_one_new_file_is_a_new_reward_for_flags_help_errors_and_runs(tmp_path):
    shutil.copytree(ROOT / "umed_plugin", tmp_path / "umed_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "umed_plugin" / "rewards" / "terms" / "brevity.py").write_text(NEW_REWARD)
    command = [sys.executable, "-c", USE_IT]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    faults, help_text, made = done.stdout.splitlines()
    assert faults.startswith("[] [") and "Did you mean 'brevity'?" in faults
    assert ", ".join(sorted({*SHIPPED_REWARDS, "brevity"} - set(PAPER_REWARDS))) in help_text
    normalised = {"max_normalised": ["localization", "brevity"], "least_maxima": {"localization": 0.0, "brevity": 0.3}}
    assert made == f"True [0.25] {normalised} True"


@pytest.mark.parametrize("module", ["contract", "combine"])
def test_the_example_of_the_docstring_runs(module):
    """In a separate process, because one of them registers a reward."""
    code = f"import doctest, umed_plugin.rewards.{module} as m; print(*doctest.testmod(m))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "2"], done.stdout


class Counting:
    """A reward as a callable object with state."""

    max_normalised = True
    least_maximum = 0.3

    def __call__(self, prompts, completions, **columns):
        return [0.0 for _ in completions]


class Slotted:
    """A reward whose objects take no further attributes."""

    __slots__ = ("limit",)

    def __call__(self, prompts, completions, **columns):
        return [0.0 for _ in completions]


@pytest.fixture
def registered(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))
    return REWARDS


def test_functions_objects_and_classes_can_be_registered(registered):
    def short(prompts, completions, **columns):
        return [0.0 for _ in completions]

    class Fresh(Counting):
        pass

    given = {"short": short, "counting": Counting(), "fresh": Fresh}
    for name, reward in given.items():
        assert register_reward(name, max_normalised=False, least_maximum=0.5)(reward) is reward
        assert registered.get(name) is reward
    assert normalisation_of(given) == {"max_normalised": [], "least_maxima": dict.fromkeys(given, 0.5)}
    assert (Counting.max_normalised, Counting.least_maximum) == (True, 0.3)


def test_attributes_that_the_reward_has_are_kept_where_no_argument_is_given(registered):
    given = {"object": Counting(), "class": type("Own", (Counting,), {}), "slotted": Slotted()}
    for name, reward in given.items():
        register_reward(name)(reward)
    assert normalisation_of(given) == {
        "max_normalised": ["object", "class"],
        "least_maxima": {"object": 0.3, "class": 0.3, "slotted": 0.0},
    }
    half = register_reward("half", least_maximum=0.1)(Counting())
    assert (half.max_normalised, half.least_maximum) == (True, 0.1)


@pytest.mark.parametrize("reward", [Slotted(), len, Counting().__call__], ids=["slots", "builtin", "method"])
def test_a_reward_that_takes_no_attributes_is_told_what_to_do(registered, reward):
    with pytest.raises(
        TypeError, match=r"reward 'mine': max_normalised cannot be set on .* Define `max_normalised = True`"
    ):
        register_reward("mine", max_normalised=True)(reward)
    assert "mine" not in registered


def test_the_name_of_a_shipped_reward_is_refused_at_the_users_line(tmp_path):
    (tmp_path / "my_rewards.py").write_text(NEW_REWARD.replace('"brevity"', '"localization"'))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", "import my_rewards"], env=environment, capture_output=True, text=True)
    assert "ValueError: reward 'localization' is registered already, as <function localization" in done.stderr
    assert 'my_rewards.py", line 4' in done.stderr


class New:
    metric_names = ("own/new",)

    def metrics(self):
        return {"own/new": 1.0}


class Old:
    """Uses the older names, and has an unrelated attribute with a name of today."""

    measures, metrics = ("own/old",), [3]

    def measured(self):
        return {"own/old": 2.0}


def test_metrics_of_ones_own_rewards_are_read_under_new_and_old_names():
    rewards = {"new": New(), "old": Old(), "silent": localization}
    assert reward_metric_names(rewards) == ["own/new", "own/old"]
    assert collect_metrics(rewards) == {"own/new": 1.0, "own/old": 2.0}


def test_methods_of_these_names_are_left_alone_in_rewards_that_announce_no_metrics():
    class Unrelated:
        def metrics(self, needed):
            raise AssertionError("not the plugin's to call")

        def measured(self, needed):
            raise AssertionError("not the plugin's to call")

    rewards = {"unrelated": Unrelated()}
    assert reward_metric_names(rewards) == []
    assert collect_metrics(rewards) == {}


def test_a_metric_that_was_not_announced_is_an_error_that_names_it():
    reward = New()
    reward.metric_names = ()
    with pytest.raises(
        UmedError, match=r"reward 'mine': metrics\(\) returned own/new, which its attribute `metric_names`"
    ):
        collect_metrics({"mine": reward})
