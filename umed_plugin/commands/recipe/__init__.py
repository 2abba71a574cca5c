"""``umed recipe``: list, show, check and build the training records of a recipe; write and review diagnoses."""
