"""FaR weights in the graph: save, load, apply."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..far_train.models import export
from ..far_train.models.fingerprint import kv_digest
from ..far_train.models.weights import FarWeights, describe
from ..far_train.utils.errors import ConfigError, WeightsError
from ..far_train.utils.files import parse_json
from . import host_folders, host_memory, host_models, host_tokens, host_ui, sockets
from .host_attention import applied_tokens
from .known_files import files_generation, remember_files
from .naming import file_name, place
from .previews import refusal_shown
from .prompt_graph import notes_of, remember_tokens, unpatched_prompts

_STRENGTH_LINE = re.compile(r"(<[^<>\s]+>|[^\s=:<>]+)\s*[=:]\s*(\S+)")


class SaveWeights(io.ComfyNode):
    """FAR_WEIGHTS → models/far, and if wanted to what stock loaders read."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            node_id="FaR_SaveWeights",
            display_name="FaR Save Weights",
            description=(
                "Save FaR weights to models/far, and optionally as a LoRA (models/loras) and embeddings "
                "(models/embeddings) for stock nodes. Nothing is overwritten: a number is added to a name in use."
            ),
            search_aliases=["lora", "export lora", "export embedding"],
            inputs=[
                sockets.FarWeightsSocket.Input("weights", tooltip="From FaR Train or FaR Load Weights."),
                io.String.Input("name", default="my-concepts", tooltip="File name without folder and extension."),
                io.Boolean.Input(
                    "export_lora",
                    default=False,
                    tooltip="Also save a LoRA for the stock LoRA loader. Use it together with the embeddings.",
                ),
                io.Boolean.Input(
                    "export_embeddings",
                    default=False,
                    tooltip="Also save one embedding per concept. In prompts: embedding:corgi-dog, or as the node then "
                    "says: a number is added to a name in use.",
                ),
                io.Int.Input(
                    "lora_rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Rank of the exported LoRA. A lower rank gives a smaller file, but only an approximation. "
                    "0: exact.",
                    extra_dict={"advanced": True},
                ),
            ],
            outputs=[io.String.Output(display_name="files", tooltip="The saved files, one per line.")],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        return files_generation(cls.hidden.unique_id)

    @classmethod
    def execute(
        cls, weights: FarWeights, name: str, export_lora: bool, export_embeddings: bool, lora_rank: int = 0
    ) -> io.NodeOutput:
        sockets.check_sockets(weights=(weights, FarWeights, "FAR_WEIGHTS"))
        stem = file_name(name.removesuffix(".safetensors"), "weights")
        files, hints = [], []
        # Exports are made aside and then placed, so that none of them lands on a file of the same name.
        with host_memory.no_inference_mode(), TemporaryDirectory(prefix="far-") as made:
            whole = Path(made) / "weights.safetensors"
            weights.save(whole)
            files.append(place(whole, host_folders.model_folder("far"), stem))
            if export_lora:
                lora = Path(made) / "lora.safetensors"
                export.export_lora(weights, lora, lora_rank or None)
                files.append(place(lora, host_folders.model_folder("loras"), stem))
            if export_embeddings:
                for path in export.export_embeddings(weights, Path(made) / "embeddings"):
                    files.append(place(path, host_folders.model_folder("embeddings"), path.stem))
                    hints.append(embedding_hint(path.stem, files[-1].stem))
        remember_files(cls.hidden.unique_id, files)
        text = "\n".join(map(str, files))
        host_ui.log_and_show("\n".join([*hints, "saved:", text]), cls.hidden.unique_id)
        return io.NodeOutput(text, ui={"text": (text,)})


def embedding_hint(wanted: str, given: str) -> str:
    """How to write an exported embedding in prompts: its file has another name if another training's has that one."""
    hint = f"write embedding:{given}"
    return hint if given == wanted else f"{hint} (embedding:{wanted} is of another training)"


