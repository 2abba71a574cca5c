"""The recipes that a study's records are built by, and how a row tells that one of them has changed.

The digest of a cell holds the content of its recipes, and of the demo's, by which each base is trained. Rows older than this rule
say nothing of their recipes. So a digest leaves out the content that `OF_FIRST_ROWS` notes: it made all of those rows, as the
recipes at their commits show, and they stay valid. Any other content is in the digest, and its rows are other rows.

Do not update a hash there when a recipe changes: the old rows no longer count then, and are to be removed or made anew. A recipe
is read once, so a study that runs ends with what it began with.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from umed_plugin.data.recipes.recipe import AnyRecipe, load_recipe, sources_of
from umed_plugin.data.texts import read_yaml

GENERATED = "demo_studies"
STUDIES = Path(__file__).parent / "studies"
# Keys on which no record depends: what the data are, whose they are, and where they lie.
_NOT_COUNTED = ("description", "terms", "data_root")
# Recipe -> its content when the first rows were made, at whatever commit: it is the same at each of theirs.
OF_FIRST_ROWS = {
    "demo_studies": "28049e25c33b",
    "brain_tumor_coco": "b938db96d443",
    "sources/by_modality.yaml": "1f3b5d0334c2",
}


@functools.cache
def recipe_named(name: str) -> AnyRecipe:
    """A recipe by the name of a YAML below ``studies/``, or of a shipped recipe."""
    beside = STUDIES / name
    return load_recipe(beside if beside.is_file() else name)


@functools.cache
def content(name: str) -> str:
    """A hash of what a recipe says of its records, and of what the recipes of a mixture's sources say; comments do not count."""
    recipe = recipe_named(name)
    files = dict.fromkeys([recipe.path, *(source.path for source in sources_of(recipe))])
    said = [{key: value for key, value in read_yaml(Path(f)).items() if key not in _NOT_COUNTED} for f in files]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:12]


def counted_contents(*names: str) -> dict[str, str]:
    """Recipe -> its content, of those whose content a digest holds: not of those that are as they were for the first rows."""
    return {name: content(name) for name in sorted({*names}) if OF_FIRST_ROWS.get(name) != content(name)}
