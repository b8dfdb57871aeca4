"""Cross-attention maps from the host's own MODEL: which cells look at which words while it denoises.

One more pass of the UNet, on a clone that never leaves this file: nothing that samples later can notice it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..far_train.models.attention_maps import among, attention_columns, supervised_side
from ..far_train.models.families import Family
from ..far_train.models.keys import unet_to_ldm
from ..far_train.utils.errors import CaptionError
from .host_models import check_family
from .host_tokens import first_tokenizer
from .layout import unet_config

_LAYER = re.compile(r"(input|middle|output)_blocks?\.(?:(\d+)\.)?\d+\.transformer_blocks\.(\d+)\.attn2")
Replacement = Callable[[Tensor, Tensor, Tensor, Mapping[str, Any]], Tensor]


def applied_tokens(clip: Any) -> tuple[str, ...]:
    """The placeholder tokens that FaR Apply Weights has put into CLIP. Raises BaseModelError."""
    return tuple(getattr(first_tokenizer(clip)[1], "far_tokens", ()))


def sigmas_at(model: Any, shares: Sequence[float]) -> Tensor:
    """Noise levels at these shares of the way from pure noise (0) to the picture (1), as MODEL's samplers go it."""
    sampling = model.get_model_object("model_sampling")
    levels = torch.tensor([float(sampling.percent_to_sigma(share)) for share in shares])
    return levels.clamp(float(sampling.sigma_min), float(sampling.sigma_max))  # the host has ∞ and 0 at the ends