class LoadWeights(io.ComfyNode):
    """models/far → FAR_WEIGHTS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            node_id="FaR_LoadWeights",
            display_name="FaR Load Weights",
            description="Load FaR weights from models/far, saved by FaR Save Weights or the command line.",
            search_aliases=["lora", "load lora"],
            inputs=[io.Combo.Input("file", options=host_folders.model_files("far"), tooltip="A file in models/far.")],
            outputs=[
                sockets.FarWeightsSocket.Output(display_name="weights", tooltip="For FaR Apply Weights."),
                io.String.Output(display_name="about", tooltip="Concepts, base model and training settings, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @refusal_shown
    def validate_inputs(cls, file: str | None) -> bool | str:
        if file is None or file in host_folders.model_files("far"):  # None: linked, known only when it runs
            return True
        return f"file: models/far holds no file '{file}'; train with FaR Train and FaR Save Weights, or copy it there"

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> str | float:
        if file is None:
            return sockets.unknown_choice()
        about = host_folders.model_path("far", file).stat()
        return f"{file} {about.st_size} {about.st_mtime_ns}"

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        sockets.check_choice(cls.validate_inputs(file or ""))
        with host_memory.no_inference_mode():
            weights = sockets.CarriedWeights.load(host_folders.model_path("far", file))
        nouns = weights.provenance.nouns
        host_ui.log_and_show(", ".join(f"{token} {nouns[token]}" for token in weights.embeddings), cls.hidden.unique_id)
        return io.NodeOutput(weights, json.dumps(describe(weights), indent=2))


class ApplyWeights(io.ComfyNode):
    """MODEL and CLIP that know the concepts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            node_id="FaR_ApplyWeights",
            display_name="FaR Apply Weights",
            description=(
                "Apply FaR weights to MODEL and CLIP. Then use the placeholder tokens in any prompt: <corgi-dog> dog. "
                "Several of these nodes can be chained."
            ),
            search_aliases=["fuse and refine", "lora", "lora loader"],
            inputs=[
                *sockets.base_inputs(
                    model="The base model that the weights were trained on.",
                    clip="The CLIP of the same checkpoint.",
                    vae=None,
                ),
                sockets.FarWeightsSocket.Input("weights", tooltip="From FaR Train or FaR Load Weights."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Strength of the LoRA, which all concepts share. 0: MODEL is not changed.",
                ),
                io.String.Input(
                    "concept_strength",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Strength of single placeholder tokens, one per line or as JSON: <corgi-dog>=0.8. "
                    "1: as trained (the default), 0: the class noun only.",
                ),
            ],
            outputs=[
                sockets.Model.Output(tooltip="For the sampler."),
                sockets.Clip.Output(tooltip="For prompts with placeholder tokens."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, clip: Any, weights: FarWeights, strength: float, concept_strength: str = ""
    ) -> io.NodeOutput:
        sockets.check_sockets(weights=(weights, FarWeights, "FAR_WEIGHTS"))
        if not -4 <= strength <= 4:  # the host lets NaN pass
            raise ConfigError(f"strength: {strength} is out of range; it must be between -4 and 4")
        strengths = parse_strengths(concept_strength, weights)
        remember_tokens(weights.embeddings)
        graph = cls.hidden.prompt or {}
        unpatched = unpatched_prompts(graph, list(weights.embeddings))
        for node_id, note in notes_of(unpatched, graph, host_ui.running_client()).items():
            host_ui.log_and_show(note, node_id)
        with host_memory.no_inference_mode(), torch.no_grad():
            notes = [*check_fits(weights, model, clip), *check_again(weights, applied_tokens(clip))]
            host_ui.log_and_show("\n".join([*notes, f"applied: {', '.join(weights.embeddings)}"]), cls.hidden.unique_id)
            rows = {t: _at_strength(clip, weights, t, strengths.get(t, 1.0)) for t in weights.embeddings}
            return io.NodeOutput(
                host_models.patch_model(model, weights, strength), host_tokens.apply_tokens(clip, rows)
            )


def check_fits(weights: FarWeights, model: Any, clip: Any) -> list[str]:
    """Refuse a base of another family or prediction type; what to say of another one of the same kind.

    Raises BaseModelError, WeightsError. Shapes are checked where the weights are put in.
    """
    about = weights.provenance
    weights.check_family(host_models.check_family(model, clip))
    prediction_type = host_models.prediction_type(model)
    if about.prediction_type != prediction_type:
        raise WeightsError(
            f"weights: trained on a base with {about.prediction_type}, MODEL has {prediction_type}; use the base that "
            "they were trained on"
        )
    # MODEL without the graph's patches counts as well: other FaR weights or a LoRA may have been applied before.
    digests = (kv_digest(host_models.kv_weights(model, patched=patched)) for patched in (True, False))
    if about.base_digest in digests:
        return []
    return ["These FaR weights were trained on another base of the same shape than MODEL; likeness may suffer."]


def check_again(weights: FarWeights, before: Collection[str]) -> list[str]:
    """What to say of tokens that another FaR Apply Weights has put into CLIP ``before``."""
    again = [token for token in weights.embeddings if token in before]
    if not again:
        return []
    return [
        f"{', '.join(again)}: applied before by another FaR Apply Weights. The later embedding counts, but MODEL has "
        "the LoRAs of both; remove one of the two nodes."
    ]


def parse_strengths(text: str, weights: FarWeights) -> dict[str, float]:
    """Strengths by token from lines ``<corgi-dog>=0.8`` or a JSON object. Raises ConfigError."""
    text = text.strip()
    try:
        if text.startswith("{"):
            entries = list(parse_json(text).items())
        else:
            lines = [line.strip() for line in re.split(r"[\n,;]", text) if line.strip()]
            entries = [_STRENGTH_LINE.fullmatch(line).groups() for line in lines]
        strengths = {f"<{token.strip('<> ').lower()}>": float(value) for token, value in entries}
    except (ValueError, TypeError, AttributeError, OverflowError) as e:
        raise ConfigError(
            f"concept_strength: {text[:60]!r} can't be read; write one token a line: <corgi-dog>=0.8"
        ) from e
    for token, value in strengths.items():
        if token not in weights.embeddings:
            raise ConfigError(f"concept_strength: there is no {token}; known: {', '.join(weights.embeddings)}")
        if not -4 <= value <= 4:
            raise ConfigError(f"concept_strength: {value} for {token} is out of range; it must be between -4 and 4")
    return strengths


def _at_strength(clip: Any, weights: FarWeights, token: str, strength: float) -> dict[str, Tensor]:
    """A concept's embeddings [n, width] by text encoder, between its bare noun's (0) and the learned ones (1)."""
    learned = {encoder: rows.float() for encoder, rows in weights.embeddings[token].items()}
    if strength == 1:
        return learned
    nouns = host_tokens.noun_embeddings(clip, weights.provenance.nouns[token])
    if any(nouns[encoder].shape[-1] != rows.shape[-1] for encoder, rows in learned.items()):
        return learned  # refused with the right words where it is put in
    return {e: torch.lerp(nouns[e].expand_as(rows), rows, strength) for e, rows in learned.items()}


NODES: list[type[io.ComfyNode]] = [SaveWeights, LoadWeights, ApplyWeights]
