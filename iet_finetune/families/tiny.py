"""Tiny pipelines of every family, with random weights that follow from a seed: for `--smoke`, and for tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (  # type: ignore[attr-defined]  # some are made when they are asked for
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from .quiet import quiet_loading

RESOLUTION = 16
WIDTH = 16  # of CLIP and its projection
T5_WIDTH = 40  # more than both CLIPs side by side, as in SD 3


def tiny_tokenizer(length: int = 12) -> CLIPTokenizer:
    """A CLIP tokenizer over single bytes, with no merges, for captions of up to `length` tokens."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *[f"{letter}</w>" for letter in letters], "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=length)


def tiny_sd(
    prediction_type: str = "epsilon", dropout: float = 0.0, timesteps: int = 1000, seed: int = 0
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline with random weights that follow from the seed; 16-pixel images, 8x8 latents."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder, encoder = clip(layers=1), vae()
        unet = UNet2DConditionModel(
            sample_size=RESOLUTION // 2,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
            dropout=dropout,
        )
    scheduler = DDIMScheduler(
        num_train_timesteps=timesteps,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=encoder,
        text_encoder=text_encoder,
        tokenizer=tiny_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def second_tokenizer() -> CLIPTokenizer:
    """A tokenizer that pads with "!", as the second one of SDXL and SD 3 does."""
    first = tiny_tokenizer()
    return CLIPTokenizer(vocab=first.get_vocab(), merges=[], model_max_length=12, pad_token="!")


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer over single characters."""
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    return T5TokenizerFast(vocab=[*special, *letters], extra_ids=0)


def clip(kind: type = CLIPTextModel, layers: int = 2) -> Any:
    """A CLIP text encoder, of transformers' class `kind`."""
    tokenizer = tiny_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=12,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def t5() -> T5EncoderModel:
    """T5's encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=T5_WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dense_act_fn="gelu_new",  # type: ignore[call-arg]  # made from feed_forward_proj too
        )
    )


def vae(**settings: Any) -> AutoencoderKL:
    """A VAE that halves the side; `settings` are further ones of `AutoencoderKL`."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        **settings,
    )


def flow_vae() -> AutoencoderKL:
    """A VAE with a shift, as SD 3 and Flux have it."""
    return vae(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)


def tiny_sdxl(prediction_type: str = "epsilon", force_zeros: bool = True) -> StableDiffusionXLPipeline:
    """SDXL: 16-pixel images, 8x8 latents, text states of 2 x 16, six numbers of 8 sines for size and crop."""
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        norm_num_groups=4,
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 3),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=second_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=force_zeros,
    )


def tiny_sd3(with_t5: bool = True, newer: bool = False) -> StableDiffusion3Pipeline:
    """SD 3, or 3.5 if `newer`: 16-pixel images, 4x4 patches of 8x8 latents."""
    transformer = SD3Transformer2DModel(
        sample_size=RESOLUTION // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=6,
        **({"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if newer else {}),
    )
    return StableDiffusion3Pipeline(
        vae=flow_vae(),
        text_encoder=clip(CLIPTextModelWithProjection),
        text_encoder_2=clip(CLIPTextModelWithProjection, 3),
        text_encoder_3=t5() if with_t5 else None,
        tokenizer=tiny_tokenizer(),
        tokenizer_2=second_tokenizer(),
        tokenizer_3=t5_tokenizer() if with_t5 else None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def tiny_flux(guidance_embeds: bool = True) -> FluxPipeline:
    """Flux.1 dev, or schnell without `guidance_embeds`: 16-pixel images, 4x4 packed latents."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
    )
    return FluxPipeline(
        vae=flow_vae(),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=scheduler,
    )


def tiny_pixart(sigma: bool = False) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    """PixArt-alpha, conditioned on the resolution, or PixArt-sigma; 4x4 patches of 16-pixel images; with variance."""
    transformer = PixArtTransformer2DModel(
        # Only at 128 does the pipeline of alpha pass the resolution.
        sample_size=RESOLUTION // 2 if sigma else 128,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        cross_attention_dim=24,
        caption_channels=T5_WIDTH,
    )
    kind = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    return kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae(scaling_factor=0.13025),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


def tiny_pixels() -> UNet2DModel:
    """An unconditional network of 16-pixel colour images."""
    return UNet2DModel(
        sample_size=RESOLUTION,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
    )


# Of each class of pipeline one.
TINY: dict[str, Callable[[], Any]] = {
    "StableDiffusionPipeline": tiny_sd,
    "StableDiffusionXLPipeline": tiny_sdxl,
    "StableDiffusion3Pipeline": tiny_sd3,
    "FluxPipeline": tiny_flux,
    "PixArtAlphaPipeline": tiny_pixart,
    "PixArtSigmaPipeline": lambda: tiny_pixart(sigma=True),
    "DDPMPipeline": lambda: DDPMPipeline(tiny_pixels(), DDPMScheduler()),
    "DDIMPipeline": lambda: DDIMPipeline(tiny_pixels(), DDIMScheduler()),
}


def save_tiny_pipeline(pipeline_class: str, folder: Path, seed: int = 0) -> None:
    """Saves one of `TINY` for `from_pretrained`; its weights follow from the seed, torch's generator is left alone."""
    with torch.random.fork_rng(), quiet_loading():
        torch.manual_seed(seed)
        TINY[pipeline_class]().save_pretrained(folder)
