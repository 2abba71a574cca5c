"""LLaVA's training items: what makes one usable, checked for a whole file before a model is loaded. No image is opened.

LLaVA itself looks at an item when its turn comes, in a worker, and stops with a traceback that names neither file nor record. Or
it trains on something else than the file means, without a word.

An item is ``{"id": .., "image": FILE, "conversations": [{"from": "human", "value": ..}, {"from": "gpt", "value": ..}, ..]}``. The
picture is put where the tag ``<image>`` stands in a question.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from umed_plugin.errors import UmedError, warn

Item = dict[str, Any]

IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
_ROLES = ("human", "gpt")
_SHOWN = 10
_NAMED = 3
# Names under which other tools keep the picture; LLaVA reads `image` alone.
_OTHER_IMAGE_KEYS = ("images", "image_path", "image_file", "img", "video", "videos")
# Names under which other tools keep the turns.
_OTHER_TURN_KEYS = ("conversation", "messages", "dialogue", "turns")
# Tags that other models and people write where LLaVA needs IMAGE_TAG to the letter.
_OTHER_TAG = re.compile(
    r"<\s*/?\s*(?:image|img|picture|imagehere|image[-_ ]?placeholder|image_?\d+|im_(?:start|end|patch))\s*/?\s*>"
    r"|<\|\s*(?:image|img|image_pad|image_\d+)\s*\|>|[\[{]{1,2}\s*(?:image|img|image_token)\s*[\]}]{1,2}",
    re.IGNORECASE,
)


def check_items(items: Sequence[Any], where: str, separators: Iterable[str] = ()) -> list[Item]:
    r"""The items as they are meant, after a check of all of them.

    ``"image": null`` means an item without an image, and a list of one image that image. As LLaVA does, a ``gpt`` turn before the
    first question is left out. So is a last question without an answer. Both are counted in a warning.

    Args:
        items: of the JSON list.
        where: its file, for messages.
        separators: texts at which LLaVA's masking cuts a conversation, such as ``</s>``; none may stand in a turn.

    Raises:
        UmedError: items that LLaVA cannot train on, the first ten by index, id and field. Or no item with an image has
            ``<image>`` in a question, so no image would be seen.

    Example:
        >>> from umed_plugin.data.items import check_items
        >>> turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cyst."}]
        >>> check_items([{"id": 1, "image": ["a.png"], "conversations": turns}], "train.json")[0]["image"]
        'a.png'
        >>> check_items([{"id": 1, "image": "a.png", "conversations": turns[:1]}], "train.json")
        Traceback (most recent call last):
        umed_plugin.errors.UmedError: train.json: 1 of 1 items cannot be trained on:
          - [0] (id 1): has no answer: no turn is from 'gpt'
        Each item needs turns from 'human' and 'gpt' in turn, each with its text as 'value', and at most one image.
    """
    check = ItemsCheck(where, separators)
    meant = [check.add(item) for item in items]
    for line in check.finish():
        warn(f"{where}: {line}")
    return meant


class ItemsCheck:
    """`check_items` for items that come one after the other, of which none is kept.

    Args:
        where, separators: as for `check_items`.
    """

    def __init__(self, where: str, separators: Iterable[str] = ()) -> None:
        self._where, self._marks = where, tuple(separators)
        self._count = self._faulty = self._fault_count = self._with_image = 0
        self._faults: list[str] = []
        self._cut = _Indices()
        self._pseudo = _Indices()
        self._unseen: dict[str, _Indices] = defaultdict(_Indices)
        self._other_keys: Counter[str] = Counter()
        self._other_tags: Counter[str] = Counter()

    def add(self, item: Any) -> Any:
        """Check the next item, and return it as it is meant."""
        index, meant = self._count, _as_meant(item)
        self._count += 1
        found = item_faults(meant, self._marks)
        if found:
            self._faulty += 1
            self._fault_count += len(found)
            if len(self._faults) < _SHOWN:
                self._faults += [f"[{index}]{_id_of(meant)}: {fault}" for fault in found]
        else:
            if len(item["conversations"]) != len(meant["conversations"]):
                self._cut.add(index)
            self._look_for_image(index, meant)
            provenance = meant.get("provenance")
            if isinstance(provenance, dict) and provenance.get("boxes") == "pseudo":
                self._pseudo.add(index)
        return meant

    def _look_for_image(self, index: int, item: Item) -> None:
        tagged = any(IMAGE_TAG in turn["value"] for turn in item["conversations"])
        spelt = [tag for turn in item["conversations"] for tag in _other_tags(turn["value"])]
        if spelt:
            self._unseen["spelling"].add(index)
            self._other_tags.update(spelt)
        self._with_image += "image" in item
        if "image" in item and not tagged:
            self._unseen["image"].add(index)
        elif "image" not in item and tagged:
            self._unseen["tag"].add(index)
            self._other_keys.update(key for key in _OTHER_IMAGE_KEYS if key in item)
        if any(VIDEO_TAG in turn["value"] for turn in item["conversations"]) or "video" in item:
            self._unseen["video"].add(index)

    def finish(self) -> list[str]:
        """Warnings about all items, without their file.

        Raises:
            UmedError: as `check_items`.
        """
        if self._faulty:
            more = f"\n  ... and {self._fault_count - _SHOWN} more faults" if self._fault_count > _SHOWN else ""
            raise UmedError(
                f"{self._where}: {self._faulty} of {self._count} items cannot be trained on:\n"
                + "\n".join(f"  - {fault}" for fault in self._faults[:_SHOWN])
                + more
                + "\nEach item needs turns from 'human' and 'gpt' in turn, each with its text as 'value', and at most one image."
            )
        cut = []
        if self._cut.count:
            cut.append(
                f"in {self._cut.count} of {self._count} items ({self._cut}) an answer before the first question, or a last "
                "question without an answer, is left out."
            )
        if self._pseudo.count:
            cut.append(
                f"{self._pseudo.count} of {self._count} items ({self._pseudo}) have pseudo-boxes, which an anomaly map drew and "
                "no person. What is trained on them is measured on other records, with true boxes."
            )
        return cut + self._warnings_of_unseen_images()

    def _warnings_of_unseen_images(self) -> list[str]:
        """Images without a tag are never seen; tags without an image are learned as text."""
        lines, unseen, without, videos = [], self._unseen["image"], self._unseen["tag"], self._unseen["video"]
        written = ", ".join(repr(tag) for tag, _ in self._other_tags.most_common(_NAMED))
        if unseen.count and unseen.count == self._with_image:
            instead = f" They have {written}; LLaVA knows {IMAGE_TAG} alone, in these very letters." if written else ""
            raise UmedError(
                f"{self._where}: no item with an image ({self._with_image}, {unseen}) has {IMAGE_TAG} in a question, so the "
                f"model would see no image.{instead} Begin each first question with '{IMAGE_TAG}\\n'."
            )
        if written:
            lines.append(
                f"{self._unseen['spelling'].count} of {self._count} items ({self._unseen['spelling']}) hold {written}. LLaVA "
                f"knows {IMAGE_TAG} alone, in these very letters; anything else would be learned as text."
            )
        if unseen.count:
            lines.append(
                f"{unseen.count} of {self._with_image} items with an image ({unseen}) have no {IMAGE_TAG} in a question. "
                f"The model never sees these images. Begin the question with '{IMAGE_TAG}\\n'."
            )
        if without.count:
            names = ", ".join(map(repr, sorted(self._other_keys)))
            found = f" They have {names}; LLaVA reads 'image'." if names else ""
            lines.append(
                f"{without.count} of {self._count} items ({without}) have {IMAGE_TAG} in a question and no 'image'. The tag "
                f"would be learned as text.{found}"
            )
        if videos.count:
            lines.append(
                f"{videos.count} items ({videos}) have a video. This LLaVA reads images alone, and {VIDEO_TAG} would be "
                "learned as text."
            )
        return lines


class _Indices:
    """Indices of items: how many, and the first three."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[int] = []

    def add(self, index: int) -> None:
        self.count += 1
        if self.count <= _NAMED:
            self._first.append(index)

    def __str__(self) -> str:
        more = f" and {self.count - _NAMED} more" if self.count > _NAMED else ""
        return ", ".join(f"[{index}]" for index in self._first) + more


