"""A chat page of one's own for a checkpoint: a picture goes in, a text with boxes and a heat map come out.

``uploads`` takes files and says by their content what they are, ``studies`` makes slices of them, ``dialogue`` asks the model,
``line`` lets one request after the other to it, ``handler`` and ``server`` speak HTTP, and ``page.*`` is what the browser gets.
Python's own HTTP server carries it: LLaVA's pins bring a web framework, today's libraries do not.

Everything is made for one person at one machine: what is uploaded lies in a temporary folder under a name that nobody can guess,
is never sent on, and goes when the page is closed or the server ends.

How to run: ``umed serve CKPT``.
"""
