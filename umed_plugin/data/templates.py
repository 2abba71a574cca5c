"""The offline writer's templates, and which of them can be used beside a recipe's class names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# No template contains "lesion", "mass" or "tumor": in some sources these are class names or synonyms.
QUESTIONS = (
    "Is there anything abnormal in this image? Mark it and say what it is.",
    "Please examine this scan, locate every abnormal area and name it.",
    "What abnormality can be seen here, and where does it lie?",
    "Describe the abnormal findings with their location and diagnosis.",
    "Look for abnormal regions. Give each one's box, then your diagnosis.",
    "Which findings do you see? Locate them first, then identify them.",
    "Read this study: detect, localise and recognise what is not normal.",
    "Does this image look normal? If not, show where and tell what it is.",
)


@dataclass(frozen=True)
class Phrasing:
    """Templates of one way to write an answer.

    Attributes:
        single, several: detection, for one lesion and for more (``{count}`` in words).
        only, each: localisation and recognition, of a single lesion and of each of several (``{ordinal}``). ``{box}`` comes
            before ``{name}``; ``{region}`` is "upper left", "centre", ...
    """

    single: str
    several: str
    only: str
    each: str


PHRASINGS = (
    Phrasing(
        "Yes, one abnormal area is visible.",
        "Yes, {count} abnormal areas are visible.",
        "It lies in the {region} of the image at {box} and is consistent with {name}.",
        "The {ordinal} lies in the {region} at {box} and is consistent with {name}.",
    ),
    Phrasing(
        "The image is not normal: there is a single finding.",
        "The image is not normal: there are {count} findings.",
        "The finding is located at {box}, in the {region}. Its appearance suggests {name}.",
        "The {ordinal} is located at {box}, in the {region}. Its appearance suggests {name}.",
    ),
    Phrasing(
        "There is one region that looks abnormal.",
        "There are {count} regions that look abnormal.",
        "It can be marked in the {region} with the box {box}. The diagnosis is {name}.",
        "The {ordinal} can be marked in the {region} with the box {box}; the diagnosis is {name}.",
    ),
    Phrasing(
        "An abnormality is present.",
        "In total {count} abnormalities are present.",
        "It occupies {box} in the {region} of this image, and I identify it as {name}.",
        "The {ordinal} occupies {box} in the {region}, and I identify it as {name}.",
    ),
    Phrasing(
        "I detect one area of concern.",
        "I detect {count} areas of concern.",
        "Its position is the {region}, within {box}. Most likely this is {name}.",
        "The position of the {ordinal} is the {region}, within {box}; most likely this is {name}.",
    ),
)

NEGATIVES = (
    "No, nothing abnormal is visible in this image.",
    "The image looks normal: there is no finding to mark.",
    "I see no area of concern, so there is nothing to locate or name.",
    "There is no sign of an abnormality. The study appears normal.",
    "No abnormal region is present here.",
)


def whole_text(phrasing: Phrasing) -> str:
    """All templates of a phrasing in one text."""
    return " ".join(vars(phrasing).values())


def without_names(templates: Iterable[str], names: Sequence[str]) -> list[str]:
    """The templates that contain none of the names: scoring would count such a name as a class that the answer names."""
    # The same pattern as `terms.find_terms` uses for a name.
    named = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?:s|es)?(?!\w)" for name in names) or "(?!)", re.IGNORECASE)
    return [template for template in templates if not named.search(template)]


def without_a_template(names: Sequence[str], negatives: bool) -> str:
    """What cannot be written beside the names, since each of its templates contains one; empty if all can.

    Args:
        names: names and synonyms of all classes.
        negatives: whether answers for images without a lesion are needed too.
    """
    needed = {"question": QUESTIONS, "answer": tuple(map(whole_text, PHRASINGS))}
    needed |= {"answer for a negative": NEGATIVES} if negatives else {}
    return next((what for what, templates in needed.items() if not without_names(templates, names)), "")
