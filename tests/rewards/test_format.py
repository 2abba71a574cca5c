"""The reward `format`: the answers of a good writer score 1, and each way to lose form lowers the score."""

from __future__ import annotations

import doctest
import importlib
import random

import pytest

from umed_plugin.data.template_writer import write_conversation
from umed_plugin.data.templates import NEGATIVES, PHRASINGS
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.grounding.claims import number_said, says_normal, sides_said
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.wording import Wording, faulty_words, language, repeated_words
from umed_plugin.rewards import REWARDS, make_rewards
from umed_plugin.rewards.terms.format import LEAST_RECORDS

SQUARE = ImageGeometry(100, 100)
TERMS = {"tumor": ["brain tumor", "tumor", "tumour"], "cyst": ["cyst", "cystic change"]}
GARBLED = "r with areain t there0. The at [0. tumor. b isain tumor.c2 occupies:m], in the right centre."
NORMAL = "The image looks normal: there is no finding to mark."


def study(seed: int) -> dict:
    """A record of our writer with 0 to 3 lesions that lie apart."""
    draw = random.Random(seed)
    boxes = [
        [x := draw.uniform(33 * i, 33 * i + 10), y := draw.uniform(0, 60), x + 20, y + 30] for i in range(seed % 4)
    ]
    record = {"id": seed, "terms": TERMS, "objects": {"ref": ["tumor", "cyst", "tumor"][: seed % 4], "bbox": boxes}}
    return record | {"conversations": write_conversation(record, SQUARE, draw)}


STUDIES = [study(seed) for seed in range(200)]


def scored(text: str, record: dict = STUDIES[1], reward=None) -> float:
    (value,) = (reward or REWARDS.get("format"))(["Where?"], [text], record=[record], geometry=[SQUARE])
    return value


@pytest.fixture(scope="module")
def of_run():
    """The reward of a run, which has read the references of all studies but the first 40."""
    flags = UmedFlags(umed_stage="rewarding", umed_rewards="format")
    return make_rewards(flags, ".", STUDIES[40:])["format"]


def test_every_phrasing_of_our_writer_scores_1(of_run):
    texts = [record["conversations"][1]["value"] for record in STUDIES]
    assert all(any(phrasing.single in text for text in texts) for phrasing in PHRASINGS) and set(NEGATIVES) <= set(
        texts
    )
    for record, text in zip(STUDIES, texts):
        assert scored(text, record) == 1, text
        assert scored(text, record, of_run) == 1, text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A tumor at [0.10, 0.20, 0.30, 0.40].", 1.0),
        ("A tumor at [0.10, 0.20, 0.30, 0.40] and a cyst at [0.60, 0.20, 0.80, 0.40].", 1.0),
        (
            "A 3-cm T2-hyperintense tumour (grade II) at [0.10, 0.20, 0.30, 0.40], e.g. at C5-C6: a) solid b) 50% cystic.",
            1.0,
        ),
        ("No, nothing abnormal.", 1.0),
        ("No tumor.", 1.0),
        ("A tumor.", 0.5),  # no box
        ("A tumor and a cyst at [0.10, 0.20, 0.30, 0.40].", 0.75),  # a box for one of two
        ("A tumor at [0.30, 0.20, 0.10, 0.40].", 0.5),  # no area
        ("A tumor at [0.10, 0.20, 1.30, 0.40].", 0.5),  # outside
        ("A tumor at [0.10, 0.20, 0.30", 0.5),  # cut off
        ("A tumor at [0.10, 0.20, 0.30, 0.40], [0.60, 0.20, 0.30, 0.40].", 0.75),  # one of two boxes has no area
        ("A tumor at [0.10, 0.20, 0.30, 0.40], or [0.10, 0.20, 0.30, 0.40].", 0.75),  # the same box again
        ("Something at [0.10, 0.20, 0.30, 0.40].", 0.5),  # names nothing
        ("The image is normal at [0.10, 0.20, 0.30, 0.40].", 0.5),
        ("The weather is fine.", 0.5),
        ("Tumor, tumor, tumor.", 1 / 6),  # nothing but repeated, and no box
        ("A tumor lies here. A tumor lies here.", 0.25),  # clean, and half of it repeated
        ("Zorp wombat tumor plim gorf.", 0.5),  # invented words are only found beside the references of a run
        ("tumor. tumor. tumor.", 0.0),  # and no sentence begins in small letters
        ("[0.10, 0.20, 0.30, 0.40]", 0.0),
        ("", 0.0),
    ],
)
def test_answers_by_hand(text, value):
    assert scored(text) == pytest.approx(value)


def test_the_garbled_answer_is_below_every_clean_one(of_run):
    clean = ["brain tumor", "tumor", "A cyst.", NORMAL, *(record["conversations"][1]["value"] for record in STUDIES)]
    for reward in (None, of_run):
        assert scored(GARBLED, reward=reward) == 0 < 0.5 <= min(scored(text, reward=reward) for text in clean)


