"""``umed serve``: a local chat page for a checkpoint. An image goes in; text with boxes and a heat map come out.

In the order of a request: `access` decides who may speak to the server, `handler` and `server` speak HTTP, `uploads` stores files
and finds out by their content what they are, `shelf` keeps the studies of all open pages, `studies` makes slices of them, `line`
lets one request after the other to the model, and `dialogue` asks it. ``page.*`` is what the browser gets.

The page is made for one person at one machine. Uploads lie in a temporary folder under a name that cannot be guessed. They are
never sent on, and they are removed when the page is closed or the server ends.

Python's own HTTP server carries the page. Starlette with uvicorn was tried: it saved no code (344 lines instead of 368), because
streamed uploads and answers that stop when the browser leaves need a bridge between threads and its event loop. Four of 63 tests
failed, and today's libraries (transformers 5) do not bring it.

How to run: ``umed serve CKPT``.
"""
