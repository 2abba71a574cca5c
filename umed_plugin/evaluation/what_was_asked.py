"""What the answers to a benchmark depend on beside the checkpoint: kept answers are used again only under the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umed_plugin import __version__
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion

# Settings that are kept as a hash -> what to say when it has changed.
CHANGES = {
    "weights": "files of the checkpoint, its base, its vision tower or its tokenizer are others now, or were written anew",
    "questions.texts": "other questions, options or image names are asked now, or the same in another order",
    "questions.pictures": "image files are others now (size or time of change), or are read with other settings",
    "questions.about": "what the questions are about has changed, such as true boxes",
}


def what_answers_depend_on(
    benchmark: Benchmark, questions: Sequence[BenchmarkQuestion], chosen_by: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """What is kept of questions beside their answers. Scoring is not in it: it is done anew each time.

    Args:
        chosen_by: how the questions were chosen; JSON values.
        out: folder of the evaluation, in which it may have written images itself.

    Returns:
        ``questions`` in plain form and as hashes; for a benchmark that examines the answers, also the version of the ``plugin``,
        on whose code the findings depend.
    """
    texts = [[q.id, Path(q.image).name, q.text, list(q.options), q.options_after, q.write] for q in questions]
    asked = {
        **chosen_by,
        "count": len(questions),
        "texts": _hash(texts),
        "pictures": _hash(_pictures(questions, out)),
    }
    if benchmark.examine is None:
        return {"questions": asked}
    # What a further pass finds depends on all that the questions are about, such as the true boxes.
    return {"questions": {**asked, "about": _hash([q.about for q in questions])}, "plugin": __version__}


def _pictures(questions: Sequence[BenchmarkQuestion], out: Path) -> list[Any]:
    """How each image is read, and the state of its files; each file is looked at once."""
    states: dict[str, Any] = {}
    pictures, written_to = [], os.path.join(os.path.abspath(out), "")
    for question in questions:
        beside = [] if question.reading is None else question.reading.get("beside", ())
        files = [str(file) for file in (question.made_from or question.image, *beside)]
        for file in files:
            if file not in states:
                states[file] = _state(file, written_to)
        pictures.append([question.reading, [states[file] for file in files]])
    return pictures


def _state(file: str, written_to: str) -> Any:
    """Name, size and time of an image's files; of an image that evaluations write themselves the content.

    Processes that share an evaluation may write the same image one after the other, so its time says nothing.
    """
    from umed_plugin.data.images import file_states

    try:
        if os.path.abspath(file).startswith(written_to) and os.path.isfile(file):
            return hashlib.sha256(Path(file).read_bytes()).hexdigest()
        return file_states(file)
    except OSError:
        return None  # it cannot be read: asking about it says so


def _hash(content: Any) -> str:
    # In ASCII: a file name that is not UTF-8 has no other form.
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
