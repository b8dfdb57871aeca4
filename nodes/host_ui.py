"""The host's face to the user: a node's progress bar, pictures and text, and cancelling.

All of it goes to one web socket client, the browser that queued the prompt. The host's own functions send to every
browser when they are given no client, and there a node of another graph may have the same number.
"""

from __future__ import annotations

import html
import logging
from contextvars import ContextVar
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer

from ..far_train.utils import errors
from ..far_train.utils.errors import FarError
from .prompt_graph import plain_text_notes

log = logging.getLogger(__name__)

PREVIEW_SIDE = 512  # pixels of a live preview's longest side

# The client that posted the prompt being validated. The host answers each request in an asyncio task of its own, with
# its own context, so that this can't be read in another request or in the thread that runs prompts.
_posting_client: ContextVar[str | None] = ContextVar("far_posting_client", default=None)


class Progress:
    """A node's progress bar with live previews. The host's bar raises on a cancel; this one leaves that to the caller,
    who must save first: see :func:`interrupted` and :func:`raise_interrupted`."""

    def __init__(self, total: int, node_id: str | None = None):
        self._bar = comfy.utils.ProgressBar(max(total, 1), node_id=node_id)

    def update(self, done: int, total: int | None = None, preview: Image.Image | None = None) -> None:
        """Show ``done`` of ``total`` and, if given, a picture on the node."""
        if interrupted() or running_client() is None:
            return
        picture = None if preview is None else ("JPEG", preview.convert("RGB"), PREVIEW_SIDE)
        try:
            self._bar.update_absolute(done, total, picture)
        except comfy.model_management.InterruptProcessingException:  # cancelled this very moment
            comfy.model_management.interrupt_current_processing(True)


def interrupted() -> bool:
    """Whether the user has cancelled. Only looks."""
    return comfy.model_management.processing_interrupted()


def raise_interrupted() -> None:
    """End the node as cancelled, in the way that the host expects."""
    comfy.model_management.interrupt_current_processing(False)
    raise comfy.model_management.InterruptProcessingException()


def stop_if_interrupted() -> None:
    """End the node if the user has cancelled: for loops that have nothing to save."""
    if interrupted():
        raise_interrupted()


def log_and_show(text: str, node_id: str | None) -> None:
    """Show a line of text on a node that is being executed, and log it."""
    log.info("%s", text)
    show_text(text, node_id)


def show_text(text: str, node_id: str | None) -> None:
    """Show a line of text on a node that is being executed."""
    _send(text, node_id, running_client())


def show_refusal(text: str, node_id: str | None) -> None:
    """Show on a node why it is refused: while a prompt is validated, when another client's prompt may be running."""
    _send(text, node_id, _posting_client.get())


def show_error(error: Exception) -> None:
    """Show on the node that is being executed what went wrong; a cancel is no error."""
    context = get_executing_context()
    if context is None or isinstance(error, comfy.model_management.InterruptProcessingException):
        return
    words = str(error)
    if not isinstance(error, FarError):  # a fault of some library, whose words alone may say little
        words = f"{type(error).__name__}: {words}"
    show_text(words, context.node_id)


def shorten_error_names() -> None:
    """Have the host print FaR.PhotoError and not the path of the pack's folder before it.

    Here and not in far_train, whose errors are pickled where it works in several processes.
    """
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, FarError):
            kind.__module__ = "FaR"


def listen_to_prompts() -> None:
    """Have the host say who posts a prompt before it validates the prompt, which :func:`show_refusal` needs.

    What a prompt would read as plain text is said in that browser at once.
    """
    server = _server()
    if server is not None and _note_client not in server.on_prompt_handlers:
        server.add_on_prompt_handler(_note_client)


def _note_client(request: Any) -> Any:
    posted = request if isinstance(request, dict) else {}
    client = posted.get("client_id")
    client = client if isinstance(client, str) else None
    _posting_client.set(client)
    for node_id, note in plain_text_notes(posted.get("prompt"), client).items():
        show_refusal(note, node_id)
    return request


def running_client() -> str | None:
    """The client whose prompt is being executed; None where it named none. Means nothing outside of ``execute``."""
    return getattr(_server(), "client_id", None)


def _server() -> PromptServer | None:
    """None where another program runs the host's nodes without its server."""
    return getattr(PromptServer, "instance", None)


def _send(text: str, node_id: str | None, client: str | None) -> None:
    if client is None or node_id is None:
        return
    # "28:8" is node 8 in the subgraph that node 28 stands for. The front end only shows the text of nodes whose graph
    # is open: one of the two is seen.
    for shown_on in dict.fromkeys((node_id, node_id.split(":")[0])):
        # The front end takes the text for HTML, and would swallow <corgi-dog>.
        _server().send_progress_text(html.escape(text, quote=False), shown_on, sid=client)


def blocked_output() -> Any:
    """In the place of a node's output: what is connected to it doesn't run, and no error is shown."""
    return ExecutionBlocker(None)
