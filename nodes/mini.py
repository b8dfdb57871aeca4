"""The embedded default: a small base and sample photos, so that everything can be tried without a download."""

from __future__ import annotations

from comfy_api.latest import io

from ..far_train.mini.shipped import SIZE, SUBJECTS, sample_photos, small_base
from ..far_train.mini.world import describe
from . import host_base
from .previews import shown, subject_sheet
from .sockets import Clip, Model, Vae, schema


class MiniCheckpoint(io.ComfyNode):
    """The small base as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FaR_MiniCheckpoint",
            display_name="FaR Mini Checkpoint",
            description="A small model of the Stable Diffusion 2.1 architecture that comes with the pack. It generates "
            f"drawings of {SIZE} px: 'a photo of a red cat with a hat and a blue robot, on the beach'. Training takes "
            "minutes, even without a GPU.",
            search_aliases=["tiny model", "demo checkpoint", "test model"],
            outputs=[
                Model.Output("model", tooltip="The UNet (v-prediction, like Stable Diffusion 2.1)."),
                Clip.Output("clip", tooltip="The text encoder."),
                Vae.Output("vae", tooltip=f"The VAE. Generate at {SIZE} × {SIZE} pixels."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*host_base.as_host_models(small_base()))


class MiniPhotos(io.ComfyNode):
    """Sample photos of one subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        who = "; ".join(f"{key}: {describe(identity)}" for key, (_, identity) in SUBJECTS.items())
        return schema(
            node_id="FaR_MiniPhotos",
            display_name="FaR Mini Photos",
            description="Sample photos for the mini checkpoint. The two subjects of each class look alike on purpose.",
            search_aliases=["sample photos", "demo images"],
            inputs=[
                io.Combo.Input("subject", options=list(SUBJECTS), tooltip=f"The subject of the photos. {who}."),
                io.Int.Input("count", default=5, min=1, max=20, tooltip="Number of photos. 4 or 5 are enough."),
            ],
            outputs=[
                io.Image.Output("images", is_output_list=True, tooltip="The photos, one by one."),
                io.String.Output("names", is_output_list=True, tooltip="The names of the photos."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, subject: str, count: int) -> io.NodeOutput:
        photos = sample_photos(subject, count)
        images, names = [p.image for p in photos], [p.name for p in photos]
        sheet = subject_sheet(images, [None] * len(images), names)
        return io.NodeOutput([i[None] for i in images], names, ui=shown(cls, sheet, describe(SUBJECTS[subject][1])))


NODES = [MiniCheckpoint, MiniPhotos]
