"""The report of a run: one HTML file that opens without a server and loads nothing else.

`run_folder` reads the run, `table` compares its stages, `curves` draws its metrics, `pictures` and `gallery` prepare the studies,
`page` writes the file. `before_after` draws some studies as a picture for a README or a talk.

How to run: ``umed report RUN_DIR``; `umed demo` writes one at its end.
"""
