"""What prompts become for the UNet: the text encoders' outputs, with the learned placeholder tokens among the words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .base import BaseModel
from .families import TextEncoderSpec
from .tokens import PlaceholderEmbedding, TokenizedPrompt, Vocabulary

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is told beside the noisy latents and their timesteps.

    ``context`` [B, length, width] is what it attends to. Where the family has them: ``pooled`` [B, projected width],
    one vector for the whole prompt, and ``time_ids`` [B, 6], the original size, the crop's corner and the target size
    (Podell et al. 2023, arXiv 2307.01952, section 2.2), each as height before width.
    """

    context: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def unet_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of diffusers' UNet beside latents, timesteps and context."""
        added = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        given = {name: value for name, value in added.items() if value is not None}
        return {"added_cond_kwargs": given} if given else {}

    def pipeline_kwargs(self, prefix: str = "") -> dict[str, Tensor]:
        """Keyword arguments of diffusers' pipelines, which find the ``time_ids`` by themselves.

        ``prefix``: "negative_" for what guidance leads away from.
        """
        named = {f"{prefix}prompt_embeds": self.context, f"{prefix}pooled_prompt_embeds": self.pooled}
        return {name: value for name, value in named.items() if value is not None}


class TextConditioner:
    """The text side of a base: its text encoders, its tokenizer, and the placeholder tokens' embeddings in them.

    What can't change while a base is trained is kept on the device: token ids, and the outputs for prompts without
    placeholder tokens. ``prompts`` are prepared at once, others when they are met. So a conditioner is for as long as
    the base stays where it is and in its precision; it costs nothing to make.
    """

    def __init__(self, base: BaseModel, prompts: Sequence[TokenizedPrompt] = ()) -> None:
        self.family, self.encoders, self.tokenizer = base.family, base.text_encoders, base.tokenizer
        self.table_size = base.tokenizer_size
        self._ids: dict[tuple[int, ...], list[Tensor]] = {}
        self._plain: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
        self._time_ids: dict[tuple[int, int], Tensor] = {}
        self.prepare(prompts)

    def prepare(self, prompts: Sequence[TokenizedPrompt]) -> None:
        """Put on the device what can't change of these prompts."""
        for ids in dict.fromkeys(p.ids for p in prompts):
            prepare = self._encoder_ids if self._is_learned(ids) else self._encode_plain
            prepare(ids)

    # ---- placeholder tokens

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """The frozen embedding table [rows, width] of each text encoder."""
        return tuple(_table(encoder).weight for encoder in self.encoders)

    @property
    def has_placeholders(self) -> bool:
        """Whether placeholder tokens are in the base."""
        return any(isinstance(e.get_input_embeddings(), PlaceholderEmbedding) for e in self.encoders)

    def inject(self, rows: Sequence[Tensor]) -> tuple[nn.Parameter, ...]:
        """Put the embeddings of all placeholder tokens in, ``rows`` [n, width] for each text encoder.

        Returns the parameters that they have become there, in fp32, to be trained or written to.
        """
        embeddings = [PlaceholderEmbedding(_table(e), r) for e, r in zip(self.encoders, rows, strict=True)]
        for encoder, embedding in zip(self.encoders, embeddings):
            encoder.set_input_embeddings(embedding)
        return tuple(embedding.rows for embedding in embeddings)

    def remove(self) -> None:
        """Take the placeholder tokens out again."""
        for encoder in self.encoders:
            encoder.set_input_embeddings(_table(encoder))

    # ---- prompts

    def encode(self, prompts: Sequence[TokenizedPrompt], size: tuple[int, int]) -> Conditioning:
        """Conditioning of pictures of these prompts and of ``size``, height and width in pixels, none of it cropped.

        Equal prompts are encoded once, with gradients where placeholder tokens stand.
        """
        unique = list(dict.fromkeys(p.ids for p in prompts))
        learned = [ids for ids in unique if self._is_learned(ids)]
        encoded = {ids: self._encode_plain(ids) for ids in unique if ids not in learned}
        if learned:
            encoded |= dict(zip(learned, self._encode(learned)))
        contexts, pools = zip(*(encoded[p.ids] for p in prompts))
        pooled = None if pools[0] is None else torch.stack(pools)
        return Conditioning(torch.stack(contexts), pooled, self._size_condition(size, len(prompts)))

    def without_placeholders(self, prompt: TokenizedPrompt) -> TokenizedPrompt:
        """The prompt without its placeholder tokens, as the base knows it: "a dog" for "a <corgi-dog> dog"."""
        ids = tuple(i for i in prompt.ids if i < self.table_size)
        padding = (self.tokenizer.pad_token_id,) * (len(prompt.ids) - len(ids))
        return TokenizedPrompt((*ids, *padding), ())

    def ids(self, prompts: Sequence[TokenizedPrompt]) -> tuple[Tensor, ...]:
        """Token ids [B, length] of prompts for each text encoder, on the device, for :meth:`encode_ids`."""
        return self._stacked_ids([p.ids for p in prompts])

    def encode_ids(self, ids: Sequence[Tensor], size: tuple[int, int]) -> Conditioning:
        """As :meth:`encode`, of token ids that are on the device: every row is encoded, with gradients.

        It never asks the host, so that it can be captured in a CUDA graph.
        """
        context, pooled = self._run(ids)
        return Conditioning(context, pooled, self._size_condition(size, len(context)))

    def _size_condition(self, size: tuple[int, int], count: int) -> Tensor | None:
        """``time_ids`` [count, 6] of pictures of this size, if the family has them."""
        if not self.family.size_conditions:
            return None
        if size not in self._time_ids:
            row = torch.tensor([*size, 0, 0, *size], dtype=torch.float32)
            self._time_ids[size] = row.to(self.encoders[0].device)
        return self._time_ids[size].expand(count, -1)

    def _is_learned(self, ids: tuple[int, ...]) -> bool:
        """Whether a placeholder token stands in a prompt."""
        return max(ids) >= self.table_size

    def _encoder_ids(self, ids: tuple[int, ...]) -> list[Tensor]:
        """Token ids [length] on the device for each text encoder, which share words but not what fills prompts up."""
        if ids not in self._ids:
            self._ids[ids] = []
            for spec, encoder in zip(self.family.text_encoders, self.encoders):
                pad, own = self.tokenizer.convert_tokens_to_ids(spec.pad_token), ids
                if pad != self.tokenizer.pad_token_id:
                    end = ids.index(self.tokenizer.eos_token_id) + 1
                    own = (*ids[:end], *[pad] * (len(ids) - end))
                self._ids[ids].append(torch.tensor(own, device=encoder.device))
        return self._ids[ids]

    def _stacked_ids(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
        """Token ids [B, length] of prompts for each text encoder."""
        return tuple(torch.stack(ids) for ids in zip(*(self._encoder_ids(ids) for ids in prompts)))

    @torch.no_grad()
    def _encode_plain(self, ids: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Context [length, width] and pooled output of a prompt without placeholder tokens."""
        if ids not in self._plain:
            (self._plain[ids],) = self._encode([ids])
        return self._plain[ids]

    def _encode(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[Tensor, Tensor | None]]:
        """For each prompt the context [length, width] of all text encoders side by side, and one's pooled output."""
        context, pooled = self._run(self._stacked_ids(prompts))
        return list(zip(context, repeat(None) if pooled is None else pooled))

    def _run(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Context [B, length, width] of ids [B, length] for each text encoder, and one's pooled output."""
        contexts, pooled = [], None
        for spec, encoder, own in zip(self.family.text_encoders, self.encoders, ids):
            context, projected = _run_encoder(spec, encoder, own, self.tokenizer.eos_token_id)
            contexts.append(context)
            pooled = pooled if projected is None else projected
        return torch.cat(contexts, -1) if len(contexts) > 1 else contexts[0], pooled


def plain_vocabulary(base: BaseModel) -> Vocabulary:
    """The base's own words, with no concept added."""
    return Vocabulary(base.tokenizer, (), base.tokenizer_size)


def _table(encoder: CLIPTextModel | CLIPTextModelWithProjection) -> nn.Embedding:
    embedding = encoder.get_input_embeddings()
    return embedding.table if isinstance(embedding, PlaceholderEmbedding) else embedding


def _run_encoder(
    spec: TextEncoderSpec, encoder: CLIPTextModel | CLIPTextModelWithProjection, ids: Tensor, eos: int
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [B, length, width] of ids [B, length], and the projected state [B, width] of the EOS token."""
    normed_last = spec.layer == -1 and spec.final_norm
    output = encoder(ids, output_hidden_states=not normed_last)
    states = output.last_hidden_state if normed_last else output.hidden_states[spec.layer]
    if spec.final_norm and not normed_last:
        states = getattr(encoder, "text_model", encoder).final_layer_norm(states)  # nested before transformers 5.6
    if not spec.pooled:
        return states, None
    # Encoders whose config has the old eos_token_id 2 pool at the largest id, which a placeholder token's would be.
    place = (ids == eos).int().argmax(-1)
    last = output.last_hidden_state[torch.arange(len(ids), device=ids.device), place]
    return states, encoder.text_projection(last)
