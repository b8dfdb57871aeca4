"""Load segment-anything models of any size without unpickling, with the package's own classes.

Kirillov et al., "Segment Anything" (arXiv 2304.02643). The published ViT-B, ViT-L and ViT-H load, and so do
other sizes, such as the small model that comes with this package.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..utils.errors import SubjectError
from ..utils.files import parse_json, read_tensors

# Of a spec (see build_sam): the fields without a default, and the published models' values of the others.
REQUIRED = ("embed_dim", "depth", "num_heads", "global_attn_indexes", "image_size", "window_size")
DEFAULTS = {
    "patch_size": 16,
    "prompt_dim": 256,
    "mask_channels": 16,
    "decoder_depth": 2,
    "decoder_heads": 8,
    "decoder_mlp_dim": 2048,
    "iou_depth": 3,
    "iou_dim": 256,
}


def load_sam(path: Path, device: str | torch.device = "cpu") -> Any:
    """Load segment-anything weights (.pth or .safetensors) of any encoder size onto a device, in float32 eval mode.

    The architecture is read from the tensors' shapes. The only thing they don't tell is the mask decoder's number of
    heads: 8 in the published models; a .safetensors file says otherwise in its metadata, as JSON under ``far_sam``
    (any part of :func:`build_sam`'s spec). Nothing is unpickled.
    Raises SubjectError if the file is missing or isn't a SAM.
    """
    path = Path(path)
    state, stated = _read_weights(path)
    try:
        spec = {**stated, **sam_spec(state)}
        with torch.device("meta"):  # random weights would only be thrown away
            sam = build_sam(spec)
    except SubjectError as e:
        raise SubjectError(f"{path}: {e}") from e
    expected = sam.state_dict()
    odd = [k for k in expected.keys() | state.keys() if k not in state or k not in expected]
    odd += [k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape]
    if odd:
        raise SubjectError(
            f"{path}: is a variant of segment-anything that isn't supported: {len(odd)} tensors are missing, "
            f"unknown or of another shape ({', '.join(sorted(odd)[:3])} …); use an original SAM ViT-B, -L or -H file"
        )
    # Copies, so that the file doesn't stay mapped and the arithmetic doesn't depend on its alignment.
    sam.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in state.items()}, assign=True)
    return sam.eval().requires_grad_(False).to(device)


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A weights file's tensors, and the spec in its metadata."""
    if not path.is_file():
        raise SubjectError(f"{path}: there is no such file; give a segment-anything .pth or .safetensors file")
    stated: Any = {}
    try:
        if path.suffix.lower() == ".safetensors":
            state, metadata = read_tensors(path)
            stated = parse_json(metadata.get("far_sam", "{}"))
        else:
            _check_archive(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # damaged or foreign files raise almost anything
        raise SubjectError(
            f"{path}: can't be read as weights ({type(e).__name__}: {e}); "
            "download the segment-anything file again, or convert it to .safetensors"
        ) from e
    tensors = isinstance(state, dict) and all(isinstance(v, torch.Tensor) for v in state.values())
    if not tensors or not isinstance(stated, dict):
        raise SubjectError(f"{path}: holds no plain state dict of tensors; give a segment-anything weights file")
    return state, stated


def _check_archive(path: Path) -> None:
    """Refuse anything but PyTorch's format since 1.6: other files, and archives that unpack to more than their size."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, which PyTorch's files are not")


def sam_spec(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The spec for :func:`build_sam`, without ``decoder_heads``, from a SAM state dict's shapes.

    Raises SubjectError naming the tensor that a SAM has and this one lacks.
    """

    def shape(key: str, dimensions: int) -> torch.Size:
        if key not in state or state[key].dim() != dimensions:
            sample = ", ".join(sorted(state)[:3])
            raise SubjectError(f"is not a segment-anything file: it lacks '{key}' (it has {sample or 'nothing'} …)")
        return state[key].shape

    def count(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})

    embed_dim, _, _, patch = shape("image_encoder.patch_embed.proj.weight", 4)
    grid = shape("image_encoder.pos_embed", 4)[1]
    depth = count("image_encoder.blocks.")
    # A relative position table has 2n - 1 rows for attention over n x n patches, and one column per head channel.
    tables = [shape(f"image_encoder.blocks.{i}.attn.rel_pos_h", 2) for i in range(depth)]
    spans = [(rows + 1) // 2 for rows, _ in tables]
    return {
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": embed_dim // tables[0][1] if tables and tables[0][1] else 0,
        "global_attn_indexes": [i for i, span in enumerate(spans) if span == grid],
        "window_size": min(spans, default=0),
        "image_size": grid * patch,
        "patch_size": patch,
        "mlp_dim": shape("image_encoder.blocks.0.mlp.lin1.weight", 2)[0],
        "prompt_dim": shape("image_encoder.neck.0.weight", 4)[0],
        "mask_channels": shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
        "decoder_depth": count("mask_decoder.transformer.layers."),
        "decoder_mlp_dim": shape("mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
        "iou_depth": count("mask_decoder.iou_prediction_head.layers."),
        "iou_dim": shape("mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
    }


def build_sam(spec: Mapping[str, Any]) -> Any:
    """A ``segment_anything.modeling.Sam`` with random weights.

    Required, of the image encoder: ``embed_dim``, ``depth``, ``num_heads``, ``global_attn_indexes`` (blocks that
    attend to the whole picture), ``image_size`` (pixels), ``window_size`` (patches). Optional, by default as
    published: ``patch_size`` 16, ``mlp_dim`` 4 x embed_dim, ``prompt_dim`` 256, ``mask_channels`` 16,
    ``decoder_depth`` 2, ``decoder_heads`` 8, ``decoder_mlp_dim`` 2048, ``iou_depth`` 3, ``iou_dim`` 256.
    Raises SubjectError naming the field that is missing, unknown or impossible.
    """
    missing = [name for name in REQUIRED if name not in spec]
    unknown = [str(name) for name in spec if name not in (*REQUIRED, *DEFAULTS, "mlp_dim")]
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has unknown fields: {', '.join(unknown)}"
        raise SubjectError(f"the SAM spec {wrong}")
    s = {**DEFAULTS, "mlp_dim": 4 * spec["embed_dim"], **spec}
    for name, value in s.items():
        if name != "global_attn_indexes" and not (isinstance(value, int) and value >= 1):
            raise SubjectError(f"the SAM spec's {name} must be a positive whole number, not {value!r}")
    divisions = (("embed_dim", s["num_heads"]), ("image_size", s["patch_size"]), ("prompt_dim", 2 * s["decoder_heads"]))
    for name, divisor in divisions:
        if s[name] % divisor:
            raise SubjectError(f"the SAM spec's {name} {s[name]} is not a multiple of {divisor}")
    modeling = segment_anything().modeling
    grid = s["image_size"] // s["patch_size"]
    return modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=s["image_size"],
            patch_size=s["patch_size"],
            embed_dim=s["embed_dim"],
            depth=s["depth"],
            num_heads=s["num_heads"],
            mlp_ratio=(s["mlp_dim"] + 0.5) / s["embed_dim"],  # it is multiplied back and cut to a whole number
            out_chans=s["prompt_dim"],
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=s["window_size"],
            global_attn_indexes=tuple(s["global_attn_indexes"]),
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=s["prompt_dim"],
            image_embedding_size=(grid, grid),
            input_image_size=(s["image_size"], s["image_size"]),
            mask_in_chans=s["mask_channels"],
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=s["prompt_dim"],
            transformer=modeling.TwoWayTransformer(
                depth=s["decoder_depth"],
                embedding_dim=s["prompt_dim"],
                mlp_dim=s["decoder_mlp_dim"],
                num_heads=s["decoder_heads"],
            ),
            iou_head_depth=s["iou_depth"],
            iou_head_hidden_dim=s["iou_dim"],
        ),
    ).eval()


def segment_anything() -> Any:
    """The package, imported only where it is needed: photos with their own masks do without it."""
    try:
        import segment_anything
    except ModuleNotFoundError as e:
        raise SubjectError(f"segment-anything is needed to find subjects ({e}): pip install segment-anything") from e
    except (ImportError, RuntimeError) as e:
        raise SubjectError(
            f"segment-anything can't be imported ({e}); it needs a torchvision that matches torch: install torch and "
            "torchvision together from the same place"
        ) from e
    return segment_anything
