"""The recipe reference: every key of a recipe as Markdown, generated from the pydantic models."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from umed_plugin.data import augment_rule
from umed_plugin.data.recipes import image_options, options, pseudo_boxes, recipe
from umed_plugin.data.recipes.options import InWords
from umed_plugin.data.recipes.readers import READERS, ReaderOptions, reader_options
from umed_plugin.faults import StrictModel, model_in

_HEAD = """# Recipe reference

A recipe is one YAML file per data set. `umed recipe list` names the shipped recipes, and `umed recipe show NAME` prints one to
start from. `umed recipe check` reads the data with a recipe and reports what does not fit. A key that is not listed here is
an error.

Paths in a recipe are relative to the data root. A pattern is a path with `*`. A column is named by its header, or by its number
from 0. Regular expressions are those of Python's `re`.
"""
_READERS_HEAD = """## Annotation readers

`annotations.reader` selects the reader. These keys of `annotations` are common to all readers:
"""
_OWN_READER = """### Your own reader

`reader: my_module:my_reader` calls a function of yours. Decorate it with `register_reader` and a model of its options, and its
keys are checked like those above. Without a model, every further key is passed on.
"""
# Section title of each model that is not a reader's, in the order of the page.
_SECTIONS: dict[type[StrictModel], str] = {
    recipe.Recipe: "A recipe",
    options.UsageTerms: "`terms`",
    options.AbnormalityClass: "`classes`",
    image_options.ImageOptions: "`image`",
    image_options.WindowRange: "`image.window` as a range",
    options.SplitRule: "`split`",
    options.ReadersRule: "`annotations.readers`",
    options.NegativeRule: "`negatives`",
    options.NegativeList: "`negatives.listed`",
    options.ImageList: "`annotations.leave_out_listed`",
    pseudo_boxes.PseudoBoxRule: "`pseudo_boxes`",
    augment_rule.AugmentRule: "`augment`",
    options.HoldOut: "`hold_out`",
    options.ProbesRule: "`probes`",
}
_MIXTURE_SECTIONS: dict[type[StrictModel], str] = {
    recipe.Mixture: "A mixture of recipes",
    recipe.Source: "`sources`",
    recipe.MixedSplit: "`split` of a mixture",
}
_PLAIN = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", type(None): "null", Any: "any"}
_LIMITS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


def recipe_reference() -> str:
    """Markdown with the key, type, default and meaning of every field of every model, and an example for each reader."""
    annotations = "umed_plugin.data.annotations"  # a user's own readers may be registered too
    parts = [_HEAD]
    parts += [_section(model, title) for model, title in _SECTIONS.items()]
    parts += [_READERS_HEAD, _table(ReaderOptions)]
    parts += [_reader(name) for name in READERS if READERS.get(name).__module__.startswith(f"{annotations}.")]
    parts += [_OWN_READER]
    parts += [_section(model, title) for model, title in _MIXTURE_SECTIONS.items()]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _section(model: type[StrictModel], title: str) -> str:
    filled_in = ", ".join(f"`{name}` ({_first_lower(_meaning(model, name))})" for name in model.filled_in_)
    note = f"\nFilled in when the recipe is loaded, never written by hand: {filled_in}.\n" if filled_in else ""
    return f"## {title}\n\n{_summary(model)}\n\n{_table(model)}{note}"


def _reader(name: str) -> str:
    """Section of one reader: its own keys, those of the models inside them, and its example."""
    model = reader_options(name)
    parts = [f"### `reader: {name}`\n", f"{_summary(model)}\n"]
    own = [field for field in model.model_fields if field not in ReaderOptions.model_fields]
    parts += [_table(model, own)] if own else []
    for field in own:
        inner = model_in(model.model_fields[field].annotation)
        if inner is not None and inner not in _SECTIONS:
            parts.append(f"Keys of `annotations.{field}`:\n\n{_table(inner)}")
    parts.append(f"```yaml\n{model.yaml_example_.strip()}\n```\n")
    return "\n".join(parts)


def _summary(model: Any) -> str:
    return _markdown(" ".join((model.__doc__ or "").split()))


def _table(model: Any, names: Any = None) -> str:
    """One row per field; without ``names``, all that a user may write."""
    hints = get_type_hints(model, include_extras=True)
    shown = names or [name for name in model.model_fields if name not in getattr(model, "filled_in_", ())]
    rows = ["| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    for name in shown:
        field = model.model_fields[name]
        cells = (f"`{name}`", _type_cell(hints[name], field), _default(field), _meaning(model, name))
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _meaning(model: Any, name: str) -> str:
    return _markdown(model.model_fields[name].description or "")


def _markdown(text: str) -> str:
    """Docstring markup as Markdown."""
    return re.sub(r"``(.+?)``", r"`\1`", text)


def _first_lower(text: str) -> str:
    first = text.rstrip(".")
    return first if first[:2].isupper() else first[:1].lower() + first[1:]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, StrictModel):
        return "its defaults"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, dict) and value:
        return "`{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}`"
    return "none" if value in (None, "", [], {}) else f"`{value}`"


def _type_cell(hint: Any, field: FieldInfo) -> str:
    limits = [_LIMITS[key].format(f"{value:g}") for key, value in _limits(field)]
    return ", ".join([type_in_words(hint), *limits])


def _limits(field: FieldInfo) -> Iterator[tuple[str, float]]:
    for constraint in field.metadata:
        for key in _LIMITS:
            value = getattr(constraint, key, None)
            if value is not None:
                yield key, value


def type_in_words(hint: Any) -> str:
    """A type annotation as a user of YAML would state it: ``Optional[list[str]]`` is "list of text"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return next((extra.text for extra in arguments[1:] if isinstance(extra, InWords)), type_in_words(arguments[0]))
    if origin is Literal:
        return _either([f"`{value}`" for value in arguments])
    if origin is Union or origin is getattr(types, "UnionType", Union):
        return _either([type_in_words(argument) for argument in arguments if argument is not type(None)])
    if origin is list:
        return f"list of {type_in_words(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {', '.join(type_in_words(argument) for argument in arguments)}"
    if origin is dict:
        return f"mapping of {type_in_words(arguments[0])} to {type_in_words(arguments[1])}"
    if model_in(hint) is not None:
        title = {**_SECTIONS, **_MIXTURE_SECTIONS}.get(hint)
        return f"mapping, see {title}" if title else "mapping"
    return _PLAIN.get(hint, getattr(hint, "__name__", str(hint)))


def _either(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
