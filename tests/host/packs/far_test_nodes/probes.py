"""Test-only nodes that look at what the pack's nodes made: a small dataset, the base as a file, raw predictions."""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from pathlib import Path

import comfy.cldm.cldm
import comfy.clip_vision
import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import folder_paths
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_api.latest import io
from safetensors.torch import save_file

from .tiny import randomize

TIMESTEPS = (37, 601)


def far(module: str):
    """A module of the pack as the host has loaded it, so that its classes are the nodes' own."""
    pack = next(name for name in sys.modules if name.endswith("ComfyUI-FaR"))
    return importlib.import_module(f"{pack}.{module}")


def disc(colour: tuple[float, float, float], side: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """A coloured disc on grey: picture [side, side, 3] and mask [side, side]."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    mask = ((rows - side / 2) ** 2 + (columns - side / 2) ** 2 < (0.3 * side) ** 2).float()
    return mask[..., None] * torch.tensor(colour) + (1 - mask[..., None]) * 0.5, mask


class Dataset(io.ComfyNode):
    """Two balls, red and blue, with two regularization images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaRTest_Dataset",
            category="FaR/test",
            inputs=[
                io.Int.Input("count", default=4, min=1, max=100),
                io.Int.Input("fusion_seed", default=0, min=0, max=100),
                io.Int.Input("priors", default=2, min=0, max=10, optional=True),
            ],
            outputs=[io.Custom("FAR_DATASET").Output()],
        )

    @classmethod
    def execute(cls, count: int, fusion_seed: int, priors: int = 2) -> io.NodeOutput:
        concepts, config = far("far_train.data.concepts"), far("far_train.data.settings")
        balls = {"red-ball": (0.9, 0.1, 0.1), "blue-ball": (0.1, 0.1, 0.9)}
        learned = [
            concepts.Concept(f"<{token}>", "ball", *((part,) for part in disc(colour)))
            for token, colour in balls.items()
        ]
        pictures = [concepts.ClassPicture("ball", *disc((0.1, 0.8, 0.3 * i))) for i in range(priors)]
        settings = config.FusionConfig(size=128, count=count, fusion_seed=fusion_seed)
        return io.NodeOutput(far("far_train.data.fusion").ConceptFusion(learned, pictures, (), settings))


class SaveBase(io.ComfyNode):
    """The base as a single file, by the host's own means: what diffusers' side of a comparison is loaded from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaRTest_SaveBase",
            category="FaR/test",
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                io.String.Input("name", default="base"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, vae, name: str) -> io.NodeOutput:
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        comfy.sd.save_checkpoint(str(path), model, clip, vae)
        return io.NodeOutput()


class Predict(io.ComfyNode):
    """What the host's UNet says to fixed latents and timesteps under a conditioning, written to output/NAME."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaRTest_Predict",
            category="FaR/test",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("conditioning"),
                io.String.Input("name", default="prediction"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, conditioning, name: str) -> io.NodeOutput:
        comfy.model_management.load_models_gpu([model])
        latents = torch.randn(len(TIMESTEPS), 4, 16, 16, generator=torch.Generator().manual_seed(0))
        timesteps = torch.tensor(TIMESTEPS)
        context, about = conditioning[0]
        tensors = {"latents": latents, "timesteps": timesteps, "context": context.expand(len(TIMESTEPS), -1, -1)}
        # As the host's samplers do: the size of the picture unless the conditioning tells another.
        sizes = {"width": 8 * latents.shape[-1], "height": 8 * latents.shape[-2], "device": latents.device}
        vector = model.model.encode_adm(**sizes | about)
        more = {} if vector is None else {"y": vector.expand(len(TIMESTEPS), -1)}
        tensors["prediction"] = model.model.diffusion_model(latents, timesteps, context=tensors["context"], **more)
        if about.get("pooled_output") is not None:
            tensors["pooled"] = about["pooled_output"]
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path)
        return io.NodeOutput()


class Pixels(io.ComfyNode):
    """What the host's VAE makes of fixed latents and of a fixed picture, written to output/NAME."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaRTest_Pixels",
            category="FaR/test",
            inputs=[io.Vae.Input("vae"), io.String.Input("name", default="pixels")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, vae, name: str) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 4, 16, 16, generator=generator)
        pixels = torch.rand(1, 128, 128, 3, generator=generator)
        tensors = {"latents": latents, "pixels": pixels, "decoded": vae.decode(latents), "encoded": vae.encode(pixels)}
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path)
        return io.NodeOutput()


class LiveModels(io.ComfyNode):
    """How many of diffusers' UNets the host's process holds weights of: 0 once a training has given all back."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="FaRTest_LiveModels", category="FaR/test", inputs=[], is_output_node=True)

    @classmethod
    def fingerprint_inputs(cls) -> float:
        return time.monotonic()

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from diffusers import UNet2DConditionModel

        models = [o for o in gc.get_objects() if isinstance(o, UNet2DConditionModel)]
        return io.NodeOutput(ui={"text": (str(sum(not next(m.parameters()).is_meta for m in models)),)})


