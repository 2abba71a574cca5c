"""The reward `format`: the answers of a good writer score 1, and each way to lose form lowers the score."""

from __future__ import annotations

import doctest
import importlib
import random
import time
import unicodedata

import pytest

from umed_plugin.data.recipes.recipe import load_recipe, shipped_recipes
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


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_name_of_a_shipped_recipe_scores_1(name, of_templates):
    """Beside references that do not have it: a run of one class learns nothing of the other names."""
    recipe = load_recipe(name)
    for seed, (plain, synonyms) in enumerate(recipe.names.items() if hasattr(recipe, "classes") else ()):
        record = study(4 * seed + 1) | {"terms": {plain: synonyms}}
        record["objects"] = {**record["objects"], "ref": [plain]}
        record["conversations"] = write_conversation(record, SQUARE, random.Random(seed))
        text = record["conversations"][1]["value"]
        assert scored(text, record) == scored(text, record, of_templates) == 1, text


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
        ("Zorp wombat tumor plim gorf.", 0.5),  # invented words are not told from new ones
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


TEMPLATED = [study(seed) for seed in range(48)]  # the references of the demo, a few templates again and again

# In words that the references of templates lack. None names a class of the study, so 0.5 is the most that they can have.
CLEAN = (
    "The image shows no focal lesion.",
    "A well-defined calcification can be identified within the right upper quadrant [0.55, 0.10, 0.70, 0.25].",
    "There is no acute cardiopulmonary process.",
    "Both lungs are clear without consolidation, pleural effusion or pneumothorax.",
    "A spiculated nodule measuring 12 mm is seen in the left lower lobe [0.20, 0.60, 0.35, 0.75].",
    "The cardiac silhouette is mildly enlarged.",
    "Several hypodense foci are scattered throughout the hepatic parenchyma.",
    "Findings are suspicious for metastatic disease; biopsy should be considered.",
    "A sessile polyp protrudes from the colonic mucosa [0.30, 0.30, 0.50, 0.55].",
    "Ring enhancement surrounds a necrotic core in the temporal lobe.",
    "Nothing suspicious was discovered on this radiograph.",
    "We observe diffuse thickening of the bladder wall.",
    "An ill-defined opacity obscures the right heart border [0.40, 0.45, 0.60, 0.70].",
    "Degenerative changes affect the thoracic spine.",
    "Compared with normal tissue, this zone looks brighter.",
    "The kidney contains an obstructing stone, roughly 8 mm wide.",
    "My best guess would be glioblastoma.",
    "A small well-circumscribed rounded lesion with central fluid attenuation occupies the right hepatic lobe.",
    # Of the references' own words, in other sentences.
    "The picture is not normal: in the lower right region there is an area of concern, and I think it is a mass.",
    "There is a mass in the upper left region of the image, and the diagnosis is most likely a metastasis.",
    "Yes, the study is abnormal, and there are two areas to mark.",
    "I see one abnormal finding here. It is in the centre, and the box marks it.",
    # In other languages.
    "Im rechten Oberlappen zeigt sich eine unscharf begrenzte Verschattung [0.20, 0.10, 0.40, 0.30].",
    "Kein Nachweis eines Pleuraergusses oder eines Pneumothorax.",
    "Die Leber ist vergr\u00f6\u00dfert und enth\u00e4lt mehrere Zysten.",
    "Unauff\u00e4lliger Befund ohne Hinweis auf eine Raumforderung.",
    "Man erkennt einen gestielten Polypen an der Darmwand [0.30, 0.30, 0.50, 0.55].",
    "Das Herz ist normal gro\u00df, die Lungen sind frei bel\u00fcftet.",
    "Verdacht auf eine Metastase im linken Stirnlappen.",
    "Beidseits finden sich streifige Verdichtungen, am ehesten narbig.",
    "Une opacit\u00e9 mal limit\u00e9e occupe le lobe sup\u00e9rieur droit.",
    "El h\u00edgado y el bazo no muestran lesiones focales.",
    "Si osserva un nodulo nel lobo inferiore sinistro e un versamento a destra.",
    "\u80ba\u90e8\u672a\u89c1\u660e\u663e\u5f02\u5e38\u3002",
    "\u5de6\u80ba\u4e0a\u53f6\u53ef\u89c1\u4e00\u7ed3\u8282\uff0c\u8fb9\u754c\u6e05\u695a\u3002",
    "\u0412 \u043f\u0440\u0430\u0432\u043e\u043c \u043b\u0451\u0433\u043a\u043e\u043c "
    "\u0435\u0441\u0442\u044c \u043e\u0447\u0430\u0433.",
)


