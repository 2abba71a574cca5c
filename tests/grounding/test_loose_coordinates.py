"""Coordinates that are in no box, and numbers that are none."""

from __future__ import annotations

import pytest

from umed_plugin.data.templates import NEGATIVES, PHRASINGS, QUESTIONS, whole_text
from umed_plugin.grounding.loose_coordinates import has_loose_coordinates


@pytest.mark.parametrize(
    "text",
    [
        "bbox: 0.25 0.22 0.47 0.44",
        "box 0.25,0.22,0.47,0.44",
        "coordinates 0.25 0.22",
        "[0.25, 0.22, 0.47]",
        "[25, 22, 47, 44] is the cyst",
        "<bin_25><bin_22>",
        "<25><22>",
        "centre (0.36, 0.33)",
        "At (0.36\uff0c0.33)",
        "[0.36, 0.33] is it",
        "(.36 .33)",
        "x=0.36, y=0.33",
        "y: 0.3; x: 0.2",
        "x=120, y=85",
        "centre (120, 85)",
        "at pixel (120, 85)",
        "(36%, 33%)",
        "36 % from the left, 33% from the top",
        "at 36% of the width",
        "40 px from the image's left edge",
        "0.36 across and 0.33 down",
        "0.36 in x and 0.33 in y",
        "Its centre lies 0.36 across. It is 0.33 down.",
        "centre 0,36; 0,33",
        "the point 0.36,0.33",
        "0.25-0.47 x 0.22-0.44",
        "a size of 0.05, at 0.36 and 0.33",
    ],
)
def test_coordinates_beside_boxes(text: str) -> None:
    assert has_loose_coordinates([text])
    assert has_loose_coordinates(["<image>\nWhat?", f"A cyst at [0.25, 0.22, 0.47, 0.44]; {text}"])


@pytest.mark.parametrize(
    "text",
    [
        "A cyst at [0.25, 0.22, 0.47, 0.44].",
        "Mark it as [x1, y1, x2, y2] in 0-1.",
        *("0.5 cm", "0.5 x 0.7 cm", "0.5 x 1.2 cm and 0.8 x 2.1 cm", "0.5cm, 0.3cm", "a 0.8-cm and a 0.5-cm node"),
        *("nodules of 0.5, 0.6 and 0.7 cm", "0.5 to 0.7 cm, 0.3 mm thick", "0.5 \u00d7 0.7 \u00d7 0.9 cm", "0.5%, 0.7 %"),
        "a 3 x 4 mm nodule (0.3 x 0.4 cm)",
        *("p = 0.03, p<0.05", "a ratio of 0.45, a score of 0.9", "SUVmax 0.8, SUV 0.9", "ADC of 0.8 and 0.9"),
        *("T-score -0.5 and -0.7", "Creatinine 0.9, INR 1.0", "0.7 ml/min, 0.7 mg/dl", "measuring 0.5 and 0.7"),
        *("12.03.2020, 0.5.2020", "version 0.1.2", "10:30", "1,000 cells, 1,000 more", "30 % and 50 % stenosis"),
        *("images (1, 2, 3, 4)", "grades (1, 2, 2, 3)", "BI-RADS 4 (2-95%)", "series 3, images 4 and 5", "<image>\n< 5 mm"),
        "only one number is at 0.36",
        *("Give boxes as [x1, y1, x2, y2] with coordinates between 0.0 and 1.0.", "normalized from 0.00 to 1.00"),
        *("numbers in the range [0.0, 1.0]", "(0,0) is the top left corner and (1,1) the bottom right", "normalised to 0.0-1.0"),
        *("CTR 0.55, previously 0.51.", "The RI is 0.72 and the PI is 0.95.", "Ejection fraction rose from 0.45 to 0.55"),
        *("Gr\u00f6\u00dfe 0,8 Zentimeter, zuvor 0,6 Zentimeter.", "Herz-Thorax-Quotient 0,55, im Vorjahr 0,51"),
        *("Resistive indices of the renal arteries: 0.68, 0.71", "ABI 0.85 and 0.92", "probability 0.7 (0.62-0.79)"),
        *("95% CI 0.65-0.81", "HR 0.8 (95% CI 0.7, 0.9)", "D-dimer 0.4, troponin 0.03", "Voxel 0.5 x 0.5 x 1.0"),
        *("0.8 (AP) by 0.6 (transverse) cm", "Doubling from 0.4 to 0.8", "It has gone down from 0.8 to 0.6"),
        *("Fractures at vertebrae (11, 12).", "Findings are centered on images (12, 14).", "Images at time points (1, 2)."),
        *("Nodule at level II (2,3).", "A score of 3 points (1, 2).", "Nodes <5> mm."),
    ],
)  # fmt: skip
def test_other_numbers(text: str) -> None:
    assert not has_loose_coordinates([text])


def test_numbers_of_a_conversation_count_together() -> None:
    assert has_loose_coordinates(["Is it 0.36 across?", "Yes, and 0.33 down."])
    assert not has_loose_coordinates(["Is it 0.36 across?", "Yes, of 0.33 cm."])


def test_the_template_writer_writes_none() -> None:
    texts = [*QUESTIONS, *NEGATIVES, *map(whole_text, PHRASINGS)]
    assert not any(has_loose_coordinates([text]) for text in texts)
