"""What the small base learns from: scenes as latents, token ids and content, on the device, as many as are rendered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from far_train.models.fingerprint import fingerprint
from far_train.utils.files import write_tensors

from .autoencoder import encode_means
from .content import FIELDS, content_codes
from .scene_pool import CAPTIONS, ScenePool
from .words import LENGTH


def token_table(captions: Sequence[Sequence[str]], tokenizer: Any) -> Tensor:
    """Ids of all captions, padded as prompts are: int16 [scenes, captions, 77]."""
    texts = [text for options in captions for text in options]
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
    return torch.tensor(ids, dtype=torch.int16).unflatten(0, (len(captions), -1))


class EncodedScenes:
    """The scenes of a pool as the base's training reads them; room for all is made at once.

    ``latents`` fp16 [N, 4, c, c], of unit spread; ``ids`` int16 [N, captions, 77]; ``content`` int8 [N, fields, c, c];
    ``ready``: how many there are, a scalar on the device that a captured step reads anew each time. All take 5 kB a
    scene of 128 px. ``digest`` names the autoencoder; on a CPU, which encodes slowly, its latents are kept in
    ``folder`` for a training that resumes.
    """

    def __init__(self, pool: ScenePool, vae: nn.Module, digest: str, tokenizer: Any, folder: Path):
        self.pool, self.vae, self.digest, self.tokenizer, self.folder = pool, vae, digest, tokenizer, folder
        self.taken = 0
        device, cells = next(vae.parameters()).device, vae.config.sample_size // 8
        rooms = pool.config.chunks * pool.config.chunk
        self.latents = torch.zeros(rooms, vae.config.latent_channels, cells, cells, dtype=torch.float16, device=device)
        self.ids = torch.zeros(rooms, CAPTIONS, LENGTH, dtype=torch.int16, device=device)
        self.content = torch.zeros(rooms, len(FIELDS), cells, cells, dtype=torch.int8, device=device)
        self.ready = torch.zeros((), dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return min(self.taken * self.pool.config.chunk, self.pool.config.count)

    def take_in(self) -> bool:
        """Encode the next chunk of the pool. False if all are encoded, or it isn't rendered yet."""
        if self.taken == len(self.pool.chunks) and not self.pool.grow():
            return False
        scenes, device = self.pool.chunks[self.taken], self.latents.device
        rows = slice(self.taken * self.pool.config.chunk, (self.taken + 1) * self.pool.config.chunk)
        # First what keeps the CPU busy: the device may still be at work on earlier steps.
        self.ids[rows] = token_table(self.pool.captions(self.taken), self.tokenizer).to(device)
        self.latents[rows] = self._encode(scenes["images"]).to(device) * self.vae.config.scaling_factor
        answers = {name: scenes[name].to(device) for name in ("labels", "subjects", "places")}
        self.content[rows] = content_codes(answers, self.content.shape[-1])
        self.taken += 1
        self.ready.fill_(len(self))
        return True

    def _encode(self, images: Tensor) -> Tensor:
        """:func:`encode_means` of the next chunk, or what was kept of it from the same autoencoder."""
        if self.latents.device.type != "cpu":
            return encode_means(self.vae, images)
        path = self.folder / f"latents-{self.taken:05d}.safetensors"
        about = {"far_latents": f"{self.digest} {fingerprint({'images': images})}"}
        try:
            with safe_open(path, "pt") as file:
                if file.metadata() == about:
                    return file.get_tensor("latents")
        except (OSError, SafetensorError):
            pass  # there is none yet
        latents = encode_means(self.vae, images)
        write_tensors(path, {"latents": latents}, about)
        return latents
