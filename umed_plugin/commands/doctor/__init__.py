"""``umed doctor``: what a checkpoint is, and which problems it will cause. `examination` is the entry point."""
