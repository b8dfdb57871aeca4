"""ComfyUI-FaR: Fuse-and-Refine in the graph. Imports nothing until the host asks, so that tools can read the folder."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The host's door into the pack."""
    from .nodes import FarExtension

    return FarExtension()
