"""All benchmarks by name: every file of this folder that defines ``BENCHMARK``, in the order in which the docs list them.

A recipe's records are a benchmark too, but ``--benchmark`` takes the recipe's name or file: `recipe.recipe_benchmark`.
"""

from __future__ import annotations

import importlib
import pkgutil

from umed_plugin.errors import UmedError, unknown_name
from umed_plugin.evaluation import benchmarks
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark
from umed_plugin.evaluation.benchmarks.recipe import GIVEN_BOX, RECIPE


def _discover() -> dict[str, Benchmark]:
    modules = [
        importlib.import_module(f"{benchmarks.__name__}.{file.name}")
        for file in pkgutil.iter_modules(benchmarks.__path__)
        if f"{benchmarks.__name__}.{file.name}" != __name__
    ]
    listed: list[Benchmark] = [module.BENCHMARK for module in modules if hasattr(module, "BENCHMARK")]
    return {benchmark.name: benchmark for benchmark in sorted(listed, key=lambda item: (item.order, item.name))}


BENCHMARKS = _discover()


def benchmark_of(name: str) -> Benchmark:
    """The benchmark that an evaluation names, one of `BENCHMARKS` or those of recipes.

    Raises:
        UmedError: there is no such benchmark.
    """
    known = {**BENCHMARKS, RECIPE.name: RECIPE, GIVEN_BOX.name: GIVEN_BOX}
    if name not in known:
        raise UmedError(unknown_name("benchmark", name, known))
    return known[name]
