"""Words of side in a mirrored study."""

from __future__ import annotations

import pytest

from umed_plugin.grounding.side_words import mirrored_text, names_place, names_side


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("A nodule in the left upper lobe.", "A nodule in the right upper lobe."),
        ("Right lung: clear. LEFT LUNG: effusion.", "Left lung: clear. RIGHT LUNG: effusion."),
        ("left-sided, right-sided, leftmost, rightward, left-hand", "right-sided, left-sided, rightmost, leftward, right-hand"),
        ("upper_left and lower-right", "upper_right and lower-left"),
        ("It lies in the left centre at [0.10, 0.40, 0.30, 0.60].", "It lies in the right centre at [0.10, 0.40, 0.30, 0.60]."),
        ("Bright copyright, cleft lip; nothing leftover.", "Bright copyright, cleft lip; nothing leftover."),
        ("All right. Right away the left one.", "All right. Right away the right one."),
        ("On the right in front; to the left, below it.", "On the left in front; to the right, below it."),
        ("The stent was left in place on the left.", "The stent was left in place on the right."),
        ("The nodule has left the hilum of the left lung.", "The nodule has left the hilum of the right lung."),
        ("Surgery has not left a scar; it had left no clip.", "Surgery has not left a scar; it had left no clip."),
        ("The chest has left pleural effusion.", "The chest has right pleural effusion."),
        ("It had left and right effusions.", "It had right and left effusions."),
        ("The left wound was left open.", "The right wound was left open."),
        ("It was left unresected, as the left unaffected lobe.", "It was left unresected, as the right unaffected lobe."),
        ("On the left a nodule, upper left the hilum.", "On the right a nodule, upper right the hilum."),
        ("Left the lung is clear.", "Right the lung is clear."),
        ("The mass is left of the spine.", "The mass is right of the spine."),
        ("\u5de6\u80ba\u7ed3\u8282\uff0c\u53f3\u80ba\u6e05\u6670", "\u53f3\u80ba\u7ed3\u8282\uff0c\u5de6\u80ba\u6e05\u6670"),
        ("L4 and T12 are intact.", "L4 and T12 are intact."),
        ("LI-RADS 5, LN, LGG, LDH, RBC; \u03b2 of 1:2.", "LI-RADS 5, LN, LGG, LDH, RBC; \u03b2 of 1:2."),
        ("Re-demonstrated left RSV pneumonia.", "Re-demonstrated right RSV pneumonia."),
    ],
)  # fmt: skip
def test_left_and_right(text: str, mirrored: str) -> None:
    assert mirrored_text(text, ["left_right"]) == mirrored
    assert mirrored_text(mirrored, ["left_right"]) == text
    assert mirrored_text(text, []) == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Seen at 2:30 p.m.",
            "Ratio 1:10",
            "A 24 h follow-up",
            "in 3 positions",
            "um 9 Uhr",
            "14:10 Uhr",
            "KL 3",
            "kl. 10.30",
        ),
        *(
            "Dementia with Lewy bodies",
            "Lewy body disease",
            "LMS",
            "LMS of the uterus",
            "The dx is glioma",
            *("Suspicion is high.", "Lung volumes are low.", "Please follow this up with CT.", "Follow up in 3 weeks."),
            *(
                "Image quality is low, but diagnostic.",
                "Lesion is high in T2 signal.",
                "The lesion lights up after contrast.",
            ),
            *("It has gone down in size.", "Scaled down from 6 to 5 mm.", "high-riding patella", "low-lying placenta"),
            *("Down-beat nystagmus", "blow-up fracture"),
            "a dx of glioma",
        ),
        *("\u540c\u65f6\u4f4d\u4e8e\u80ba", "\u4e0b\u53483\u70b9", "3\u6642\u9593\u5f8c", "\u4ee5\u4e0b3\u70b9\uff1a"),
    ],
)
def test_times_ratios_and_names_are_no_sides(text: str) -> None:
    assert mirrored_text(text, ["left_right"]) == text and not names_side(text, "left_right")


def test_up_and_down() -> None:
    text = "Upper left, at the top; below the LOWER edge, uppermost."
    assert mirrored_text(text, ["up_down"]) == "Lower left, at the bottom; above the UPPER edge, lowermost."
    assert mirrored_text(text, ["left_right", "up_down"]) == (
        "Lower right, at the bottom; above the UPPER edge, lowermost."
    )
    for plain in ("The above-mentioned cyst.", "an area of lower density", "at the upper limits of normal"):
        assert mirrored_text(plain, ["up_down"]) == plain


