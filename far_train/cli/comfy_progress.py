"""What a running ComfyUI tells of a run while it goes on: the node at work and its step, over the host's WebSocket.

With the standard library alone (RFC 6455). Whoever listens is only better informed: a host or proxy that gives no
WebSocket, and a connection that breaks, change nothing else.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self

CONNECT_SECONDS = 10.0
RETRY_SECONDS = 5.0
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10  # opcodes; others carry pictures, which nobody looks at here


class NoWebSocket(Exception):
    """The host answers, but not with a WebSocket."""


@dataclass(frozen=True)
class Step:
    """The node at work, and how much of its work is done; ``total`` is 1 for a node that doesn't count."""

    node_id: str
    done: int
    total: int

    def words(self, title: str) -> str:
        return f"{title}: {self.done} of {self.total}" if self.total > 1 else title


def running_step(nodes: Mapping[str, Mapping[str, Any]]) -> Step | None:
    """The step of the node that began last, by a ``progress_state`` message's ``nodes``; None if none is running.

    A node that stands for others, such as a subgraph's, is named by the id that the workflow has for it.
    """
    for node_id, state in reversed(nodes.items()):
        if state.get("state") == "running":
            return Step(str(state.get("display_node_id") or node_id), round(state["value"]), round(state["max"]))
    return None


class ProgressListener:
    """Context manager: ``step`` is the step of the run that ``client_id`` queued at ``url``, None while unknown."""

    def __init__(self, url: str, client_id: str):
        self.step: Step | None = None
        self._address = urllib.parse.urlsplit(url)
        self._client_id = client_id
        self._connection: socket.socket | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        connection = self._connection
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                with self._connect() as self._connection, self._connection.makefile("rb") as stream:
                    self._shake_hands(stream)
                    for text in self._texts(stream):
                        self._take(json.loads(text))
            except NoWebSocket:
                return
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                pass  # broken off, or not the messages that we know
            self.step = None
            self._stop.wait(RETRY_SECONDS)

    def _connect(self) -> socket.socket:
        host, secure = self._address.hostname or "", self._address.scheme == "https"
        connection = socket.create_connection((host, self._address.port or (443 if secure else 80)), CONNECT_SECONDS)
        if secure:
            connection = ssl.create_default_context().wrap_socket(connection, server_hostname=host)
        return connection

    def _shake_hands(self, stream: IO[bytes]) -> None:
        path = f"{self._address.path}/ws?clientId={self._client_id}"
        key = base64.b64encode(os.urandom(16)).decode()
        self._connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {self._address.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        if b" 101 " not in stream.readline():
            raise NoWebSocket
        http.client.parse_headers(stream)
        self._connection.settimeout(None)  # a node may work for hours without a word

    def _texts(self, stream: IO[bytes]) -> Iterator[bytes]:
        """The text messages, until the connection ends."""
        message, kind = b"", 0
        while len(head := stream.read(2)) == 2:
            size = head[1] & 0x7F  # a server's frames have no mask
            if size > 125:
                size = int.from_bytes(stream.read(2 if size == 126 else 8), "big")
            payload, opcode = stream.read(size), head[0] & 0x0F
            if opcode == CLOSE:
                return
            if opcode == PING:  # at most 125 bytes; a client's frames have a mask, and one of zeros changes nothing
                self._connection.sendall(bytes([0x80 | PONG, 0x80 | len(payload)]) + bytes(4) + payload)
            if opcode >= CLOSE:
                continue
            message, kind = message + payload, opcode or kind  # 0 continues the message before
            if head[0] & 0x80:
                if kind == TEXT:
                    yield message
                message = b""

    def _take(self, event: Mapping[str, Any]) -> None:
        # The host sends these to the client whose prompt is running, and to no other.
        if event["type"] == "progress_state":
            self.step = running_step(event["data"]["nodes"])
        elif event["type"] == "executing" and event["data"].get("node") is None:
            self.step = None
