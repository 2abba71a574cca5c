"""Checks that read every value once: NaN or infinity, fp16 overflow, or delta weights instead of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from umed_plugin.checkpoints.folder import TOWER, is_buffer
from umed_plugin.checkpoints.stored import FLOATS, BadFile, StoredTensor
from umed_plugin.commands.doctor.catalogue import finding
from umed_plugin.commands.doctor.contents import FULL, Contents
from umed_plugin.commands.doctor.findings import Finding

_LARGEST_HALF = 65504.0
# RMSNorm weights are positive in a trained model; differences of two such weights are centered at 0.
_LEAST_POSITIVE = 0.75


@dataclass
class Values:
    """Statistics of the values of all tensors.

    Attributes:
        not_finite: tensor name -> number of values that are NaN or infinite.
        too_large: tensor name -> largest magnitude, if fp16 cannot represent it.
        unread: file -> error, for files that end within a tensor.
        norms: number of values in the language model's norms.
        positive: number of these that are above 0.
    """

    not_finite: dict[str, int] = field(default_factory=dict)
    too_large: dict[str, float] = field(default_factory=dict)
    unread: dict[str, BadFile] = field(default_factory=dict)
    norms: int = 0
    positive: int = 0

    @property
    def is_delta(self) -> bool:
        """Whether the language model's weights are differences from a base model."""
        return self.norms > 0 and self.positive < _LEAST_POSITIVE * self.norms


def read_values(contents: Contents, progress: Callable[[int, int], None] | None = None) -> Values:
    """Read every tensor once, in pieces.

    Args:
        contents: of the folder.
        progress: called with (bytes read, total bytes).
    """
    values = Values()
    stored = [*contents.weights.values(), *contents.adapter.values(), *contents.others.values()]
    done, total = 0, sum(tensor.size for tensor in stored)
    for tensor in stored:
        try:
            _look(tensor, values)
        except BadFile as error:
            values.unread[str(tensor.file)] = error
        done += tensor.size
        if progress is not None:
            progress(done, total)
    return values


def _look(tensor: StoredTensor, values: Values) -> None:
    if tensor.dtype not in FLOATS:
        return
    largest, bad = 0.0, 0
    is_norm = tensor.name.startswith("model.") and tensor.name.endswith("norm.weight") and TOWER not in tensor.name
    for piece in tensor.pieces():
        piece = piece.double() if tensor.dtype == "F64" else piece.float()
        low, high = piece.aminmax()  # both NaN if any value is NaN
        top = max(-float(low), float(high)) if bool(low.isfinite()) else float("nan")
        if not math.isfinite(top):
            bad += int((~piece.isfinite()).sum())
        else:
            largest = max(largest, top)
        if is_norm:
            values.norms += len(piece)
            values.positive += int((piece > 0).sum())
    if bad:
        values.not_finite[tensor.name] = bad
    if largest > _LARGEST_HALF:
        values.too_large[tensor.name] = largest


def check_values(contents: Contents, values: Values) -> Iterator[Finding]:
    """Turn the statistics of `read_values` into findings."""
    where = str(contents.path)
    for file, error in values.unread.items():
        yield finding(error.code, error.found, file, file=file)
    if values.not_finite:
        name, count = next(iter(values.not_finite.items()))
        found = f"{len(values.not_finite)} tensors; {name} has {count} values that are not finite"
        yield finding("not-finite", found, where)
    if values.too_large:
        name = max(values.too_large, key=lambda key: values.too_large[key])
        found = f"{len(values.too_large)} tensors; {name} has a value of {values.too_large[name]:.3g}"
        yield finding("half-overflow", found, where)
    empty = [tensor for tensor in _language(contents) if 0 in tensor.shape]
    if empty:
        found = f"{len(empty)} tensors; {empty[0].name} has shape {empty[0].shape}"
        yield finding("empty-tensors", found, str(empty[0].file))
    if values.is_delta:
        share = values.positive / values.norms
        found = f"only {share:.0%} of the values of the language model's norms are positive"
        yield finding("delta", found, where, checkpoint=contents.path)
    dtypes = sorted({tensor.dtype for tensor in _language(contents) if tensor.dtype in FLOATS})
    if contents.kind == FULL and len(dtypes) > 1:
        rare = min(dtypes, key=lambda dtype: sum(tensor.dtype == dtype for tensor in _language(contents)))
        name = next(tensor.name for tensor in _language(contents) if tensor.dtype == rare)
        yield finding("mixed-dtypes", f"{', '.join(dtypes)}; {name} is {rare}", where)


def _language(contents: Contents) -> list[StoredTensor]:
    """All tensors except buffers and the tower's, which often has its own dtype."""
    stored = [*contents.weights.values(), *contents.adapter.values(), *contents.others.values()]
    return [tensor for tensor in stored if not tensor.name.startswith(TOWER) and not is_buffer(tensor.name)]
