"""The main job on an embedded default: generated studies and a checkpoint made on the spot (`umed demo`)."""
