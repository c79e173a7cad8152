"""Pipelines of the real sizes with random weights, which take as much memory and time as trained ones."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from ..families.tiny import second_tokenizer, t5_tokenizer, tiny_tokenizer

_NOISE: dict[str, Any] = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1
}  # fmt: skip
_TOKENS = 77


@dataclasses.dataclass(frozen=True)
class _Text:
    """A CLIP text encoder: ViT-L's, which SD 1.5 has, or another."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden_act: str = "quick_gelu"

    def build(self, kind: type = CLIPTextModel) -> Any:
        tokenizer = tiny_tokenizer(_TOKENS)
        return kind(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=self.width,
                intermediate_size=4 * self.width,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                projection_dim=self.width,
                hidden_act=self.hidden_act,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )


def vae(**settings: Any) -> AutoencoderKL:
    """The VAE of Stable Diffusion: an eighth of the side; `settings` are further ones of `AutoencoderKL`."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
        **settings,
    )


@contextlib.contextmanager
def _made(device: str, dtype: torch.dtype) -> Iterator[None]:
    """What is built inside has random weights that are always the same ones, there and in this precision."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def sd15(device: str) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5: a UNet of 860 M parameters."""
    with _made(device, torch.float32):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        encoder, text_encoder = vae(), _Text().build()
    return StableDiffusionPipeline(
        vae=encoder,
        text_encoder=text_encoder,
        tokenizer=tiny_tokenizer(_TOKENS),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, **_NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(device: str, dtype: torch.dtype = torch.float32) -> StableDiffusionXLPipeline:
    """SDXL: a UNet of 2.6 G parameters, two text encoders."""
    with _made(device, dtype):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        encoder, first = vae(scaling_factor=0.13025), _Text().build()
        second = _Text(1280, 32, 20, "gelu").build(CLIPTextModelWithProjection)
    longer = second_tokenizer()
    longer.model_max_length = _TOKENS
    return StableDiffusionXLPipeline(
        vae=encoder,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tiny_tokenizer(_TOKENS),
        tokenizer_2=longer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **_NOISE),
    )


def flux(device: str, dtype: torch.dtype = torch.float32, double: int = 4, single: int = 8) -> FluxPipeline:
    """Flux.1 dev cut to so many blocks of each kind (19 and 38 make 12 G parameters), with one layer of T5-XXL."""
    with _made(device, dtype):
        transformer = FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, guidance_embeds=True, joint_attention_dim=4096
        )
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=32128,
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=1,
                num_heads=64,
                feed_forward_proj="gated-gelu",
                dense_act_fn="gelu_new",  # type: ignore[call-arg]  # made from feed_forward_proj too
            )
        )
        encoder = vae(
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        text_encoder = _Text().build()
    return FluxPipeline(
        vae=encoder,
        text_encoder=text_encoder,
        text_encoder_2=t5,
        tokenizer=tiny_tokenizer(_TOKENS),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