@pytest.mark.parametrize("how", ["letters", "words"])
def test_a_text_loses_its_form_with_its_letters_and_with_its_order(how, of_run):
    """A sixth of the letters is lost, or the words are shuffled. All stay below the worst clean answer."""
    for seed, record in enumerate(STUDIES[:40]):
        draw, text = random.Random(seed), record["conversations"][1]["value"]
        parts = list(text) if how == "letters" else text.split()
        if how == "words" and len(parts) < 10:
            continue  # a few words may come next to each other again by chance
        if how == "words":
            draw.shuffle(parts)
        else:
            parts = [part for part in parts if draw.random() > 1 / 6]
        garbled = ("" if how == "letters" else " ").join(parts)
        assert scored(garbled, record, of_run) < 0.5, garbled


def test_a_few_records_show_no_wording():
    flags = UmedFlags(umed_stage="rewarding", umed_rewards="format")
    few = make_rewards(flags, ".", STUDIES[: LEAST_RECORDS - 1])["format"]
    many = make_rewards(flags, ".", STUDIES[:LEAST_RECORDS])["format"]
    strange = (
        "The finding is located at [0.10, 0.20, 0.30, 0.40], in the upper left. Its appearance suggests uvox tumor."
    )
    assert scored(strange, reward=few) > scored(strange, reward=many)


def test_words_of_the_references_are_never_faulty():
    assert faulty_words("A pT2N0 tumor.") == ["pT2N0"]
    assert faulty_words("A pT2N0 tumor.", {"pt2n0"}) == []
    assert faulty_words("A pT2N0 tumor.", wording=Wording.of(["Stage pT2N0: a tumor."])) == []


@pytest.mark.parametrize(
    ("text", "faulty"),
    [
        ("see there0 now", ["there0"]),
        ("a tumor.c2 lies", ["tumor.c2"]),
        ("It is b large.", ["b"]),
        ("It is xrqz large.", ["xrqz"]),
        ("It is laaarge.", ["laaarge."]),
        ("It lies. then it ends.", ["then"]),
        ("It lies (here.", ["("]),
        ("It lies at [0.1, 0.2, 0.3, 0.4]. It is 3 cm wide, i.e. small; see Fig. a and vs. b) here.", []),
    ],
)
def test_words_that_are_none(text, faulty):
    assert faulty_words(text) == faulty


def test_language_falls_with_the_share_of_faulty_words():
    words = "It is one large and solid tumor"
    assert language(f"{words}.") == 1
    assert language(f"{words} b.") == pytest.approx(1 - 4 / 8)
    assert language("b c d") == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("the nodule the nodule lies here", 2),
        ("It is a nodule. Here it is. It is a nodule.", 4),
        ("It lies at [0.1, 0.1, 0.3, 0.3].", 0),
        ("At [0.1, 0.2, 0.3, 0.4] and [0.5, 0.2, 0.7, 0.4].", 0),
    ],
)
def test_words_that_only_repeat_others(text, count):
    assert repeated_words(text) == count


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        *((text, True) for text in NEGATIVES),
        ("No.", True),
        ("Normal.", True),
        ("There is no evidence of disease.", True),
        ("The image is not normal: there is a single finding.", False),
        ("A cyst. There is no other abnormality, and otherwise the heart is normal.", False),
        ("No doubt this lesion is a cyst.", False),
        ("Nothing else is abnormal.", False),
    ],
)
def test_what_says_that_the_image_is_normal(text, normal):
    assert says_normal(text, TERMS) is normal


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("There are three regions that look abnormal.", 3),
        ("In total 12 abnormalities are present.", 12),
        ("I detect one area of concern.", 1),
        ("Two tumors.", 2),
        ("One of the two lesions is a cyst.", 2),
        ("A grade 2 lesion of 3 cm.", None),
        ("An abnormality is present.", None),
    ],
)
def test_the_number_that_a_text_says(text, number):
    assert number_said(text, TERMS) == number


MODULES = (
    *("grounding.wording", "grounding.claims", "grounding.terms", "grounding.boxes", "flags.weights"),
    *("rewards.terms.format", "rewards.terms.consistency", "rewards.terms.localization_curriculum"),
)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_the_docstrings_run(module):
    failed, tried = doctest.testmod(importlib.import_module(f"umed_plugin.{module}"))
    assert failed == 0 and tried > 0


def test_sides_belong_to_the_nearest_box_of_their_sentence():
    said = sides_said(
        "The first lies in the upper left of the image at [0.1, 0.1, 0.3, 0.3]. The second is located at [0.5, 0.7, 0.7, 0.9], "
        "in the lower centre. The left upper lobe at [0.7, 0.1, 0.8, 0.2] is "
        "clear. In the upper right."
    )
    assert [(side.words, side.box) for side in said] == [("upper left", 0), ("lower centre", 1)]
    assert said[0].fits(0.2, 0.2) and not said[0].fits(0.8, 0.2) and not said[0].fits(0.2, 0.8)
    assert said[1].fits(0.6, 0.8) and not said[1].fits(0.9, 0.8)