def as_meant(item: Item) -> Item:
    """An item that passed the check, as it is meant."""
    meant: Item = _as_meant(item)
    return meant


def item_faults(item: Any, separators: Sequence[str] = ()) -> list[str]:
    """Why LLaVA cannot train on an item: what was found and what is needed. Empty for a usable one."""
    if not isinstance(item, dict):
        return [f"is {_shown(item)}; an item is an object"]
    image, turns = item.get("image"), item.get("conversations")
    faults = [] if "image" not in item else _image_faults(image)
    if not isinstance(turns, list) or not turns:
        other = [key for key in _OTHER_TURN_KEYS if key in item]
        named = f" The item has {other[0]!r}." if turns is None and other else ""
        return [*faults, f"'conversations' is {_shown(turns)}; needed: a list of turns.{named}"]
    wrong = [n for n, turn in enumerate(turns) if not isinstance(turn, dict) or not isinstance(turn.get("value"), str)]
    if wrong:
        turn = turns[wrong[0]]
        found = f"'value' is {_shown(turn.get('value'))}" if isinstance(turn, dict) else f"is {_shown(turn)}"
        return [*faults, f"conversations[{wrong[0]}]: {found}; needed: {{'from': 'human' or 'gpt', 'value': a text}}"]
    return [*faults, *_role_faults(turns), *_text_faults(turns, separators)]


