"""Pictures of held-out studies with the answer's and the true boxes, where a run's metrics are: TensorBoard or W&B.

They go there through the trainer's own callbacks, so project, run and folder are those of its metrics. In TensorBoard each study
is an image of its own (``val/ID``), with a slider over the steps, and the answers are the text ``val/answers``. In W&B they are
the media panel ``val/pictures``, with boxes that can be switched off, and the answer as caption.

How to run: ``--umed_val_every 20 --report_to tensorboard`` in either stage; ``--umed_val_pictures`` is their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.integrations import TensorBoardCallback, WandbCallback

from umed_plugin.data.images import open_image
from umed_plugin.data.images.drawing import square_of
from umed_plugin.errors import UmedError, warn
from umed_plugin.grounding.boxes import Box, is_degenerate
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import AnswerScore

SIDE = 448  # pixels of a picture at most
# As in the report: the true box in yellow and whole, the answer's in orange and dashed.
TRUE, ANSWERED = (240, 228, 66), (255, 138, 76)
_CLASSES = {0: "answer", 1: "true"}


@dataclass(frozen=True)
class Shown:
    """One held-out study with the answer to it.

    Attributes:
        name: id of the record.
        image: path of its image.
        reading: arguments of `umed_plugin.data.images.load_image`, as the record has them, or None.
        geometry: of the image.
        answer: the text.
        score: of the answer.
    """

    name: str
    image: Path
    reading: Mapping[str, Any] | None
    geometry: ImageGeometry
    answer: str
    score: AnswerScore

    @property
    def caption(self) -> str:
        """IoU, verdict and answer."""
        verdict = "right" if self.score.accuracy == 1 else "wrong"
        return f"{self.name}: IoU {self.score.set_iou:.2f}, {verdict} diagnosis. {self.answer}"


def chosen_for_pictures(records: Sequence[Mapping[str, Any]], indices: Sequence[int], most: int) -> set[int]:
    """The first ``most`` of the indices of records with a lesion, and, if these are fewer, others."""
    first = sorted(indices, key=lambda index: not records[index]["objects"]["bbox"])
    return set(first[:most])


def is_shown_by(callbacks: Iterable[Any]) -> bool:
    """Whether one of the trainer's callbacks takes pictures."""
    return any(isinstance(callback, (TensorBoardCallback, WandbCallback)) for callback in callbacks)


class PictureLog:
    """Sends pictures to a trainer's callbacks. A picture that cannot be read is said once and left out."""

    def __init__(self) -> None:
        self._warned = False

    def log(self, step: int, studies: Sequence[Shown], callbacks: Iterable[Any]) -> None:
        """Draw the studies and send them, for this step."""
        drawn = [(study, square) for study in studies if (square := self._square(study)) is not None]
        if not drawn:
            return
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                _to_tensorboard(callback.tb_writer, step, drawn)
            if isinstance(callback, WandbCallback):
                _to_wandb(step, drawn)

    def _square(self, study: Shown) -> Any:
        try:
            image = open_image(study.image, dict(study.reading) if study.reading else None)
        except UmedError as error:
            if not self._warned:
                warn(f"--umed_val_pictures: {error} Its picture is left out.")
                self._warned = True
            return None
        return square_of(image, study.geometry, min_side=SIDE // 2, max_side=SIDE)


def with_boxes(square: Any, true: Sequence[Box], answered: Sequence[Box]) -> Any:
    """The square with the true boxes and the answer's, in 0-1 of it; a box without area is not drawn."""
    from PIL import ImageDraw

    drawn = square.copy()
    pen = ImageDraw.Draw(drawn)
    width = max(2, square.width // 160)
    for boxes, colour, dash in ((true, TRUE, 0), (answered, ANSWERED, square.width // 28)):
        for box in boxes:
            if is_degenerate(box):
                continue
            x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) * (square.width - 1) for value in box)
            for ends in (((x1, y1), (x2, y1)), ((x1, y2), (x2, y2)), ((x1, y1), (x1, y2)), ((x2, y1), (x2, y2))):
                for part in _dashes(*ends, dash):
                    pen.line(part, fill=colour, width=width)
    return drawn


def _dashes(start: tuple[float, float], end: tuple[float, float], dash: int) -> list[tuple[float, float, float, float]]:
    """A line as dashes with gaps of the same length; whole if ``dash`` is 0."""
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    if not dash or length <= dash:
        return [(*start, *end)]
    along = ((end[0] - start[0]) / length, (end[1] - start[1]) / length)
    cuts = [(at, min(at + dash, length)) for at in range(0, int(length) + 1, 2 * dash)]
    return [
        (start[0] + along[0] * a, start[1] + along[1] * a, start[0] + along[0] * b, start[1] + along[1] * b)
        for a, b in cuts
    ]


def _to_tensorboard(writer: Any, step: int, drawn: Sequence[tuple[Shown, Any]]) -> None:
    for study, square in drawn:
        picture = np.asarray(with_boxes(square, study.score.true01, study.score.predicted01))
        writer.add_image(f"val/{study.name}", picture, step, dataformats="HWC")
    # Two blanks at a line's end are a line break in Markdown.
    writer.add_text("val/answers", "  \n".join(study.caption.replace("\n", " ") for study, _ in drawn), step)


def _to_wandb(step: int, drawn: Sequence[tuple[Shown, Any]]) -> None:
    import wandb

    if wandb.run is None:  # the callback opens a run only in the main process
        return
    pictures = [
        wandb.Image(
            square,
            caption=study.caption,
            boxes={
                "predictions": _wandb_boxes(study.score.predicted01, 0),
                "ground_truth": _wandb_boxes(study.score.true01, 1),
            },
        )
        for study, square in drawn
    ]
    # Without the step argument, like the trainer's callback: W&B refuses steps that go back.
    wandb.log({"val/pictures": pictures, "train/global_step": step})


def _wandb_boxes(boxes: Sequence[Box], kind: int) -> dict[str, Any]:
    data = [
        {
            "position": dict(zip(("minX", "minY", "maxX", "maxY"), (min(max(value, 0.0), 1.0) for value in box))),
            "class_id": kind,
            "box_caption": _CLASSES[kind],
        }
        for box in boxes
        if not is_degenerate(box)
    ]
    return {"box_data": data, "class_labels": _CLASSES}