@pytest.fixture(scope="module")
def of_templates():
    """The reward of a run whose 200 references are those of 48 records."""
    return make_rewards(UmedFlags(umed_stage="rewarding", umed_rewards="format"), ".", (TEMPLATED * 5)[:200])["format"]


@pytest.mark.parametrize("text", CLEAN)
def test_clean_language_in_other_words_keeps_its_half(text, of_templates, of_run):
    decomposed = unicodedata.normalize("NFD", text)
    for reward in (None, of_templates, of_run):
        assert scored(text, reward=reward) >= 0.5 and scored(decomposed, reward=reward) >= 0.5


def lose_letters(text, draw):
    return "".join(letter for letter in text if draw.random() > 1 / 6)


def lose_spaces(text, draw):
    return "".join("" if letter == " " and draw.random() < 0.5 else letter for letter in text)


def shuffled(text, draw):
    words = text.split()
    draw.shuffle(words)
    return " ".join(words)


def repeated(text, draw):
    return " ".join(word for word in text.split() for _ in range(draw.choice((2, 3))))


@pytest.mark.parametrize("garble", [lose_letters, lose_spaces, shuffled, repeated])
def test_a_garbled_reference_is_below_clean_language(garble, of_templates):
    """A short text may lose little, such as one letter of one word. Of ten words or more, nearly all are found."""
    values = []
    for number, record in enumerate([*TEMPLATED, *STUDIES[48:148]]):
        text = record["conversations"][1]["value"]
        if len(text.split()) >= 10:
            values += [scored(garble(text, random.Random(f"{number} {n}")), record, of_templates) for n in range(3)]
    assert len(values) > 300 and sum(value < 0.5 for value in values) > 0.94 * len(values)
    assert sum(values) / len(values) < 0.25


@pytest.mark.parametrize("garble", [lose_letters, lose_spaces, shuffled, repeated])
def test_garbling_other_words_never_pays(garble, of_templates):
    for number, text in enumerate(CLEAN):
        assert scored(garble(text, random.Random(number)), reward=of_templates) <= scored(text, reward=of_templates)


def test_a_word_salad_of_the_references_words_is_below_clean_language(of_templates):
    salad = "The lower of the area calcification with an is. the which lies of the in a the image a of."
    assert scored(salad, reward=of_templates) < 0.4
    words = sorted({word for record in TEMPLATED for word in record["conversations"][1]["value"].split()})
    for seed in range(50):
        text = " ".join(random.Random(seed).choices(words, k=20))
        assert scored(text, reward=of_templates) < 0.5, text


def test_words_of_many_references_are_compared_fast():
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghilmnoprstu", k=9)) for _ in range(6000)]
    wording = Wording.of([" ".join(words[:4000])])
    began = time.perf_counter()
    language(" ".join(words[4000:]), wording=wording)
    assert time.perf_counter() - began < 20


def test_a_few_records_show_no_wording():
    flags = UmedFlags(umed_stage="rewarding", umed_rewards="format")
    few = make_rewards(flags, ".", STUDIES[: LEAST_RECORDS - 1])["format"]
    many = make_rewards(flags, ".", STUDIES[:LEAST_RECORDS])["format"]
    damaged = "The fiding is loated at [0.10, 0.20, 0.30, 0.40], in theupper left. Its appearnce suggests tumor."
    assert scored(damaged, reward=few) == 1 and scored(damaged, reward=many) < 0.5


@pytest.mark.parametrize(
    ("text", "faulty"),
    [
        ("An uvox lies in the upper left.", []),  # a new word
        ("A fiding lies in the upper left.", []),  # one may be like theirs by chance
        ("A fiding lies in theupper left.", ["fiding", "theupper"]),
        ("A fiding lies in theupper lefft.", ["fiding", "theupper", "lefft."]),  # then new words are judged
        ("Finding and findings, region and regions, looks and look.", []),
    ],
)
def test_damaged_words_count_where_there_are_several(text, faulty):
    wording = Wording.of(
        [
            "A finding lies in the upper left.",
            "An area and regions that look normal.",
            "Findings and region, and looks.",
        ]
    )
    assert faulty_words(text, wording=wording) == faulty


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
