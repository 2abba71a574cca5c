"""A checkpoint that is asked many questions about images: greedily, in batches, each image's prefix computed once.

- `umed_plugin.model.answerer`: a loaded checkpoint with the images as it sees them
- `umed_plugin.model.shared_prefix`: questions about one image share its encoding and the computation of all up to the image
- `umed_plugin.evaluation.kept_answers`: answers on disk as they come, so that a run which was killed goes on where it stopped
"""
