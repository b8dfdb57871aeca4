"""Bases in reduced precision: weights in fp8 with a scale beside them are multiplied out; other forms are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..utils.errors import BaseModelError
from ..utils.files import parse_json

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
SCALES = (".scale_weight", ".weight_scale")  # ComfyUI's names, the older one first
UNNEEDED = (".scale_input", ".input_scale")  # of activations, for hardware that multiplies in fp8
MARKER = "scaled_fp8"  # says that a part of the file is scaled; the scales say it as well
FORMAT = ".comfy_quant"  # JSON in bytes
# Last parts of names by which other quantisers keep what their numbers have to be multiplied with.
OTHER_SCALES = re.compile(r"(?!logit_scale$|scale_factor$).*(scale|zero_point|absmax|quant_map|quant_state|qzeros).*")
FIX = "give the model in fp16, bf16 or fp32"


def unscale(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of a file with every scaled weight multiplied by its scale, [] or one for each row, in fp32.

    Files without scales come back as they are. Raises BaseModelError naming the file and the tensor for scales that
    belong to no weight, have another shape, or are of another kind of quantisation.
    """
    plain = {}
    scales = {}
    for name, tensor in state.items():
        if name.endswith(SCALES):
            scales[name] = tensor
        elif name.endswith(FORMAT):
            _check_format(name, tensor, where)
        elif name.rpartition(".")[2] == MARKER or name.endswith(UNNEEDED):
            continue
        elif OTHER_SCALES.fullmatch(name.rpartition(".")[2]):
            raise BaseModelError(f"base: {where} is quantised in a form that FaR doesn't read ({name}); {FIX}")
        else:
            plain[name] = tensor
    for name, scale in scales.items():
        module = next(name.removesuffix(end) for end in SCALES if name.endswith(end))
        key = next((k for k in (f"{module}.weight", module) if k in plain), None)
        if key is None:
            raise BaseModelError(f"base: {where}: {name} is the scale of a weight that isn't there; {FIX}")
        weight = plain[key]
        if scale.numel() != 1 and (scale.numel() != scale.shape[0] or scale.shape[0] != weight.shape[0]):
            raise BaseModelError(
                f"base: {where}: {name} is {list(scale.shape)} for a weight of {list(weight.shape)}, in blocks that "
                f"FaR doesn't read; {FIX}"
            )
        if weight.is_floating_point():  # whole numbers are refused where all weights are checked
            plain[key] = weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))
    return plain


def check_floats(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are whole numbers: without their quantiser's own rules they mean nothing.

    Raises BaseModelError.
    """
    for name, value in state.items():
        if not value.is_floating_point() and not name.endswith("position_ids"):
            kind = str(value.dtype).removeprefix("torch.")
            raise BaseModelError(f"base: {where}: {name} holds whole numbers ({kind}), so it is quantised; {FIX}")


def _check_format(name: str, tensor: Tensor, where: str) -> None:
    try:
        kind = parse_json(bytes(tensor.tolist()).decode("utf-8"))["format"]
    except (ValueError, KeyError, TypeError):
        kind = "an unknown form"
    if kind not in FLOAT8:
        raise BaseModelError(f"base: {where} is quantised as {kind} ({name}), which FaR doesn't read; {FIX}")
