"""Pseudo-boxes for images that have a label and no box, from an anomaly map of the checkpoint's own vision tower.

The map is MediCLIP's (arXiv 2405.11315) without its text encoder, which a LLaVA checkpoint does not have. It learns from a few
normal images, and from anomalies that are drawn into them, where something is unusual. A box is the region around its peak.

- `synthesis`: anomalies drawn into normal images;
- `anomaly_map`: the map and its loss; `tower`: the frozen tower whose patches it sees; `map_training`: its training;
- `box_rule`: from map to box; `finder`: the images of a recipe, for `umed_plugin.data.build.build_records`;
- `sheet`: the contact sheet of maps and boxes.
"""

from umed_plugin.pseudo_boxes.finder import PseudoBoxes

__all__ = ["PseudoBoxes"]
