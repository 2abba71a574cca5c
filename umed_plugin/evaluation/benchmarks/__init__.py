"""Published benchmarks, one file each; `catalogue` finds them. `umed_plugin.evaluation` says what a file has to hold."""
