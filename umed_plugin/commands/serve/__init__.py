"""``umed serve``: a local chat page for a checkpoint. You upload an image; the answer shows text, boxes and a heat map.

The modules, in the order of a request:

- `access` decides which requests are allowed; `requests` says what a request may be; `handler` and `server` speak HTTP.
  `page_files` is the page itself.
- `uploads` stores files and detects their type by content; `shelf` keeps the studies of all open pages.
- `studies` reads slices; `views` says which planes and windows each image has.
- `line` is the queue for the models; `dialogue` runs one; `box_places` finds its boxes in the text.
- ``page.html``, ``page.css`` and the scripts are sent to the browser: ``requests.js`` speaks to the server, ``choosing.js``
  uploads, ``pane.js`` shows a slice, ``overlays.js`` its boxes and heat, ``asking.js`` and ``answers.js`` an answer.
  ``saving.js`` writes files, and ``page.js`` holds it together.

The page is made for one user on one machine. Uploads are stored in a temporary folder under an unguessable name. They are never
sent anywhere, and they are removed when the page is closed or the server stops.

The server uses Python's own ``http.server``. Starlette with uvicorn was tried and saved little code (344 lines instead of 368).
Streamed uploads, and answers that stop when the browser disconnects, need a bridge between threads and its event loop. Four of 63
tests failed, and the libraries of the current stack (transformers 5) do not install it.

How to run: ``umed serve CKPT``, or ``umed serve CKPT --compare OTHER``.
"""
