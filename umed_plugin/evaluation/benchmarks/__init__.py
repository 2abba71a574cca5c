"""Published benchmarks, one file each; `catalogue` lists them. `umed_plugin.evaluation` says what a file has to hold."""
