"""From a recipe and image files to training records.

In the order of the data flow: `recipes` states what to read, `annotations` and `images` read it, `records` is the format of the
result, `build` makes the records, `leaks` finds test images in the training data, `template_writer` and `writing` write the
answers, and `checking` reports what does not fit. `texts` reads JSON, YAML, XML and CSV of others.
"""
