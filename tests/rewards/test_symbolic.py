"""The reward `symbolic:FILE`: hand-computed values, and the faults of a file."""

from __future__ import annotations

import pytest
import yaml
from support.llava_args import llava_args

from umed_plugin.data.image_files import evenly
from umed_plugin.errors import UmedError
from umed_plugin.flags.checks import find_faults
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.rewards import make_rewards
from umed_plugin.rewards.running import MOST_RECORDS
from umed_plugin.rewards.symbols import check_against, find_symbol_faults, read_symbols
from umed_plugin.training.run_settings import find_changes

FILE = {
    "steps": {
        "finding": {"nodule": ["nodule", "nodular opacity"], "none": ["normal", "nothing abnormal"]},
        "side": {"left": ["left"], "right": ["right"]},
        "diagnosis": {"cancer": ["cancer", "carcinoma"], "benign": ["benign", "hamartoma"], "healthy": ["healthy"]},
    },
    "cases": [
        {"finding": "nodule", "side": "any", "diagnosis": "cancer"},
        {"finding": "nodule", "side": "left", "diagnosis": "benign"},
        {"finding": "none", "diagnosis": "healthy"},
    ],
}
CANCER = "A nodule on the left, likely cancer."


def record(reference: str) -> dict:
    return {"conversations": [{"value": "What is it?"}, {"value": reference}]}


RECORDS = [record(CANCER), record("Nothing abnormal; healthy."), record("Nodule on the right: hamartoma.")]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "steps.yaml"
    path.write_text(yaml.safe_dump(FILE, sort_keys=False))
    return path


@pytest.fixture
def scored(file):
    name = f"symbolic:{file}"
    reward = make_rewards(UmedFlags(umed_stage="rewarding", umed_rewards=name), ".", RECORDS)[name]
    return lambda text, reference=CANCER: reward(["What?"], [text], record=[record(reference)])[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (CANCER, 1.0),
        ("A nodular opacity on the left: carcinoma.", 1.0),  # other words of the file
        ("A nodule on the right, likely cancer.", (2 + 2 + 1.5) / 6.5),  # c 1 0 1; any side goes with cancer
        (
            "A nodule on the right, benign.",
            (1 + 1 + 1.5) / 6.5,
        ),  # c 1 0 0; a nodule may lie right, benign ones only left
        ("A nodule, likely cancer.", (1 - 0.5 + 1 + 0 + 1.5) / 6.5),  # no side
        ("Not a nodule: no cancer.", 0.0),  # ruled out, so nothing is named
        ("zzz", 0.0),
        ("The image is normal; left side, healthy.", (1 + 2 + 1.5) / 6.5),  # wrong twice, and agrees with itself
        ("A nodule on the left and right, cancer.", (2 + 2 + 1.5) / 6.5),  # one side too many
    ],
)
def test_values_by_hand(text, value, scored):
    assert scored(text) == pytest.approx(value)


def test_steps_that_the_reference_does_not_take_are_left_out(scored):
    healthy = "Nothing abnormal; healthy."
    assert scored("The image is normal and healthy.", healthy) == 1
    assert scored("A nodule, benign.", healthy) == pytest.approx((0 + 1 + 1) / 4)
    assert scored(CANCER, "It is unclear.") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cases": [{"findin": "nodule"}]}, "cases[0]: unknown step 'findin'. Did you mean 'finding'"),
        ({"cases": [{"finding": "nodul"}]}, "cases[0].finding: unknown symbol 'nodul'. Did you mean 'nodule'"),
        ({"cases": [*FILE["cases"], FILE["cases"][1]]}, "cases[3]: equals cases[1]"),
        ({"cases": [{"side": "any"}]}, "cases[0]: allows every combination"),
        ({"cases": [*FILE["cases"], {"side": "any", "finding": "any"}]}, "cases[3]: allows every combination"),
        ({"cases": [{}, *FILE["cases"]]}, "cases[0]: allows every combination"),
        ({"cases": []}, "cases: found list"),
        (
            {"steps": {**FILE["steps"], "side": {"left": ["left"], "right": ["Left", "right"]}}},
            "'left' stands for both left and",
        ),
        (
            {"steps": {**FILE["steps"], "side": {"left": [], "right": ["right"]}}},
            "steps.side.left: needs one word or more",
        ),
        (
            {"steps": {**FILE["steps"], "side": {"any": ["left"], "left": ["l"]}}},
            "steps.side.any: `any` stands for every",
        ),
        ({"stages": {}}, "stages: unknown key 'stages'. Did you mean 'steps'"),
    ],
)
def test_faults_of_a_file_are_all_said_before_the_model_is_loaded(change, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({**FILE, **change}, sort_keys=False))
    (fault,) = find_symbol_faults(["relevance", f"symbolic:{path}"])
    assert message in fault and str(path) in fault


