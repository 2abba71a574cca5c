"""Mixtures: how many images each source gives, and which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from umed_plugin.data.annotations.base import Annotated, AnnotationSet
from umed_plugin.data.annotations.splits import picked_by_hash
from umed_plugin.data.recipes.recipe import Mixture, Recipe


def mixed(mixture: Mixture, root: Path, read: Callable[[Recipe, Path], AnnotationSet]) -> AnnotationSet:
    """The images that a mixture chooses among its sources'; a source that is not on disk is a fault.

    Args:
        read: gives all annotations of one source in its folder.
    """
    found = AnnotationSet(root, wanted=mixture.size)
    positives: dict[str, list[Annotated]] = {}
    negatives: dict[str, list[Annotated]] = {}
    for name, recipe in mixture.recipes.items():
        folder = root / mixture.sources[name].folder
        if not folder.is_dir():
            terms = recipe.terms
            found.faults.add(folder, f"no such folder. Get {name} ({terms.licence}) from {terms.url}")
            continue
        one = read(recipe, folder)
        found.faults.messages += one.faults.messages
        found.missing += one.missing
        found.left_out.update({f"{name}: {reason}": count for reason, count in one.left_out.items()})
        positives[name] = [item for item in one.items if item.boxes]
        negatives[name] = [item for item in one.items if not item.boxes]
    shares = {name: source.share for name, source in mixture.sources.items()}
    without = dealt(round(mixture.size * mixture.negative_share), _sizes(negatives), shares)
    with_lesion = dealt(mixture.size - sum(without.values()), _sizes(positives), shares)
    for name in positives:
        seed = mixture.split.seed
        chosen = picked_by_hash(positives[name], with_lesion[name], seed)
        chosen += picked_by_hash(negatives[name], without[name], seed)
        found.items += chosen
        above = len(positives[name]) + len(negatives[name]) - len(chosen)
        found.left_out[f"{name}: above its share"] += above
    found.left_out = +found.left_out
    return found


def _sizes(lists: Mapping[str, list[Annotated]]) -> dict[str, int]:
    return {name: len(items) for name, items in lists.items()}


def dealt(size: int, available: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, int]:
    """How many images each source gives to ``size``: in the ratio of the shares, as far as it has them.

    A source with fewer than its part gives all; what it lacks is divided among the others in the ratio of their shares. They sum
    to ``size``, or to all there are.
    """
    given: dict[str, int] = {}
    left, still = size, {name: shares[name] for name in available}
    while still:
        parts = {name: left * share / sum(still.values()) for name, share in still.items()}
        short = [name for name, part in parts.items() if available[name] <= part]
        if not short:
            whole = {name: int(part) for name, part in parts.items()}
            by_rest = sorted(parts, key=lambda name: (whole[name] - parts[name], name))
            for name in by_rest[: left - sum(whole.values())]:
                whole[name] += 1
            return given | whole
        for name in short:
            given[name] = available[name]
            left -= available[name]
            del still[name]
    return given
