"""Augmented studies: ``--umed_augment`` changes pixels, boxes and text of a training record together.

`study` draws what happens to a record in an epoch and moves its boxes, `texts` its conversation, and `pixels` its image.
`survey` tries the records of a run, and says which are moved.
"""
