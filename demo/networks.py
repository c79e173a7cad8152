"""Builds the untrained parts of the demo pipeline, and the pipeline itself from trained parts."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from iet_finetune import families
from iet_finetune.publish import outputs

IMAGE_SIZE = 64
LATENT_SIZE = 16
TEXT_WIDTH = 128
MAX_TOKENS = 16
END_OF_WORD = "</w>"


def build_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges come from `captions`.

    Nearly every word of the captions is one token. The 256 bytes are tokens too, so any prompt can be written.
    """
    rules = CLIPTokenizer().backend_tokenizer  # CLIP's own lower-casing and word splitting
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: the merges run out first
        min_frequency=1,
        end_of_word_suffix=END_OF_WORD,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return clip_tokenizer(list(tokenizer.get_vocab()), tokenizer, alphabet)


def clip_tokenizer(tokens: list[str], trained: Tokenizer, alphabet: list[str]) -> CLIPTokenizer:
    """The trained merges as a `CLIPTokenizer`, with the bytes that the trainer left out and CLIP's two markers."""
    tokens = sorted(tokens, key=trained.token_to_id)
    tokens += [byte + END_OF_WORD for byte in alphabet if trained.token_to_id(byte + END_OF_WORD) is None]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges_of(trained),
        model_max_length=MAX_TOKENS,
    )


def merges_of(trained: Tokenizer) -> list[tuple[str, str]]:
    """The merges of a trained byte-pair tokenizer, first rule first."""
    return [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]


def build_vae() -> AutoencoderKL:
    """An autoencoder from 3 x 64 x 64 pixels to 4 x 16 x 16 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of CLIP's text transformer, 128 wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """A denoiser of 3.5 M parameters with cross attention at the two lower resolutions."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(40, 88, 96),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # despite its name: the number of heads
        norm_num_groups=8,  # with a channel a group, GroupNorm would cancel the time embedding
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule: 1,000 timesteps, scaled-linear betas, epsilon prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def save_pipeline(target: Path, vae, text_encoder, unet, tokenizer) -> int:
    """Write the parts as a fp16 `StableDiffusionPipeline` to `target` and return the bytes of its weights.

    The parts are not changed. Files in `target` that the pipeline does not write (a model card) stay.
    `model_index.json`, which makes the folder a pipeline, is moved in last.
    """
    parts = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
    pipeline = StableDiffusionPipeline(
        **{name: as_half(part) for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    target.mkdir(parents=True, exist_ok=True)
    outputs.publish(target, lambda folder: families.save_pipeline(pipeline, folder, {}))
    return sum(file.stat().st_size for file in target.rglob("*.safetensors"))


def as_half(part: torch.nn.Module) -> torch.nn.Module:
    """A copy of `part` in fp16."""
    return copy.deepcopy(part).half().eval()
