"""The reference: a training step of Custom Diffusion as in diffusers' public script.

Kumari et al. 2023 (arXiv 2212.04488), rebuilt from diffusers' own attention processor, scheduler and modules. Each step
does what the script does: encode the pictures with the VAE and the prompts with the text encoder, apply AdamW to the
whole embedding table (its other rows get no gradient), and read the loss. Two differences make it faster than the
script: photos are neither loaded nor augmented, and the optimizer is multi-tensor on a CPU, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from diffusers import DDPMScheduler
from diffusers.loaders import AttnProcsLayers
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from torch import nn
from torch.nn import functional as F

from far_train.data.captions import Name
from far_train.data.concepts import Composite
from far_train.models.base import BaseModel
from far_train.models.tokens import Vocabulary

LEARNING_RATE = 1e-5


class CustomDiffusion:
    """A Custom Diffusion training on one fixed batch; :meth:`remove` restores the base.

    The last ``priors`` of the ``pictures`` are class pictures, as many as there are others, or none.
    """

    def __init__(self, base: BaseModel, names: Sequence[Name], pictures: Sequence[Composite], priors: int):
        self.base, self.priors = base, priors
        unet, (encoder,) = base.unet, base.text_encoders
        self.dtype = unet.conv_in.weight.dtype
        with torch.device("meta"):
            self.vae = type(base.vae).from_config(base.vae.config)
        self.vae.load_state_dict({k: v.to(self.dtype) for k, v in base.vae.state_dict().items()}, assign=True)
        self.vae.requires_grad_(False).eval()
        self.scheduler = DDPMScheduler.from_config(base.scheduler)
        self.pixels = torch.stack([p.image.permute(2, 0, 1) * 2 - 1 for p in pictures])
        vocabulary = Vocabulary(base.tokenizer, names, base.tokenizer_size)
        self.ids = torch.tensor([vocabulary.tokenize(p.caption).ids for p in pictures])

        self.encoder, self._table = encoder, encoder.get_input_embeddings()
        self._processors = dict(unet.attn_processors)
        weight = torch.cat([self._table.weight, self._table.weight[: len(names)]]).detach()
        self.table = nn.Embedding(*weight.shape, _weight=weight)
        encoder.set_input_embeddings(self.table)
        self.is_frozen = torch.arange(len(weight)) < base.tokenizer_size
        unet.set_attn_processor({name: self._processor(name) for name in self._processors})
        self.layers = AttnProcsLayers(unet.attn_processors)
        self.parameters = [*self.table.parameters(), *self.layers.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=1e-2, foreach=True)

    def _processor(self, name: str) -> CustomDiffusionAttnProcessor2_0:
        """The processor of one attention layer: cross-attention gets fp32 copies of K and V that learn."""
        layer = self.base.unet.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn1.processor"):
            return CustomDiffusionAttnProcessor2_0(train_kv=False, train_q_out=False, hidden_size=layer.query_dim)
        processor = CustomDiffusionAttnProcessor2_0(
            train_kv=True,
            train_q_out=False,
            hidden_size=layer.query_dim,
            cross_attention_dim=self.base.unet.config.cross_attention_dim,
        )
        for part in ("to_k", "to_v"):
            learned = getattr(layer, part).weight.detach().clone().float()
            getattr(processor, f"{part}_custom_diffusion").weight = nn.Parameter(learned)
        return processor

    def take_step(self) -> None:
        """One optimizer step."""
        device = self.base.device
        latents = self.vae.encode(self.pixels.to(device, self.dtype)).latent_dist.sample()
        latents = latents * self.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(latents),), device=device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(device.type, self.dtype) if self.dtype != torch.float32 else nullcontext():
            context = self.encoder(self.ids.to(device)).last_hidden_state.float()
        prediction = self.base.unet(noisy, timesteps, context).sample
        target = noise
        if self.base.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        own = len(latents) - self.priors
        loss = F.mse_loss(prediction[:own].float(), target[:own].float())
        if self.priors:
            loss = loss + F.mse_loss(prediction[own:].float(), target[own:].float())
        loss.backward()
        self.table.weight.grad[self.is_frozen] = 0
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()

    def remove(self) -> None:
        """Restore the base."""
        self.encoder.set_input_embeddings(self._table)
        self.base.unet.set_attn_processor(self._processors)
