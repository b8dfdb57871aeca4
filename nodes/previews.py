"""Pictures and words that a node shows on itself."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..far_train.data.images import from_pil, to_pil
from ..far_train.evaluation.sheets import checkerboard, contact_sheet
from . import host_ui

MAX_SHOWN = 24  # pictures on a sheet


def as_image(picture: Image.Image) -> Tensor:
    """A picture as an IMAGE [1,H,W,3]."""
    return from_pil(picture)[None]


def shown(
    cls: type[io.ComfyNode], picture: Image.Image, text: str = "", warnings: Sequence[str] = ()
) -> Mapping[str, Any]:
    """A node's own display: a picture, and words that also go to the log. Warnings stand first: newer front ends show
    but two lines and a scroll bar."""
    display = dict(ui.PreviewImage(as_image(picture), cls=cls).as_dict())
    text = "\n".join([*warnings, text])
    if text:
        host_ui.log_and_show(text, cls.hidden.unique_id)
        display["text"] = [text]
    return display


def refusal_shown(validate: Callable[..., bool | str]) -> Callable[..., bool | str]:
    """Decorator of ``validate_inputs``: why an input is refused also appears on the node, in the browser that asked.

    If another part of the graph is valid, the host runs that, and the front end gives the refused node no more than
    a red frame.
    """

    @functools.wraps(validate)
    def validate_and_show(cls: type[io.ComfyNode], *args: Any, **inputs: Any) -> bool | str:
        answer = validate(cls, *args, **inputs)
        if answer is not True:
            host_ui.show_refusal(str(answer), getattr(cls.hidden, "unique_id", None))
        return answer

    validate_and_show.__signature__ = inspect.signature(validate)  # the host passes the inputs that it names
    return validate_and_show


def errors_shown(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Decorator of a node: what goes wrong while it is executed also appears on it. A second time it changes nothing.

    Else it would go on showing what it last said, and the front end keeps an error's own words behind a button.
    """
    execute = node.execute.__func__
    if hasattr(execute, "shows_errors"):
        return node

    @functools.wraps(execute)
    def execute_and_show(cls: type[io.ComfyNode], *args: Any, **inputs: Any) -> io.NodeOutput:
        try:
            return execute(cls, *args, **inputs)
        except Exception as e:
            host_ui.show_error(e)
            raise

    execute_and_show.shows_errors = True
    node.execute = classmethod(execute_and_show)
    return node


def subject_sheet(images: Sequence[Tensor], masks: Sequence[Tensor | None], labels: Sequence[str] = ()) -> Image.Image:
    """Subjects on a checkerboard, pictures without a mask as they are: a contact sheet of the first of them."""
    pictures = [
        to_pil(image) if mask is None else checkerboard(image, mask)
        for image, mask in zip(images[:MAX_SHOWN], masks[:MAX_SHOWN])
    ]
    return contact_sheet(pictures, labels[:MAX_SHOWN], cell=256)
