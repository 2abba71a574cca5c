"""All benchmarks by name: every file of this folder that defines ``BENCHMARK``, in the order in which the docs list them.

A recipe's records are a benchmark too, but ``--benchmark`` takes the recipe's name or file: `recipe.recipe_benchmark`.
``--benchmark NAME:RECIPE`` asks something else about them: every file that defines ``OF_RECIPE``.
"""

from __future__ import annotations

import importlib
import pkgutil

from umed_plugin.errors import UmedError, unknown_name
from umed_plugin.evaluation import benchmarks
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, OfRecipe
from umed_plugin.evaluation.benchmarks.recipe import GIVEN_BOX, RECIPE

_MODULES = [
    importlib.import_module(f"{benchmarks.__name__}.{file.name}")
    for file in pkgutil.iter_modules(benchmarks.__path__)
    if f"{benchmarks.__name__}.{file.name}" != __name__
]


def _discover() -> dict[str, Benchmark]:
    listed: list[Benchmark] = [module.BENCHMARK for module in _MODULES if hasattr(module, "BENCHMARK")]
    return {benchmark.name: benchmark for benchmark in sorted(listed, key=lambda item: (item.order, item.name))}


def _discover_of_recipes() -> dict[str, OfRecipe]:
    listed: list[OfRecipe] = [module.OF_RECIPE for module in _MODULES if hasattr(module, "OF_RECIPE")]
    return {item.benchmark.name: item for item in sorted(listed, key=lambda item: item.benchmark.order)}


BENCHMARKS = _discover()
OF_RECIPES = _discover_of_recipes()


def benchmark_of(name: str) -> Benchmark:
    """The benchmark that an evaluation names: one of `BENCHMARKS`, those of recipes, or one of `OF_RECIPES`.

    Raises:
        UmedError: there is no such benchmark.
    """
    made = {name: item.benchmark for name, item in OF_RECIPES.items()}
    known = {**BENCHMARKS, RECIPE.name: RECIPE, GIVEN_BOX.name: GIVEN_BOX, **made}
    if name not in known:
        raise UmedError(unknown_name("benchmark", name, known))
    return known[name]


def split_name(name: str) -> tuple[OfRecipe | None, str]:
    """The two parts of ``NAME:RECIPE``; None and the whole name if it is not of that form."""
    kind, colon, recipe = name.partition(":")
    return (OF_RECIPES[kind], recipe) if colon and kind in OF_RECIPES else (None, name)