@pytest.mark.parametrize(
    "text",
    [
        "RML opacity",
        "nodule (L)",
        "Lt. lung",
        "at 3 o'clock",
        "at 10:30 o\u2019clock",
        "dextrocardia",
        "OD",
        "linke Lunge",
        "what is left of the lung",
        "The nodule is left.",
        "The nodule is right.",
        "The lesion was left, near the hilum",
        "It is left",
        "Surgery left a scar",
        "Has the nodule left the hilum?",
        "There is nothing left to see",
        "The drain was left in the pleura",
        "The lungs are left unchanged and right clear.",
        "Atelectasis is left without effusion.",
        "There is left unopacified lung.",
        "right next to the heart",
        "a fracture right below the joint",
        "mass in the RIF",
        "stenosis of the LICA",
        *("at nine o'clock", "the 9-o'clock position", "the 9:00 position", "a lesion at 10 H", "turned clockwise"),
        *("LMB", "LAA", "LCx", "LPO view", "RAO view", "Lft lung", "rll opacity", "LLD", "RHA", "LSPV", "LUOQ", "RVOT"),
        *(
            "lobo sup. izq.",
            "hemit\u00f3rax dcho",
            "li. Lunge",
            "re. Lunge",
            "Linksherz",
            "polmone dx",
            "h\u00f6ger lunga",
        ),
        *(
            "\u043b\u0435\u0432\u043e\u0433\u043e \u043b\u0435\u0433\u043a\u043e\u0433\u043e",
            "\uc67c\ucabd \ud3d0",
            "3\u70b9\u949f",
        ),
        *("3\u70b9\u65b9\u5411", "3\u70b9\u4f4d", "9\u70b9\u5904", "9\u70b9\u3002", "3\u6642\u306e\u4f4d\u7f6e"),
        *(
            "bei 9 Uhr",
            "9-Uhr-Position",
            "op 3 uur",
            "\u00e0 9 heures",
            "alle ore 3",
            "a las 3",
            "\u00e0s 3 horas",
            "kl. 3",
        ),
        *(
            "9h position",
            "at the 3 position",
            "the 10:30 direction",
            "position 3:00",
            "LMS stenosis",
            "lobo sup dx",
            "rene (sx)",
            "p\u0142at lewy",
        ),
    ],
)
def test_sides_that_cannot_be_turned_with_certainty(text: str) -> None:
    assert mirrored_text(text, ["left_right"]) is None
    assert names_side(text, "left_right")


@pytest.mark.parametrize(
    "text",
    [
        *("the upper lobe", "superior to it", "the anterior wall", "both apices", "at 12 o'clock", "lower-limb oedema"),
        *(
            "superolateral to it",
            "inferomedial",
            "the topmost clip",
            "the higher one",
            "the highest dome",
            "the lowest rib",
        ),
        *(
            "a drug to lower the pressure",
            "nodules below 5 mm",
            "above the threshold",
            "on top of that",
            "its upper limit",
        ),
    ],
)
def test_anatomy_that_an_up_down_mirroring_would_make_false(text: str) -> None:
    assert mirrored_text(text, ["up_down"]) is None


def test_which_texts_name_a_side_or_a_place() -> None:
    assert names_side("left atrium", "left_right") and not names_side("left atrium", "up_down")
    assert not names_side("pleural effusion", "left_right")
    assert (
        names_place("in the centre")
        and names_place("Top: clear")
        and names_place("\u0441\u043b\u0435\u0432\u0430")
        and not names_place("A cyst at [0.1, 0.2, 0.3, 0.4].")
    )


ACROSS = [
    "in the west part",
    "northeast",
    "the south-western corner",
    "column A",
    "the 2nd column",
    "the first quadrant",
]
DOWN = [
    "northern",
    "northeast",
    "up",
    "further down",
    "high in the image",
    "it lies low",
    "very high",
    "high or low?",
    "Low.",
]
DOWN += [
    "lies very low",
    "far up",
    "up in the neck",
    "the ceiling",
    "atop",
    "row 2",
    "the 3rd row",
    "the first quadrant",
]


def test_words_of_place_that_no_mirroring_turns() -> None:
    assert [text for text in ACROSS if mirrored_text(text, ["left_right"]) is not None] == []
    assert [text for text in DOWN if mirrored_text(text, ["up_down"]) is not None] == []


@pytest.mark.parametrize(
    "text",
    [
        *(*ACROSS, *DOWN, "upward", "downwards", "along both edges", "in the corners", "peripheral", "halfway"),
        "in the outer part",
        # What mirroring is unsure of.
        *("links oben", "Lado izquierdo", "en haut \u00e0 gauche", "3-o'clock axis", "at 3 o\u2019clock", "10:00 position"),
        *("RUL", "L-sided effusion", "Rt. kidney", "dexter lobe", "superior", "under the clavicle", "3\u70b9\u949f", "Side: R"),
        *("mittig", "am Rand", "au milieu", "in het midden", "en el centro", "\u53f3\u4e0a\u89d2", "\u8fb9\u7f18"),
    ],
)  # fmt: skip
def test_words_of_place(text: str) -> None:
    assert names_place(text) and names_place(f"A cyst, {text}, at [0.1, 0.2, 0.3, 0.4].")


@pytest.mark.parametrize(
    "text",
    [
        *("Is there anything abnormal?", "A follow-up in 3 weeks.", "The work-up", "up to 5 mm", "up-to-date", "Down syndrome"),
        *("Down's syndrome", "West syndrome", "a Western blot", "a high-grade glioma", "low density", "high signal on T2"),
        *("It lies in low density", "high in signal", "Is it a cyst or a nodule?", "L4 and T12 are intact.", "in 3 positions"),
        "The dx is glioma",
        *("Suspicion is high.", "Lung volumes are low.", "Please follow this up with CT.", "Follow up in 3 weeks."),
        *("Image quality is low, but diagnostic.", "Lesion is high in T2 signal.", "The lesion lights up after contrast."),
        *("It has gone down in size.", "Scaled down from 6 to 5 mm.", "high-riding patella", "low-lying placenta"),
        *("Down-beat nystagmus", "blow-up fracture"),
    ],
)  # fmt: skip
def test_no_words_of_place(text: str) -> None:
    assert not names_place(text)
    assert mirrored_text(text, ["left_right", "up_down"]) == text


def test_a_point_of_the_compass_in_the_name_of_a_class_is_no_side() -> None:
    assert not names_side("Middle East respiratory syndrome", "left_right")
