"""A listener to the host's websocket, in standard library alone: what a user sees while a prompt runs."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .comfy_server import ComfyServer

if TYPE_CHECKING:
    from typing import Self

TEXT, BINARY = 1, 2
# Kinds of binary messages, the first four bytes: a line of text on a node, a picture with its node's id.
NODE_TEXT, PREVIEW = 3, 4
# Stands in whatever a training on a small dataset and a base of Stable Diffusion 2.1 says.
SIZE_NOTE = re.compile(r"The dataset has \d+ px, this base was made for 768 px, where it learns and draws best.(\n|$)")


class Listener:
    """Context manager that collects what a client is sent, by default the one whose id the server's prompts have.

    ``events``: (type, data) of JSON messages; ``binaries``: (kind, payload) of the others.
    """

    def __init__(self, server: ComfyServer, client_id: str | None = None):
        self.server, self.client_id = server, client_id or server.client_id
        self.events: list[tuple[str, Any]] = []
        self.binaries: list[tuple[int, bytes]] = []
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId={self.client_id} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        while self._stream.readline().strip():
            pass
        self._send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}).encode())
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()

    @property
    def texts(self) -> list[tuple[str, str]]:
        """(node id, text) of the lines shown on nodes."""
        found = []
        for payload in (payload for kind, payload in self.binaries if kind == NODE_TEXT):
            end = 4 + int.from_bytes(payload[:4], "big")
            found.append((payload[4:end].decode(), html.unescape(payload[end:].decode())))
        return found

    @property
    def said(self) -> list[tuple[str, str]]:
        """:attr:`texts` without that note."""
        return [(i, SIZE_NOTE.sub("", text)) for i, text in self.texts if not SIZE_NOTE.fullmatch(text)]

    def wait_until(self, happened: Callable[[], Any], timeout: float = 60) -> None:
        """Wait until ``happened()`` is true of what has come. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while not happened():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.client_id} waited in vain; it has {self.texts}")
            time.sleep(0.05)

    def catch_up(self) -> None:
        """Wait until all that was sent so far has come: the host sends in order, and this asks for a last message."""
        empty = {"1": {"class_type": "PreviewAny", "inputs": {"source": f"end for {self.client_id}"}}}
        prompt_id = self.server.queue(empty, self.client_id)
        end = ("executing", {"node": None, "prompt_id": prompt_id})
        self.wait_until(lambda: end in self.events)

    def _send(self, payload: bytes) -> None:
        """One text frame of up to 125 bytes; a client must mask, and a mask of zeros changes nothing."""
        self._socket.sendall(bytes([0x80 | TEXT, 0x80 | len(payload)]) + bytes(4) + payload)

    def _listen(self) -> None:
        message, kind = b"", 0
        while len(head := self._stream.read(2)) == 2:
            size = head[1] & 0x7F
            if size > 125:
                size = int.from_bytes(self._stream.read(2 if size == 126 else 8), "big")
            payload = self._stream.read(size)
            kind = head[0] & 0x0F or kind  # 0 continues the message before
            message += payload
            if not head[0] & 0x80:
                continue
            if kind == TEXT:
                event = json.loads(message)
                self.events.append((event["type"], event["data"]))
            elif kind == BINARY:
                self.binaries.append((int.from_bytes(message[:4], "big"), message[4:]))
            message = b""
