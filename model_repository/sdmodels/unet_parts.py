"""diffusers' UNet walked block by block, for what its own `forward` does not give: the features between its blocks, its
outermost blocks alone, and rows that share what they have in common.

Rows of one picture under several conditions, as guidance has them, have the same latents and timestep. Until the first
cross-attention nothing but these counts, so that it is computed once for all of them: at full resolution, where a
self-attention costs most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

Skips = tuple[torch.Tensor, ...]


class _Walk(torch.nn.Module):
    """A way through the blocks of a UNet."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet


class WholeUNet(_Walk):
    """The whole network, which also returns the features that `OutermostBlocks` takes."""

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        text_states: torch.Tensor,
        picture: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction [B, 4, h, w] and features [B, F, h, w] for text states [B, T, D].

        Latents [P, U, h, w], timesteps [P] and labels [P] are those of P pictures, of which `picture` [B] says which
        each row is of; without it every row has its own.
        """
        unet = self.unet
        sample, embedding, skips = _first_block(unet, latents, timesteps, text_states, picture, class_labels)
        for downsampler in unet.down_blocks[0].downsamplers or ():
            sample = downsampler(sample)
            skips += (sample,)
        for block in unet.down_blocks[1:]:
            sample, made = block(sample, embedding, **_attending(block, text_states))
            skips += made
        sample = unet.mid_block(sample, embedding, **_attending(unet.mid_block, text_states))
        for block in unet.up_blocks:
            # What the last block starts from.
            features = sample
            count = len(block.resnets)
            skips, taken = skips[:-count], skips[-count:]
            sample = block(sample, temb=embedding, res_hidden_states_tuple=taken, **_attending(block, text_states))
        return _last_layers(unet, sample), features


class OutermostBlocks(_Walk):
    """The first and the last block, with the features of another step in the place of what comes up from below."""

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        text_states: torch.Tensor,
        features: torch.Tensor,
        picture: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Prediction [B, 4, h, w] for features [B, F, h, w]; the rest as `WholeUNet` takes it."""
        unet, block = self.unet, self.unet.up_blocks[-1]
        # Nobody needs what the first block makes for the blocks below.
        _, embedding, skips = _first_block(unet, latents, timesteps, text_states, picture, class_labels)
        sample = block(features, temb=embedding, res_hidden_states_tuple=skips, **_attending(block, text_states))
        return _last_layers(unet, sample)


def _first_block(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    text_states: torch.Tensor,
    picture: torch.Tensor | None,
    class_labels: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, Skips]:
    """What the first block makes before it makes it smaller, the embedding of each row's step, and the skips."""

    def by_row(of_pictures: torch.Tensor) -> torch.Tensor:
        return of_pictures if picture is None else of_pictures.index_select(0, picture)

    block = unet.down_blocks[0]
    embedding = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps))
    if class_labels is not None:
        embedding = embedding + unet.get_class_embed(sample=latents, class_labels=class_labels)
    sample = unet.conv_in(latents)
    first, skips = sample, []
    attentions = block.attentions if _attends(block) else [None] * len(block.resnets)
    shared = True
    for resnet, attention in zip(block.resnets, attentions, strict=True):
        sample = resnet(sample, embedding)
        if attention is None:
            pass
        elif shared:
            sample = _widened(attention, sample, text_states, by_row)
            embedding, shared = by_row(embedding), False
        else:
            sample = attention(sample, encoder_hidden_states=text_states, return_dict=False)[0]
        skips.append(sample)
    if shared:
        skips, embedding = [by_row(skip) for skip in skips], by_row(embedding)
    return skips[-1], embedding, (by_row(first), *skips)


def _widened(
    transformer: Any,
    sample: torch.Tensor,
    text_states: torch.Tensor,
    by_row: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """A transformer on pictures [P, C, h, w], which from its first cross-attention on are rows [B, C, h, w]."""
    height, width = sample.shape[-2:]
    block, *others = transformer.transformer_blocks
    linear = transformer.use_linear_projection
    x = transformer.norm(sample)
    if not linear:
        x = transformer.proj_in(x)
    x = x.permute(0, 2, 3, 1).flatten(1, 2)
    if linear:
        x = transformer.proj_in(x)
    if block.only_cross_attention:
        x = by_row(x)
        x = x + block.attn1(block.norm1(x), encoder_hidden_states=text_states)
    else:
        x = by_row(x + block.attn1(block.norm1(x)))
    if block.attn2 is not None:
        x = x + block.attn2(block.norm2(x), encoder_hidden_states=text_states)
    x = x + block.ff(block.norm3(x))
    for other in others:
        x = other(x, encoder_hidden_states=text_states)
    if linear:
        x = transformer.proj_out(x)
    # As diffusers has it: torch's convolutions have other last digits for other layouts.
    x = x.unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous()
    if not linear:
        x = transformer.proj_out(x)
    widened: torch.Tensor = x + by_row(sample)
    return widened


def _last_layers(unet: UNet2DConditionModel, sample: torch.Tensor) -> torch.Tensor:
    prediction: torch.Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(sample)))
    return prediction


def _attends(block: Any) -> bool:
    return bool(getattr(block, "has_cross_attention", False))


def _attending(block: Any, text_states: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument that blocks with cross-attention take beside the others'."""
    return {"encoder_hidden_states": text_states} if _attends(block) else {}