def test_all_faults_come_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    cases = [{"findin": "nodule"}, {"side": "lef"}, {"side": "left"}, {"side": "left"}]
    path.write_text(yaml.safe_dump({**FILE, "cases": cases}))
    (fault,) = find_symbol_faults([f"symbolic:{path}"])
    assert ": 3 faults" in fault
    path.write_text("steps: [")
    assert "not valid YAML" in find_symbol_faults([f"symbolic:{path}"])[0]


def test_a_step_that_no_reference_takes_is_named_with_examples(file):
    flags = UmedFlags(umed_stage="rewarding", umed_rewards=f"symbolic:{file}")
    with pytest.raises(UmedError, match=r"steps\.side: no reference of the 1 training records .*left, right.*healthy"):
        make_rewards(flags, ".", [record("Nodule or nothing abnormal: healthy, benign.")])


def test_a_step_whose_words_are_rare_is_found_in_any_record(file):
    """More records than a reward is shown by default, and the words in one that the even choice passes over."""
    flags = UmedFlags(umed_stage="rewarding", umed_rewards=f"symbolic:{file}")
    records = [record("Nothing abnormal; healthy.")] * (2 * MOST_RECORDS)
    with pytest.raises(UmedError, match=f"no reference of the {2 * MOST_RECORDS} training records"):
        make_rewards(flags, ".", records)
    records[-1] = record(CANCER)
    assert CANCER not in str(evenly(records, MOST_RECORDS))
    assert list(make_rewards(flags, ".", records)) == [f"symbolic:{file}"]


def test_records_are_read_until_each_step_is_found(file):
    read = []
    check_against(read_symbols(file), file, (read.append(one) or one for one in [record(CANCER)] * 50))
    assert len(read) == 1


def test_the_flag_needs_a_file_that_is_there(file):
    def faults(rewards):
        return find_faults(UmedFlags(umed_stage="rewarding", umed_rewards=rewards), *llava_args())

    assert faults(f"relevance,symbolic:{file}") == []
    assert faults("symbolic") == [
        "--umed_rewards symbolic: needs the file of its steps and cases, as in symbolic:steps.yaml."
    ]
    assert faults("symbolic:none.yaml") == ["--umed_rewards symbolic:none.yaml: there is no such file."]


@pytest.mark.llava
def test_a_resumed_run_compares_what_is_in_the_file(file, tmp_path):
    from umed_plugin.training.run_settings import settings_of

    def settings(path):
        return settings_of(UmedFlags(umed_stage="rewarding", umed_rewards=f"relevance,symbolic:{path}"))

    before, copy = settings(file), tmp_path / "copy.yaml"
    copy.write_text(file.read_text())
    assert find_changes(before, settings(copy)) == []
    copy.write_text(file.read_text() + "# changed\n")
    (change,) = find_changes(before, settings(copy))
    assert change.flag == "the file of --umed_rewards symbolic" and change.kind == "accepted"
