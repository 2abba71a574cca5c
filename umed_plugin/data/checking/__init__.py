"""``umed recipe check``: whether the files on disk fit a recipe, as text and as an HTML report with pictures."""
