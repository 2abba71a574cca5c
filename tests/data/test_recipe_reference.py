"""The recipe reference says all that the models hold: every key of every model, its meaning, and an example of each reader."""

from __future__ import annotations

from typing import Annotated, Literal, Optional, Union

import pytest
import yaml

from umed_plugin.data.recipes.options import InWords
from umed_plugin.data.recipes.readers import READERS, FreeOptions, ReaderOptions, reader_options
from umed_plugin.data.recipes.recipe import Mixture, Recipe
from umed_plugin.data.recipes.reference import recipe_reference, type_in_words
from umed_plugin.faults import Faults, StrictModel, validated


def models_below(model: type[StrictModel]) -> list[type[StrictModel]]:
    """All models of the plugin's recipes that derive from one."""
    own = [below for below in model.__subclasses__() if below.__module__.startswith("umed_plugin.data.")]
    return own + [deeper for below in own for deeper in models_below(below)]


def recipe_models() -> list[type[StrictModel]]:
    list(READERS)  # imports the readers
    return models_below(StrictModel)


def rows(page: str) -> dict[str, list[str]]:
    """Key -> meanings of its rows."""
    found: dict[str, list[str]] = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            key, *_, meaning = line.strip("| ").split(" | ")
            found.setdefault(key.strip("`"), []).append(meaning)
    return found


def test_the_models_are_all_there() -> None:
    names = {model.__name__ for model in recipe_models()}
    assert names >= {
        "Recipe",
        "Mixture",
        "Source",
        "UsageTerms",
        "ImageOptions",
        "CsvColumns",
        "CocoOptions",
        "MaskOptions",
    }
    assert len(names) >= 19


@pytest.mark.parametrize("model", recipe_models(), ids=lambda model: model.__name__)
def test_every_field_is_described_and_on_the_page(model: type[StrictModel]) -> None:
    page = recipe_reference()
    listed = rows(page)
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name} has no description"
        meaning = field.description.replace("``", "`")
        assert meaning[0].isupper() or meaning[0] == "`"
        assert meaning.endswith(".")
        if name in model.filled_in_:
            assert f"`{name}` (" in page
        else:
            assert meaning in listed[name], f"{model.__name__}.{name} is not on the page"


@pytest.mark.parametrize("name", list(READERS))
def test_every_reader_has_an_example_that_its_model_takes(name: str) -> None:
    model = reader_options(name)
    assert f"### `reader: {name}`" in recipe_reference()
    assert model.yaml_example_.strip() in recipe_reference()
    faults = Faults()
    options = validated(model, yaml.safe_load(model.yaml_example_)["annotations"], "annotations.", faults)
    assert faults.messages == []
    assert options.reader == name
    assert model is not FreeOptions and issubclass(model, ReaderOptions)


def test_filled_in_keys_are_fields() -> None:
    for model in (Recipe, Mixture):
        assert set(model.filled_in_) < set(model.model_fields)
        assert all(model.model_fields[name].default in ("", {}) for name in model.filled_in_)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (str, "text"),
        (Optional[float], "number"),
        (dict[str, list[int]], "mapping of text to list of whole number"),
        (Union[str, list[str]], "text or list of text"),
        (Optional[tuple[str, int]], "list of 2: text, whole number"),
        (Literal["a", "b", 3], "`a`, `b` or `3`"),
        (bool, "`true` or `false`"),
        (Optional[Annotated[Union[int, str], InWords("column")]], "column"),
    ],
)
def test_types_in_words(hint: object, words: str) -> None:
    assert type_in_words(hint) == words


def test_limits_and_defaults_are_stated() -> None:
    page = recipe_reference()
    assert "| `tiles` | whole number, at least 2, at most 36 | `9` |" in page
    assert "| `negative_share` | number, at least 0, below 1 | `0.0` |" in page
    assert "| `name` | text | required |" in page
    assert "| `box` | column, or list of four columns | none |" in page
