"""Questions for one class that say what it looks like: ``classes.NAME.looks`` and ``looks_share`` of a recipe.

After AG-KD (arXiv 2503.03278), which asks for one class at a time, with a sentence on its shape, density and place. A model that
is asked so can look for a class that it was never trained on. Only training studies are asked so: a question that names the class
of a test study would give its answer away. ``--benchmark looks:RECIPE`` asks both ways and compares the boxes.
"""

from __future__ import annotations

import random

from umed_plugin.data.records import Record
from umed_plugin.files import text_bytes

_BARE = 0.25  # of these questions, the share that gives the bare name


def find_question(name: str, looks: str = "") -> str:
    """``Find: nodule, that is a small bright disc.``; without looks ``Find: nodule.``

    Example:
        >>> from umed_plugin.data.looks import find_question
        >>> find_question("nodule", "a small bright disc")
        'Find: nodule, that is a small bright disc.'
    """
    return f"Find: {name}, that is {looks}." if looks else f"Find: {name}."


def looks_question(record: Record, share: float, seed: int) -> str:
    """The question for one class that a training record is asked instead of a general one; empty for none.

    Args:
        record: with ``looks``. One with lesions of several classes is asked a general question: its answer is about all of them.
        share: of the records that can be asked so.
        seed: of the choice, with the record's id.
    """
    looks, classes = record.get("looks", {}), sorted(set(record["objects"]["ref"]))
    names = [record["terms"][ref][0] for ref in classes] or list(looks)
    rng = random.Random(text_bytes(f"looks:{seed}:{record['id']}"))
    if len(classes) > 1 or not set(names) & set(looks) or rng.random() >= share:
        return ""
    name = rng.choice([name for name in names if name in looks])
    return find_question(name, "" if rng.random() < _BARE else looks[name])
