"""ComfyUI-FaR: Fuse-and-Refine in the graph. Imports nothing until the host asks, so that tools can read the folder."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The host's door into the pack."""
    try:
        from .nodes import FarExtension
    except ModuleNotFoundError as e:
        import sys
        from pathlib import Path

        requirements = Path(__file__).with_name("requirements.txt")
        fix = f'"{sys.executable}" -m pip install -r "{requirements}"'
        raise ModuleNotFoundError(f"{e}. Install what the pack needs and start again: {fix}", name=e.name) from e

    return FarExtension()
