"""Mistakes in a recipe or its data: collected so that all are shown at once, and stated in the keys of the user's file."""

from __future__ import annotations

from typing import Any, ClassVar, Optional

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from umed_plugin.errors import UmedError, did_you_mean, unknown_name
from umed_plugin.terminal.text import one_line


class Faults:
    """Collects faults so that the user sees all of them at once."""

    SHOWN = 25

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, where: object, message: str) -> None:
        """Add one fault. ``where`` is a file, a line of it, or a key."""
        self.messages.append(f"{one_line(where)}: {message}")

    def raise_if_any(self, title: str) -> None:
        """Raise one `UmedError` with the title and the faults (the first 25, then how many more)."""
        if not self.messages:
            return
        lines = [f"{title}: {len(self.messages)} fault{'s' if len(self.messages) > 1 else ''}"]
        lines += [f"  {message}" for message in self.messages[: self.SHOWN]]
        if len(self.messages) > self.SHOWN:
            lines.append(f"  ... and {len(self.messages) - self.SHOWN} more like these")
        raise UmedError("\n".join(lines))


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
    expected = str(mistake.get("ctx", {}).get("expected", ""))
    allowed = [part.strip(" '") for part in expected.replace(" or ", ",").split(",")]
    close = did_you_mean(str(value), allowed) if mistake["type"] == "literal_error" else ""
    shown = type(value).__name__ if isinstance(value, (dict, list)) else repr(value)
    message = mistake["msg"].replace("'', ", "")  # "" is how one file for all splits is kept
    return f"found {shown}. {message}.{close}"


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


class NoDuplicates(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in seen:
            if seen.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)
