"""Mistakes in a recipe or its data: collected so that all are shown at once, and stated in the keys of the user's file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, Optional, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from umed_plugin.errors import UmedError, did_you_mean, unknown_name
from umed_plugin.terminal.text import one_line

Value = TypeVar("Value")
_LONGEST = 1500  # of a fault's text, in characters


class Faults:
    """Collects faults so that the user sees all of them at once, and remarks on what stops nothing but should be known.

    Attributes:
        messages: the faults. Nothing may be built while there are any.
        remarks: what applies to nothing, is ambiguous or unusual. Shown by ``check`` and ``build``.
        without_effect: those of the remarks that name a rule or option which changes nothing.
        left_out: (what, why) -> number of boxes, rows or other parts of the files that are not used.
    """

    SHOWN = 25

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.remarks: list[str] = []
        self.without_effect: list[str] = []
        self.left_out: Counter[tuple[str, str]] = Counter()

    def add(self, where: object, message: str) -> None:
        """Add one fault. ``where`` is a file, a line of it, or a key."""
        self.messages.append(f"{one_line(where)}: {_cut(message)}")

    def remark(self, where: object, message: str) -> None:
        """Add one remark. ``where`` is a file, a line of it, or a key."""
        self.remarks.append(one_line(f"{where}: {_cut(message)}"))

    def no_effect(self, where: object, message: str) -> None:
        """Add a remark on a rule or option that changes nothing. ``where`` is its key, or a file."""
        self.remark(where, message)
        self.without_effect.append(self.remarks[-1])

    def read(self, reading: Callable[..., Value], *arguments: Any) -> Optional[Value]:
        """What a function of `umed_plugin.data.texts` returns; None after a fault, which is added."""
        try:
            return reading(*arguments)
        except UmedError as error:
            self.messages.append(str(error))
            return None

    def raise_if_any(self, title: str) -> None:
        """Raise one `UmedError` with the title and the faults (the first 25, then how many more)."""
        if not self.messages:
            return
        lines = [f"{title}: {len(self.messages)} fault{'s' if len(self.messages) > 1 else ''}"]
        lines += [f"  {message}" for message in self.messages[: self.SHOWN]]
        if len(self.messages) > self.SHOWN:
            lines.append(f"  ... and {len(self.messages) - self.SHOWN} more like these")
        raise UmedError("\n".join(lines))


def _cut(message: str) -> str:
    """A message that quotes no endless value: a file may hold a number of 4,000 digits."""
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"


class StrictModel(BaseModel):
    """Base of the models of a user's file: refuses unknown keys and cannot be changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    # Fields that the code sets, not the user. The underscore keeps the name free for a key of the file.
    filled_in_: ClassVar[tuple[str, ...]] = ()


# Pydantic names the types of a union in a fault's location; the user knows keys only.
_NOT_KEYS = ("", "int", "str", "WindowRange", "[key]", "list[union[int,str]]")


def validated(model: type[BaseModel], data: Any, prefix: str, faults: Faults) -> Any:
    """An instance of ``model`` (a pydantic class) made from ``data``; None if there are mistakes, which are added to ``faults``.

    Args:
        prefix: of the keys in messages: ``""``, or the key of this part of the file with a dot (``"annotations."``).
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        for mistake in error.errors():
            keys = [str(part) for part in mistake["loc"] if part not in _NOT_KEYS]
            faults.add(prefix + ".".join(keys) if keys else prefix.rstrip(".") or "recipe", _in_words(mistake, model))
    return None


def _in_words(mistake: Any, model: type[BaseModel]) -> str:
    value, location = mistake["input"], mistake["loc"]
    if mistake["type"] == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        allowed = [name for name in owner.model_fields if name not in getattr(owner, "filled_in_", ())]
        return unknown_name("key", str(location[-1]), allowed)
    if mistake["type"] == "missing":
        field = _model_at(model, location[:-1]).model_fields.get(location[-1])
        description = (field.description if field is not None else None) or "It must be given"
        return f"missing. {description.replace('``', '`').rstrip('.')}."
    if mistake["type"] == "value_error":
        return str(mistake["ctx"]["error"])
    if mistake["type"] in ("model_type", "dict_type"):
        return f"found {type(value).__name__}. Input should be an object, with keys and values."
    expected = str(mistake.get("ctx", {}).get("expected", ""))
    allowed = [part.strip(" '") for part in expected.replace(" or ", ",").split(",")]
    close = did_you_mean(str(value), allowed) if mistake["type"] == "literal_error" else ""
    shown = type(value).__name__ if isinstance(value, (dict, list)) else repr(value)
    message = mistake["msg"].replace("'', ", "")  # "" is how one file for all splits is kept
    return f"found {shown}. {message}.{close}{_quotes(mistake)}"


def _quotes(mistake: Any) -> str:
    """What to do about a word that YAML took for something else: no, yes, on and off are booleans without quotes."""
    if mistake["type"] != "string_type" or isinstance(mistake["input"], (dict, list, type(None))):
        return ""
    words = " YAML reads no, off, yes and on as false or true." if isinstance(mistake["input"], bool) else ""
    return f"{words} Put it into quotes."


def _model_at(model: type[BaseModel], location: tuple[Any, ...]) -> type[BaseModel]:
    """The model at a location in another one, found by following its annotations."""
    current = model
    for part in location:
        field = current.model_fields.get(part)
        if field is not None:
            current = model_in(field.annotation) or current
    return current


def model_in(annotation: Any) -> Optional[type[BaseModel]]:
    """The first pydantic model in a type annotation, such as that of ``Optional[dict[str, Model]]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (model_in(argument) for argument in getattr(annotation, "__args__", ()) or ())
    return next((model for model in inner if model is not None), None)