def attention_maps(
    model: Any,
    clip: Any,
    text: str,
    latents: Tensor,
    phrases: Sequence[str],
    sigmas: Tensor,
    *,
    cells: int = 16,
    noise_seed: int = 0,
    on_pass: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Attention of each phrase of ``text`` over pictures, [pictures, phrases, h, w] in fp32 on the CPU.

    ``latents`` [pictures, 4, H, W], as LATENT has them, are noised to each of ``sigmas`` (picture i with the seed
    ``noise_seed`` + i), and the maps of these passes are averaged. They come from the layers that
    :func:`far_train.models.attention_maps.supervised_layers` chooses. Raises CaptionError for a phrase that isn't in
    the text, BaseModelError for another family.
    """
    family = check_family(model, clip)
    select = _token_rows(clip, text, phrases)
    watched = model.clone()
    recorder = _Recorder(select)
    recorder.watch(watched, family)
    generators = [torch.Generator().manual_seed(noise_seed + i) for i in range(len(latents))]
    noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
    guider = comfy.samplers.CFGGuider(watched)
    guider.set_conds(clip.encode_from_tokens_scheduled(clip.tokenize(text)), [])
    maps = []

    def take(done: int) -> None:
        maps.append(recorder.take(cells))
        on_pass(done)

    guider.sample(noise, latents, _Passes(take), sigmas, disable_pbar=True, seed=noise_seed)
    return torch.stack(maps).mean(0)


class _Passes(comfy.samplers.Sampler):
    """A sampler that takes no step: the conditional pass at each noise level, as a sampler would make it there."""

    def __init__(self, on_pass: Callable[[int], None]):
        self.on_pass = on_pass

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        model, options = model_wrap.inner_model, extra_args["model_options"]
        for i, sigma in enumerate(sigmas):
            noisy = model.model_sampling.noise_scaling(sigma, noise, latent_image)
            level = sigma * noisy.new_ones(len(noisy))
            # Not the guider's own prediction: guidance patches may run further passes, which would be recorded, too.
            comfy.samplers.calc_cond_batch(model, [model_wrap.conds["positive"]], noisy, level, options)
            self.on_pass(i + 1)
        return latent_image


class _Recorder:
    """Keeps the maps of one pass; ``select`` [phrases, tokens] weighs the tokens of each phrase."""

    def __init__(self, select: Tensor):
        self.select = select
        self.maps: dict[str, Tensor] = {}

    def watch(self, model: Any, family: Family) -> None:
        """Look into the text cross-attentions of a clone that may be supervised, through what other packs put there.

        A replacement and not ``optimized_attention_override``: packs that replace cross-attention, as IPAdapter does,
        call the attention function without the options in which an override stands.
        """
        placed = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        config = unet_config(family, model.model.model_config.unet_config)
        modules = [unet_to_ldm(module, config) for module in family.supervised_modules]
        names = (name for name, _ in model.model.diffusion_model.named_modules())
        layers = {layer[0]: layer for layer in map(_LAYER.fullmatch, names) if layer}
        for name in among(layers, modules):
            block, number, index = layers[name][1], int(layers[name][2] or 0), int(layers[name][3])
            before = placed.get((block, number, index), placed.get((block, number)))
            model.set_model_attn2_replace(self._watched(name, before), block, number, index)

    def _watched(self, name: str, before: Replacement | None) -> Replacement:
        def attend(query: Tensor, key: Tensor, value: Tensor, extra: Mapping[str, Any]) -> Tensor:
            self._record(name, query, key, extra)
            if before is not None:
                return before(query, key, value, extra)
            return optimized_attention(
                query, key, value, extra["n_heads"], attn_precision=extra["attn_precision"], transformer_options=extra
            )

        return attend

    def _record(self, name: str, query: Tensor, key: Tensor, extra: Mapping[str, Any]) -> None:
        parts = extra["cond_or_uncond"]
        place = parts.index(0)  # by value: which part of the batch is the conditional one is the host's choice
        query, key = (
            x.chunk(len(parts))[place].unflatten(-1, (extra["n_heads"], -1)).transpose(1, 2) for x in (query, key)
        )
        select = self.select.new_zeros(len(self.select), key.shape[2])
        select[:, : self.select.shape[1]] = self.select  # other packs may have appended tokens of their own
        columns = attention_columns(query, key, query.shape[-1] ** -0.5, select[None].to(query.device))
        self.maps[name] = columns.unflatten(-1, tuple(extra["activations_shape"][-2:])).cpu()

    def take(self, cells: int) -> Tensor:
        """Maps [pictures, phrases, h, w] of the pass just made, averaged over the supervised layers."""
        side = supervised_side((min(m.shape[-2:]) for m in self.maps.values()), cells)
        chosen = [m for m in self.maps.values() if min(m.shape[-2:]) == side]
        self.maps = {}
        return torch.stack(chosen).mean(0)


def _token_rows(clip: Any, text: str, phrases: Sequence[str]) -> Tensor:
    """Rows [phrases, tokens] that average over the tokens of each phrase in the text, wherever it stands."""
    batches = _tokens(clip, text)
    rows = torch.zeros(len(phrases), sum(map(len, batches)))
    for row, phrase in zip(rows, phrases):
        wanted = _words(clip, phrase)
        places, start = [], 0
        for batch in batches:
            places += [(start + i, _is_placeholder(batch[i - 1])) for i in _occurrences(batch, wanted)]
            start += len(batch)
        if not places:
            raise CaptionError(f"concepts: {phrase!r} isn't in the text {text!r}; write it as it stands there")
        # In "a <rex-dog> dog and a dog" the first dog belongs to its token, so "dog" means the other one.
        free = [place for place, owned in places if not owned] or [place for place, _ in places]
        positions = [place + k for place in free for k in range(len(wanted))]
        row[positions] = 1 / len(positions)
    return rows


def _tokens(clip: Any, text: str) -> list[list[Any]]:
    """A text's tokens, ids or embedding vectors, in the batches of 77 in which they reach the first encoder."""
    key, _ = first_tokenizer(clip)
    return [[entry[0] for entry in batch] for batch in clip.tokenize(text)[key]]


def _words(clip: Any, phrase: str) -> list[Any]:
    """A phrase's own tokens, without those that begin, end and fill a prompt."""
    tokens, end = _tokens(clip, phrase)[0][1:], first_tokenizer(clip)[1].end_token
    return tokens[: next(i for i, token in enumerate(tokens) if not _is_placeholder(token) and token == end)]


def _occurrences(tokens: Sequence[Any], wanted: Sequence[Any]) -> list[int]:
    if not wanted:
        return []
    spans = range(len(tokens) - len(wanted) + 1)
    return [i for i in spans if all(map(_same, tokens[i : i + len(wanted)], wanted))]


def _is_placeholder(token: Any) -> bool:
    return isinstance(token, Tensor)


def _same(a: Any, b: Any) -> bool:
    if _is_placeholder(a) or _is_placeholder(b):
        return _is_placeholder(a) and _is_placeholder(b) and torch.equal(a, b)
    return a == b
