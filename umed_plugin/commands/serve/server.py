"""The chat page's server: one thread a connection, one model call at a time, and an end that waits for all of them."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import traceback
from http.server import ThreadingHTTPServer
from typing import Any

from umed_plugin.commands.serve.dialogue import Dialogue
from umed_plugin.commands.serve.handler import Ending, Handler
from umed_plugin.commands.serve.line import Line
from umed_plugin.commands.serve.shelf import Shelf


class ChatServer(ThreadingHTTPServer):
    """The server.

    Args:
        host, port: to listen on; port 0 takes a free one.
        dialogue: of the questions.
        shelf: for the uploads.
        about: what the page shows of the checkpoint.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, dialogue: Dialogue, shelf: Shelf, about: dict[str, Any]) -> None:
        self.dialogue, self.shelf, self.about = dialogue, shelf, about
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
        """The address for the browser."""
        host, port = self.server_address[:2]
        shown = str(host) if self.own_name != "localhost" else "localhost"
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a connection's thread."""
        with self._changed:
            self._connections.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """A connection's thread, from its first request to its last."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changed:
                self._connections.discard(request)
                self._changed.notify_all()

    def end(self, seconds: float) -> None:
        """Take no more requests, stop an answer that is being written at its next token, and wait for all threads.

        Python must not end before them: a thread that is inside torch then aborts the process.
        """
        self.ending.set()
        self.server_close()
        with self._changed:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # it has just been closed by the browser
                    connection.shutdown(socket.SHUT_RD)
            self._changed.wait_for(lambda: not self._connections, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone is no error. Of others the place is told, but no message, which may quote a file."""
        kind, _, trace = sys.exc_info()
        if kind is None or issubclass(kind, (ConnectionError, TimeoutError, Ending)):
            return
        print("".join(traceback.format_tb(trace)) + f"umed serve: {kind.__name__} in a request", file=sys.stderr)
