"""Test-only node that registers the pack's nodes again."""

from __future__ import annotations

from comfy_api.latest import io
from server import PromptServer

from .probes import far


class AskTwice(io.ComfyNode):
    """Asks the pack for its nodes once more, as a host that reloads packs would; says what has been done twice."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="FaRTest_AskTwice", category="FaR/test", inputs=[], is_output_node=True)

    @classmethod
    async def execute(cls) -> io.NodeOutput:
        handlers = PromptServer.instance.on_prompt_handlers
        listening, extension = len(handlers), far("nodes").FarExtension()
        nodes = await extension.get_node_list()
        wrapped = sum(hasattr(node.execute.__func__.__wrapped__, "__wrapped__") for node in nodes)
        return io.NodeOutput(ui={"text": (f"{len(nodes)} nodes, {len(handlers) - listening} more, {wrapped} twice",)})


NODES: list[type[io.ComfyNode]] = [AskTwice]
