"""A stamp of a data set: it changes when the annotations or the images do, and no pixel is read for it."""

from __future__ import annotations

import hashlib

from umed_plugin.data.annotations import AnnotationSet
from umed_plugin.data.images import file_states


def data_stamp(annotations: AnnotationSet) -> dict[str, str]:
    """The data's folder and a digest of all that the annotations say and of size and time of every picture they name."""
    digest = hashlib.sha256(repr((annotations.faults.messages, annotations.missing)).encode())
    for item in annotations.items:
        digest.update(repr((item, file_states(item.image), *map(file_states, item.views))).encode())
    return {"data_root": str(annotations.root), "data_sha256": digest.hexdigest()}
