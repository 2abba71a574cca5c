"""The chat page's HTTP server: one thread per connection, one model call at a time, and a shutdown that waits for all threads."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from http.server import ThreadingHTTPServer
from typing import Any

from umed_plugin.commands.serve.dialogue import Dialogue
from umed_plugin.commands.serve.handler import Ending, Handler
from umed_plugin.commands.serve.line import Line
from umed_plugin.commands.serve.shelf import Shelf


class ChatServer(ThreadingHTTPServer):
    """The HTTP server of the chat page.

    Args:
        host, port: address to listen on; port 0 takes any free one.
        dialogues: answer the questions; of several, each question goes to all.
        shelf: stores the uploads.
        about: variables of the page template: ``checkpoints`` (a name for each dialogue), ``upload_mb`` and ``questions``.

    Raises:
        OSError: it cannot listen on that address.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, host: str, port: int, dialogues: Sequence[Dialogue], shelf: Shelf, about: dict[str, Any]
    ) -> None:
        self.dialogues, self.shelf, self.about = dialogues, shelf, about
        self.own_name = host
        self.line = Line()
        self.ending = threading.Event()
        self._connections: set[socket.socket] = set()
        self._changed = threading.Condition()
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        """The URL to open in the browser."""
        host, port = self.server_address[:2]
        shown = str(host) if self.own_name != "localhost" else "localhost"
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection."""
        with self._changed:
            self._connections.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Run in a connection's thread, from its first request to its last."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changed:
                self._connections.discard(request)
                self._changed.notify_all()

    def end(self, seconds: float) -> None:
        """Accept no more requests, stop a running answer at its next token, and wait for all threads.

        If Python exits first, a thread that is still inside torch aborts the process.

        Args:
            seconds: maximum time to wait.
        """
        self.ending.set()
        self.server_close()
        with self._changed:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # the browser has just closed it
                    connection.shutdown(socket.SHUT_RD)
            self._changed.wait_for(lambda: not self._connections, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore disconnected browsers. Print other errors with traceback but without message, which may quote a file."""
        kind, _, trace = sys.exc_info()
        if kind is None or issubclass(kind, (ConnectionError, TimeoutError, Ending)):
            return
        print("".join(traceback.format_tb(trace)) + f"umed serve: {kind.__name__} in a request", file=sys.stderr)
