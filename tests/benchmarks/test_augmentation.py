"""The table of `benchmarks/augmentation.py`: boxes and words of augmented studies against their pixels, in every format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from augmentation import FORMATS, Found, main, measure, words_right

# The image as the model sees it comes from transformers' processor.
pytestmark = [pytest.mark.llava, pytest.mark.one_stack]

# At 10 degrees, the corners of a turned square leave the box around its ellipse by up to 7.4 % of its area, and half a pixel of
# each edge may be on either side.
LEAST_INSIDE, LEAST_FILLED = 0.9, 0.75


def check(found: Found, studies: int) -> None:
    assert len(found.inside) == len(found.filled) == found.boxes_in_text == studies
    assert min(found.inside) > LEAST_INSIDE and min(found.filled) > LEAST_FILLED
    assert min(found.in_patches) > LEAST_INSIDE
    assert np.mean(found.inside) > 0.96 and np.mean(found.filled) > 0.95
    assert found.wrong == 0 and found.words > studies / 2 and found.mirrored > studies / 2


@pytest.mark.parametrize("kind", list(FORMATS))
def test_boxes_lie_on_the_lesion_and_words_say_where_it_is(kind: str, tmp_path: Path) -> None:
    for mode in ("pad", "square"):
        check(measure(kind, 12, tmp_path / mode, mode, base=6), 12)


def test_the_measure_would_see_a_wrong_box_or_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from umed_plugin.grounding.square_move import SquareMove

    assert words_right("At [0.1, 0.1, 0.2, 0.2] in the upper left.", 0.8, 0.2) is False
    assert words_right("At [0.1, 0.1, 0.2, 0.2] in the upper left.", 0.2, 0.2) is True
    assert words_right("In the centre.", 0.5, 0.5) is True and words_right("In the left part.", 0.49, 0.1) is None
    stock = SquareMove.boxes
    monkeypatch.setattr(
        SquareMove, "boxes", lambda self, boxes: stock(SquareMove(zoom=self.zoom, shift=self.shift), boxes)
    )
    with pytest.raises(AssertionError):
        check(measure("png", 12, tmp_path / "wrong", base=6), 12)


def test_the_command_prints_a_row_for_each_format(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--studies", "4", "--formats", "png", "jpeg"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| png | pad | 4 |") and lines[3].startswith("| jpeg | square | ")
