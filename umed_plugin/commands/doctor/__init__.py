"""``umed doctor``: what a checkpoint is, and what would go wrong with it. `examination` is the entry point."""
