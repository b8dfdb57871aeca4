"""ComfyUI-FaR: Fuse-and-Refine in the graph. Imports nothing until the host asks, so that tools can read the folder."""

WEB_DIRECTORY = "./web"
REQUIRED = ("diffusers", "transformers", "segment_anything", "matplotlib")  # some are imported only when they are used


async def comfy_entrypoint():
    """The host's door into the pack."""
    import sys
    from importlib.util import find_spec
    from pathlib import Path

    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        requirements = Path(__file__).with_name("requirements.txt")
        fix = f'"{sys.executable}" -m pip install -r "{requirements}"'
        raise ModuleNotFoundError(f"no module {', '.join(missing)}. Install what the pack needs and start again: {fix}")

    from .nodes import FarExtension

    return FarExtension()
