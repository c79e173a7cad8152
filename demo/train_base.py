"""Trains the demo pipeline, a tiny Stable Diffusion of emoji, from a folder of captioned 64-pixel images."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from networks import build_scheduler, build_text_encoder, build_tokenizer, build_unet, build_vae, save_pipeline
from PIL import Image
from training import Recipe, TrainingState, train
from transformers import CLIPTokenizer

HERE = Path(__file__).parent
KL_WEIGHT = 1e-4
CAPTION_DROPOUT = 0.1


class Denoiser(torch.nn.Module):
    """The UNet and the text encoder, trained together."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet = build_unet()
        self.text_encoder = build_text_encoder(tokenizer)

    def forward(self, noisy_latents, timesteps, input_ids):
        """The predicted noise, of the shape of `noisy_latents`."""
        encoder_hidden_states = self.text_encoder(input_ids)[0]
        return self.unet(noisy_latents, timesteps, encoder_hidden_states).sample


def read_folder(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """Images of an `imagefolder` as float32 N x 3 x 64 x 64 in [-1, 1], and their captions."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    images = np.stack([np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, [row["text"] for row in rows]


def train_tokenizer(captions: list[str], target: Path) -> CLIPTokenizer:
    """Stage 1: the vocabulary, kept in `target`."""
    if not target.exists():
        build_tokenizer(captions).save_pretrained(target.with_suffix(".new"))
        target.with_suffix(".new").rename(target)
    return CLIPTokenizer.from_pretrained(target)


def train_vae(images: torch.Tensor, recipe: Recipe, target: Path) -> AutoencoderKL:
    """Stage 2: the autoencoder, kept in `target`, with latents of mean 0 and, scaled, variance 1."""
    if not target.exists():
        torch.manual_seed(recipe.seed)
        state = TrainingState(build_vae(), recipe)

        def loss_of_step(generator):
            picked = torch.randint(len(images), (recipe.batch_size,), generator=generator)
            batch = images[picked]
            mirrored = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
            return vae_loss(state.module, torch.where(mirrored, batch.flip(-1), batch), generator)

        train(state, loss_of_step, recipe, target.with_suffix(".pt"))
        with state.averaged() as vae:
            normalize_latents(vae, images)
            shutil.rmtree(target.with_suffix(".new"), ignore_errors=True)
            vae.save_pretrained(target.with_suffix(".new"))
            target.with_suffix(".new").rename(target)
    trained = AutoencoderKL.from_pretrained(target)
    vae = build_vae()  # not `trained` itself: a loaded model writes the path of `target` into what it saves
    vae.register_to_config(scaling_factor=trained.config.scaling_factor)
    vae.load_state_dict(trained.state_dict())
    return vae


def vae_loss(vae: AutoencoderKL, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Absolute error of the pixels and of their differences to the next pixel, plus a little KL divergence."""
    posterior = vae.encode(images).latent_dist
    reconstruction = vae.decode(posterior.sample(generator)).sample.float()
    error = reconstruction - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edges + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Change the two 1x1 convolutions around the latents so that each channel has mean 0 and the same variance.

    Stable Diffusion's pipeline knows one scaling factor and no shift. The decoded images stay what they were.
    """
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(32)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    common = std.mean()
    gain = common / std  # new latents = gain * (old latents - mean)

    into, out_of = vae.quant_conv, vae.post_quant_conv
    into.weight[:4] *= gain[:, None, None, None]
    into.bias[:4] = gain * (into.bias[:4] - mean)
    into.bias[4:] += 2 * gain.log()
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=float(1 / common))


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled latents' mean and standard deviation, each N x 4 x 16 x 16, float32."""
    posteriors = [vae.encode(batch).latent_dist for batch in images.split(32)]
    scale = vae.config.scaling_factor
    return torch.cat([p.mean for p in posteriors]) * scale, torch.cat([p.std for p in posteriors]) * scale


def train_denoiser(
    images: torch.Tensor, captions: list[str], tokenizer: CLIPTokenizer, vae: AutoencoderKL, recipe: Recipe, args
) -> None:
    """Stage 3: UNet and text encoder; writes `args.output` at the end, and every `args.export_every` steps so that
    others need not wait."""
    torch.manual_seed(recipe.seed)
    state = TrainingState(Denoiser(tokenizer), recipe)
    mean, std = encode_images(vae, images)
    *input_ids, empty_caption = tokenizer([*captions, ""], padding="max_length", truncation=True).input_ids
    input_ids, empty_caption = torch.tensor(input_ids), torch.tensor(empty_caption)
    noise_scheduler = DDPMScheduler.from_config(build_scheduler().config)

    def loss_of_step(generator):
        picked = torch.randint(len(mean), (recipe.batch_size,), generator=generator)
        latents = mean[picked] + std[picked] * torch.randn(mean[picked].shape, generator=generator)
        return denoiser_loss(state.module, latents, input_ids[picked], empty_caption, noise_scheduler, generator)

    def export():
        with state.averaged() as denoiser:
            size = save_pipeline(args.output, vae, denoiser.text_encoder, denoiser.unet, tokenizer)
        print(f"{args.output.name}: step {state.step}, {size / 1e6:.2f} MB of weights", flush=True)

    def export_early(step):
        if step % args.export_every == 0 and step < recipe.steps:
            export()

    train(state, loss_of_step, recipe, args.work / "denoiser.pt", export_early)
    export()


def denoiser_loss(denoiser, latents, input_ids, empty_caption, noise_scheduler, generator) -> torch.Tensor:
    """Mean squared error of the predicted noise at uniformly drawn timesteps, one caption in ten left out."""
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, latents.shape[:1], generator=generator)
    dropped = torch.rand(len(latents), 1, generator=generator) < CAPTION_DROPOUT
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction = denoiser(noisy_latents, timesteps, torch.where(dropped, empty_caption, input_ids))
    return F.mse_loss(prediction.float(), noise)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "base")
    parser.add_argument("--output", type=Path, default=HERE / "pipeline")
    parser.add_argument("--work", type=Path, default=HERE / ".work", help="checkpoints; a second start goes on there")
    parser.add_argument("--vae_steps", type=int, default=2200)
    parser.add_argument("--denoiser_steps", type=int, default=6000)
    parser.add_argument("--export_every", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not (args.data / "metadata.jsonl").exists():
        raise SystemExit(f"--data {args.data} has no metadata.jsonl. demo/split.py makes such a folder.")
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    vae_recipe = Recipe(steps=args.vae_steps, batch_size=16, lr=1e-3, seed=args.seed)
    denoiser_recipe = Recipe(steps=args.denoiser_steps, batch_size=32, lr=1e-3, seed=args.seed)

    images, captions = read_folder(args.data)
    tokenizer = train_tokenizer(captions, args.work / "tokenizer")
    vae = train_vae(images, vae_recipe, args.work / "vae")
    train_denoiser(images, captions, tokenizer, vae, denoiser_recipe, args)


if __name__ == "__main__":
    main()
