"""Diagnoses written by a vision model: ``umed recipe build R --out FILE --writer openai --model M``.

The paper's way to MAU: the model is shown the image with the region marked, is told category and region, and writes a diagnosis;
a second, reflecting request puts it into the order detection -> localisation -> recognition. What leaves the machine is pixels,
class names and boxes, and only with ``--writer openai``; never a header, a file name or a patient.

In the order in which things happen: :mod:`~umed_plugin.data.images.drawing` draws what is shown,
:mod:`~umed_plugin.data.writing.prompts` words what is asked, :mod:`~umed_plugin.data.writing.checks` says what is wrong with
an answer, :mod:`~umed_plugin.data.writing.steps` tells from the replies so far what to ask next, and
:mod:`~umed_plugin.data.writing.writer` asks.

Departures from the paper, which publishes neither prompts nor checks: both are ours. Images without a lesion keep the offline
writer's words (`umed_plugin.data.template_writer`), as there is no region to show.
"""
