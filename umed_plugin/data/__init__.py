"""From a recipe and image files to training records.

In the order in which data flows: `recipes` says what to read, `annotations` and `images` read it, `records` holds the result,
`build` makes the records, `leaks` looks for test images in the training data, `template_writer` and `writing` word the answers,
and `checking` reports what does not fit.
"""