def _image_faults(image: Any) -> list[str]:
    if isinstance(image, list):
        return [f"'image' names {len(image)} images; LLaVA takes one for each item"]
    if not isinstance(image, str):
        return [f"'image' is {_shown(image)}; needed: the image's file as a text, or no 'image'"]
    if not image.strip():
        return ["'image' is an empty text; needed: the image's file, or no 'image'"]
    return []


def _role_faults(turns: list[Any]) -> list[str]:
    roles = [turn.get("from") for turn in turns]
    if any(role not in _ROLES for role in roles):
        others = ", ".join(sorted({_shown(role) for role in roles if role not in _ROLES}))
        hint = " A system text is set by --version, not by an item." if "system" in roles else ""
        return [f"turns are from {others}; LLaVA knows 'human' and 'gpt'.{hint}"]
    if "gpt" not in roles:
        return ["has no answer: no turn is from 'gpt'"]
    for n, role in enumerate(roles):
        if role != _ROLES[n % 2]:
            return [f"conversations[{n}] is from {role!r}; needed: human and gpt in turn, beginning with human"]
    return []


def _text_faults(turns: list[Any], separators: Sequence[str]) -> list[str]:
    faults = []
    tagged = [n for n, turn in enumerate(turns) if IMAGE_TAG in turn["value"]]
    in_answer = [n for n in tagged if turns[n].get("from") == "gpt"]
    if in_answer:
        faults.append(
            f"conversations[{in_answer[0]}] is an answer with {IMAGE_TAG}: the picture's place is in a question"
        )
    elif len(tagged) > 1:
        faults.append(f"{len(tagged)} turns hold {IMAGE_TAG}; the item has one image at most, so one turn may")
    elif tagged and turns[tagged[0]]["value"].count(IMAGE_TAG) > 1:
        times = turns[tagged[0]]["value"].count(IMAGE_TAG)
        faults.append(
            f"conversations[{tagged[0]}] holds {IMAGE_TAG} {times} times; LLaVA shows one image for each item, once"
        )
    for n, turn in enumerate(turns):
        if turn.get("from") == "gpt" and not turn["value"].strip():
            faults.append(f"conversations[{n}] is an empty answer: nothing would be learned from it")
        if not _is_unicode(turn["value"]):
            faults.append(f"conversations[{n}] holds half a character (a lone surrogate), which no tokenizer takes")
        mark = next((mark for mark in separators if mark in turn["value"]), None)
        if mark is not None:
            faults.append(f"conversations[{n}] holds {mark!r}, where the template ends a turn; remove it from the text")
    return faults


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_meant(item: Any) -> Any:
    """The item in LLaVA's form where there is one meaning only; anything else is returned as it is."""
    if not isinstance(item, dict):
        return item
    image, turns = item.get("image"), item.get("conversations")
    if isinstance(image, list) and len(image) == 1:
        item = {**item, "image": image[0]}
    elif "image" in item and (image is None or image == []):
        item = {name: value for name, value in item.items() if name != "image"}
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return item
    kept = turns[1:] if turns and turns[0].get("from") == "gpt" else turns
    if len(kept) > 2 and kept[-1].get("from") == "human":
        kept = kept[:-1]
    # A conversation of nothing but an answer, or a question, has a fault that should be seen.
    return item if len(kept) in (0, len(turns)) else {**item, "conversations": kept}


def _other_tags(text: str) -> list[str]:
    return [match[0] for match in _OTHER_TAG.finditer(text) if match[0] != IMAGE_TAG]


def _id_of(item: Any) -> str:
    return f" (id {item['id']})" if isinstance(item, dict) and "id" in item else ""


def _shown(value: Any) -> str:
    """A value as an error shows it: short, and null as JSON calls it."""
    if value is None:
        return "missing or null"
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
