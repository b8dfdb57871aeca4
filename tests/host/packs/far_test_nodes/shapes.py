"""Test-only nodes about shapes: those of full-size models, and those of models that the pack can't take."""

from __future__ import annotations

import comfy.model_base
import comfy.model_detection
import comfy.model_patcher
import torch
from comfy_api.latest import io

from .probes import far
from .tiny import TinySD20, unet_config


class ForeignModel(io.ComfyNode):
    """A MODEL whose text context is as wide as another family's: 768 for Stable Diffusion 1.x, 2048 for SDXL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaRTest_ForeignModel",
            category="FaR/test",
            inputs=[io.Int.Input("context_width", default=768, min=64, max=4096)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, context_width: int) -> io.NodeOutput:
        config = TinySD20(unet_config(1) | {"context_dim": context_width})
        config.set_inference_dtype(torch.float32, None)
        model = comfy.model_base.BaseModel(config, device="cpu")
        return io.NodeOutput(comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")))


class Instances(io.ComfyNode):
    """Two squares in each picture, the smaller one surer, in the form of an instance segmenter (SAM3_Detect)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        outputs = [io.Mask.Output(), io.Custom("BOUNDING_BOX").Output()]
        return io.Schema(
            node_id="FaRTest_Instances", category="FaR/test", inputs=[io.Image.Input("image")], outputs=outputs
        )

    @classmethod
    def execute(cls, image: torch.Tensor) -> io.NodeOutput:
        squares = ((0.9, 40, 20, 30), (0.6, 75, 10, 60))  # score, x, y, side in pixels
        masks = torch.zeros(len(image), len(squares), *image.shape[1:3])
        for i, (_, x, y, side) in enumerate(squares):
            masks[:, i, y : y + side, x : x + side] = 1
        boxes = [{"x": x, "y": y, "width": side, "height": side, "score": score} for score, x, y, side in squares]
        return io.NodeOutput(masks.flatten(0, 1), [boxes] * len(image))


class FullSize(io.ComfyNode):
    """What the pack makes of a family's own shapes, as the host detects them; without any weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        kinds = [io.Combo.Input("prediction", options=["v_prediction", "epsilon"]), io.String.Input("family")]
        return io.Schema(node_id="FaRTest_FullSize", category="FaR/test", inputs=kinds, is_output_node=True)

    @classmethod
    def execute(cls, prediction: str, family: str) -> io.NodeOutput:
        loading, keys, layout = far("far_train.models.loading"), far("far_train.models.keys"), far("nodes.layout")
        about = far("far_train.models.families").FAMILIES[family]
        expected = loading.packaged_configs(about, prediction)
        parts = {part: module.state_dict() for part, module in loading.build_parts(about, expected).items()}
        file = keys.diffusers_to_ldm(parts, expected, about)
        config = comfy.model_detection.model_config_from_unet(file, "model.diffusion_model.")
        vae = {k.removeprefix(keys.VAE_PREFIX): v for k, v in file.items() if k.startswith(keys.VAE_PREFIX)}
        encoders = [
            layout.TextEncoder(
                keys.strip_text_model(parts[spec.part]),
                expected[spec.part]["num_attention_heads"],
                expected[spec.part]["hidden_act"],
                expected[spec.part]["num_hidden_layers"],
            )
            for spec in about.text_encoders
        ]
        found = layout.component_configs(
            about,
            config.unet_config,
            encoders,
            vae,
            prediction_type=prediction,
            scaling_factor=config.latent_format.scale_factor,
        )
        wrong = [
            f"{part}.{k}: {found[part][k]} is not {v}"
            for part in parts
            for k, v in expected[part].items()
            if found[part][k] != v
        ]
        return io.NodeOutput(ui={"text": ("\n".join([type(config).__name__, *wrong]),)})


NODES: list[type[io.ComfyNode]] = [ForeignModel, Instances, FullSize]
