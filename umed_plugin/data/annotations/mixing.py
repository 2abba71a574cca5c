"""Mixtures: how many images each source contributes, and which."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from umed_plugin.data.annotations.base import Annotated, AnnotationSet
from umed_plugin.data.annotations.finding import real_path
from umed_plugin.data.annotations.merging import name_whole_files
from umed_plugin.data.annotations.one_image import in_one_image, is_negative, picked_images
from umed_plugin.data.annotations.patients import tell_empty_splits
from umed_plugin.data.recipes.recipe import Mixture, Recipe


def mixed(mixture: Mixture, root: Path, read: Callable[[Recipe, Path], AnnotationSet]) -> AnnotationSet:
    """The images that a mixture selects from its sources. A source that is not on disk is a fault.

    Args:
        read: returns all annotations of one source in its folder.
    """
    annotations = AnnotationSet(root, wanted=mixture.size)
    positives: dict[str, list[list[Annotated]]] = {}
    negatives: dict[str, list[list[Annotated]]] = {}
    for name, recipe in mixture.recipes.items():
        folder = root / mixture.sources[name].folder
        if not folder.is_dir():
            terms = recipe.terms
            annotations.faults.add(folder, f"no such folder. Get {name} ({terms.licence}) from {terms.url}")
            continue
        source = read(recipe, folder)
        annotations.faults.messages += source.faults.messages
        annotations.faults.remarks += [f"{name}: {remark}" for remark in source.faults.remarks]
        annotations.faults.without_effect += [f"{name}: {remark}" for remark in source.faults.without_effect]
        annotations.told_options |= source.told_options
        for (what, why), count in source.faults.left_out.items():
            annotations.faults.left_out[what, f"{name}: {why}"] += count
        annotations.missing += source.missing
        annotations.normals += source.normals
        annotations.left_out.update({f"{name}: {reason}": count for reason, count in source.left_out.items()})
        images = in_one_image(source.items)
        positives[name] = [image for image in images if not is_negative(image)]
        negatives[name] = [image for image in images if is_negative(image)]
    shares = {name: source.share for name, source in mixture.sources.items()}
    # Few positives allow few negatives; few negatives leave room for more positives.
    asked = round(mixture.size * mixture.negative_share)
    found = sum(dealt(mixture.size - asked, _sizes(positives), shares).values())
    without = dealt(min(asked, most_negatives(found, mixture.negative_share)), _sizes(negatives), shares)
    with_lesion = dealt(mixture.size - sum(without.values()), _sizes(positives), shares)
    for name in positives:
        seed = mixture.split.seed
        annotations.items += picked_images(positives[name], with_lesion[name], seed)
        annotations.items += picked_images(negatives[name], without[name], seed)
        selected = with_lesion[name] + without[name]
        above = len(positives[name]) + len(negatives[name]) - selected
        annotations.left_out[f"{name}: above its share"] += above
    _check_shared_images(annotations)
    tell_empty_splits(annotations.items, mixture.split.fractions, annotations.faults)
    annotations.left_out = +annotations.left_out
    return annotations


def most_negatives(positives: int, share: float) -> int:
    """The most images without a lesion beside so many with one, if they may be ``share`` of all images."""
    # 54 * 0.1 / (1 - 0.1) is 6, and a little less in floating point.
    return math.floor(positives * share / (1 - share) + 1e-9)


def trim_negatives(annotations: AnnotationSet, mixture: Mixture) -> None:
    """Leave out negatives of train and val that are too many since images with a lesion were held out. The test stays."""
    images = in_one_image(annotations.items)
    negatives = [image for image in images if is_negative(image)]
    above = len(negatives) - most_negatives(len(images) - len(negatives), mixture.negative_share)
    trained = [image for image in negatives if image[0].split != "test"]
    if above <= 0 or not trained:
        return
    kept = {id(item) for item in picked_images(trained, max(0, len(trained) - above), mixture.split.seed)}
    dropped = {id(item) for image in trained for item in image} - kept
    annotations.items = [item for item in annotations.items if id(item) not in dropped]
    annotations.left_out["negative above negative_share"] += min(above, len(trained))


def _check_shared_images(annotations: AnnotationSet) -> None:
    """Add a fault for images that two sources describe: each says that the lesions of the other are not there."""
    name_whole_files(annotations.items)
    folders: dict[str, str] = {}
    first: dict[tuple[str, object], Annotated] = {}
    shared: list[tuple[Annotated, Annotated]] = []
    for item in annotations.items:
        earlier = first.setdefault((real_path(str(item.image), folders), item.slice), item)
        phrases_of_one = bool(item.phrase and earlier.phrase) and item.recipe is earlier.recipe
        if earlier is not item and not phrases_of_one:
            shared.append((earlier, item))
    if shared:
        one, other = shared[0]
        annotations.faults.add(
            "sources",
            f"{one.recipe.name} and {other.recipe.name} both describe {one.image}, like {len(shared)} images in all. An "
            "image must be in one source",
        )


def _sizes(lists: Mapping[str, list[list[Annotated]]]) -> dict[str, int]:
    return {name: len(images) for name, images in lists.items()}


def dealt(size: int, available: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, int]:
    """Number of images that each source contributes to ``size``, in the ratio of the shares, as far as it has them.

    A source with fewer images than its part gives all of them. The rest is divided among the others in the ratio of their shares.
    The numbers sum to ``size``, or to all images there are.
    """
    given: dict[str, int] = {}
    left, waiting = size, {name: shares[name] for name in available}
    while waiting:
        parts = {name: left * share / sum(waiting.values()) for name, share in waiting.items()}
        short = [name for name, part in parts.items() if available[name] <= part]
        if not short:
            # Largest remainder: round down, then give one more to those that lost most.
            whole = {name: int(part) for name, part in parts.items()}
            by_remainder = sorted(parts, key=lambda name: (whole[name] - parts[name], name))
            for name in by_remainder[: left - sum(whole.values())]:
                whole[name] += 1
            return given | whole
        for name in short:
            given[name] = available[name]
            left -= available[name]
            del waiting[name]
    return given
