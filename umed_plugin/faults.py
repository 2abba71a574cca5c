"""Mistakes in a recipe or its data: collected, so that all are shown at once, and put into the words of the user's file."""

from __future__ import annotations

import re
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from umed_plugin.errors import UmedError, did_you_mean, unknown_name


class Faults:
    """Collects what is wrong, so that the user sees all of it at once."""

    SHOWN = 25

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, where: object, message: str) -> None:
        """Note one fault: ``where`` is a file, a line of it or a key."""
        self.messages.append(f"{where}: {message}")

    def raise_if_any(self, title: str) -> None:
        """Raise one `UmedError` with the title and every fault (the first 25 in full, then how many more)."""
        if not self.messages:
            return
        lines = [f"{title}: {len(self.messages)} fault{'s' if len(self.messages) > 1 else ''}"]
        lines += [f"  {message}" for message in self.messages[: self.SHOWN]]
        if len(self.messages) > self.SHOWN:
            lines.append(f"  ... and {len(self.messages) - self.SHOWN} more like these")
        raise UmedError("\n".join(lines))


class StrictModel(BaseModel):
    """Refuses keys it does not know, and cannot be changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# Pydantic puts the types of a union into the place of a fault; the reader of the message looks for keys.
_NOT_KEYS = ("", "int", "str", "WindowRange", "[key]", "list[union[int,str]]")


def validated(model: type[BaseModel], data: Any, prefix: str, faults: Faults) -> Any:
    """The model (a pydantic class) made of ``data``, or None with every mistake noted."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        for one in error.errors():
            place = [str(part) for part in one["loc"] if part not in _NOT_KEYS]
            faults.add(prefix + ".".join(place) if place else prefix.rstrip(".") or "recipe", _in_words(one, model))
    return None


def _in_words(error: Any, model: type[BaseModel]) -> str:
    found = repr(error["input"]) if not isinstance(error["input"], (dict, list)) else type(error["input"]).__name__
    if error["type"] == "extra_forbidden":
        allowed = [
            name
            for name in _fields_at(model, error["loc"][:-1])
            if name not in ("path", "sha256", "mixture", "recipes")
        ]
        return unknown_name("key", str(error["loc"][-1]), allowed)
    if error["type"] == "missing":
        return "missing. " + _first_sentence(model, error["loc"])
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    allowed = [
        part.strip(" '") for part in str(error.get("ctx", {}).get("expected", "")).replace(" or ", ",").split(",")
    ]
    close = did_you_mean(str(error["input"]), allowed) if error["type"] == "literal_error" else ""
    said = error["msg"].replace("'', ", "")  # "" is how one file for all splits is kept
    return f"found {found}. {said}.{close}"


def _fields_at(model: type[BaseModel], place: tuple[Any, ...]) -> list[str]:
    """Names of the keys allowed at a place of the model, found by walking its annotations."""
    current: Any = model
    for part in place:
        field = getattr(current, "model_fields", {}).get(part)
        if field is not None:
            current = _model_in(field.annotation) or current
    return list(current.model_fields)


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(inner) for inner in getattr(annotation, "__args__", ()) or ())
    return next((inner for inner in found if inner is not None), None)


def _first_sentence(model: type[BaseModel], place: tuple[Any, ...]) -> str:
    """What the docstring says about a field, as help beside "missing"."""
    text = model.__doc__ or ""
    described = re.search(rf"^\s+{re.escape(str(place[-1]))}: (.+)$", text, re.MULTILINE)
    return described.group(1).rstrip(".") + "." if described else "It must be given."


class NoDuplicates(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys without a word; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in seen:
            if seen.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)
