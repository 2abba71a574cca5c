"""Diagnoses written by a vision model: ``umed recipe build R --out FILE --writer openai --model M``.

This is how the paper built MAU: the model is shown the image with the region marked, is told category and region, and writes a
diagnosis. A second, reflecting request puts it into the order detection -> localisation -> recognition. Pixels, class names and
boxes leave the machine, and only with ``--writer openai``; headers, file names and patients never do.

The modules in the order in which they are used:

- :mod:`~umed_plugin.data.writing.burnt_in` holds images back that may have text burnt in.
- :mod:`~umed_plugin.data.images.drawing` draws the images that are sent.
- :mod:`~umed_plugin.data.writing.prompts` holds the prompts.
- :mod:`~umed_plugin.data.writing.checks` finds the faults of a reply.
- :mod:`~umed_plugin.data.writing.steps` decides the next request from the replies so far.
- :mod:`~umed_plugin.data.writing.writer` and :mod:`~umed_plugin.data.writing.batched` send the requests.
- :mod:`~umed_plugin.data.writing.merge` puts the texts into the records.
- :mod:`~umed_plugin.data.writing.review` chooses what is reviewed; `umed recipe review` writes the page.
- :mod:`~umed_plugin.data.writing.decisions` reads what the reviewers decided, :mod:`~umed_plugin.data.writing.agreement` how far
  they agree.

Departures from the paper: it publishes neither prompts nor checks; both are ours. Images without a lesion keep the text of the
offline writer (`umed_plugin.data.template_writer`), because there is no region to show.
"""