class SaveMask(io.ComfyNode):
    """A MASK as it is, written to output/NAME: pictures in files have only 256 steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaRTest_SaveMask",
            category="FaR/test",
            inputs=[io.Mask.Input("mask"), io.String.Input("name", default="mask")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, mask, name: str) -> io.NodeOutput:
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file({"mask": mask.clone().contiguous()}, path)
        return io.NodeOutput()


def box_sender(io_type: str, node_id: str) -> type[io.ComfyNode]:
    """A node that sends a box as one of the types that are in use."""

    class Box(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            sides = [io.Int.Input(name, default=0, max=4096) for name in ("x", "y", "width", "height")]
            frames = io.String.Input("frames", default="", optional=True, tooltip="How many boxes for each photo.")
            outputs = [io.Custom(io_type).Output()]
            return io.Schema(node_id=node_id, category="FaR/test", inputs=[*sides, frames], outputs=outputs)

        @classmethod
        def execute(cls, frames: str = "", **box: int) -> io.NodeOutput:
            scored = [{**box, "score": 0.9 - 0.1 * i} for i in range(9)]
            return io.NodeOutput([scored[: int(n)] for n in frames.split(",")] if frames else box)

    return Box


class ImagePrompt:
    """What an image-prompt pack puts into a cross-attention slot: it attends to tokens of its own and adds the result.

    Like those packs it expects its own kind in the slot when it is applied twice, and it calls the host's attention
    without the options of the pass.
    """

    def __init__(self, width: int, weight: float):
        self.weights, self.tokens = [weight], torch.randn(4, width, generator=torch.Generator().manual_seed(7))

    def add(self, weight: float) -> None:
        self.weights.append(weight)

    def __call__(self, q, k, v, extra):
        out = optimized_attention(q, k, v, extra["n_heads"])
        own = self.tokens.to(q).expand(len(q), -1, -1)
        return out + sum(self.weights) * optimized_attention(q, own, own, extra["n_heads"])


class ImagePromptNode(io.ComfyNode):
    """Applies ImagePrompt to every cross-attention of a tiny or small SD 2.x MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaRTest_ImagePrompt",
            category="FaR/test",
            inputs=[io.Model.Input("model"), io.Float.Input("weight", default=0.5)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, weight: float) -> io.NodeOutput:
        patched = model.clone()
        for name, layer in patched.model.diffusion_model.named_modules():
            if not name.endswith(".attn2"):
                continue
            parts = name.split(".")
            block = (parts[0].split("_")[0], 0 if parts[0] == "middle_block" else int(parts[1]))
            slots = patched.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
            if block in slots:
                slots[block].add(weight)
            else:
                patched.set_model_attn2_replace(ImagePrompt(layer.to_k.weight.shape[0], weight), *block)
        return io.NodeOutput(patched)


class TinyControlNet(io.ComfyNode):
    """A ControlNet of the host's own class for the given MODEL's shape, with random weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaRTest_ControlNet",
            category="FaR/test",
            inputs=[io.Model.Input("model")],
            outputs=[io.ControlNet.Output()],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        shape = {k: v for k, v in model.model.model_config.unet_config.items() if k != "out_channels"}
        control = comfy.cldm.cldm.ControlNet(**shape, hint_channels=3, device=torch.device("cpu"))
        randomize(control, 0)
        device = comfy.model_management.get_torch_device()
        return io.NodeOutput(comfy.controlnet.ControlNet(control, load_device=device))


class TinyClipVision(io.ComfyNode):
    """A CLIP vision model of the host's own class with few, random weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="FaRTest_ClipVision", category="FaR/test", inputs=[], outputs=[io.ClipVision.Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        shape |= {
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 16,
            "hidden_act": "gelu",
            "num_channels": 3,
            "model_type": "clip_vision_model",
        }
        path = Path(folder_paths.get_temp_directory()) / "clip_vision.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(shape))
        model = comfy.clip_vision.ClipVisionModel(path)
        randomize(model.model, 0)
        return io.NodeOutput(model)


NODES: list[type[io.ComfyNode]] = [
    Dataset,
    SaveBase,
    Predict,
    Pixels,
    LiveModels,
    SaveMask,
    ImagePromptNode,
    TinyClipVision,
    TinyControlNet,
    box_sender("BOUNDING_BOX", "FaRTest_BoundingBox"),
    box_sender("BBOX", "FaRTest_BBox"),
]
