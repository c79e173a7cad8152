"""IET-AGC written a second time, slowly and from the formulas of the paper, to check the package against.

It shares nothing with the package but the loaded pipeline, the pictures as tensors and the documented random streams.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from peft import LoraConfig


def rng(seed, *key):
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def with_adapter(pipeline, seed=0, **lora):
    """The pipeline with an adapter, made by peft, on its frozen UNet; `lora` are peft's settings."""
    drawn_from = np.random.SeedSequence(seed, spawn_key=(4,)).generate_state(1, np.uint64)[0] >> np.uint64(1)
    torch.manual_seed(int(drawn_from))
    pipeline.unet.requires_grad_(False)
    pipeline.unet.add_adapter(LoraConfig(init_lora_weights="gaussian", **lora))
    return pipeline


class Reference:
    """Trains `pipeline.unet` on (image tensor, caption) pairs.

    The arguments are those of the flags; `passes` and `passes_per_round` count passes of each clone.
    """

    def __init__(self, pipeline, samples, *, shards=1, batch=4, accumulate=1, lr=1e-4, warmup=0, seed=0, threshold=0.0,
                 decay=0.8, clip=1.0, ema_decay=None, eps=1e-8):  # fmt: skip
        self.pipeline, self.samples, self.seed, self.batch, self.accumulate = (
            pipeline,
            samples,
            seed,
            batch,
            accumulate,
        )
        self.lr, self.warmup, self.threshold, self.decay, self.clip = lr, warmup, threshold, decay, clip
        self.ema_decay, self.eps = ema_decay, eps
        order = rng(seed, 0).permutation(len(samples))
        self.shards = [sorted(order[k::shards].tolist()) for k in range(shards)]
        self.noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.skipped: list[tuple[int, int, int]] = []

    def train(self, passes, passes_per_round):
        unet = self.pipeline.unet.train()
        self.pipeline.vae.requires_grad_(False)
        self.pipeline.text_encoder.requires_grad_(False)
        merged, average = copy.deepcopy(unet.state_dict()), copy.deepcopy(unet.state_dict())
        clones = [self.new_clone(k, passes) for k in range(len(self.shards))]
        for first in range(0, passes, passes_per_round):
            results, averages = [], []
            for k, (clone_unet, *rest) in enumerate(clones):
                clone_unet.load_state_dict(merged)
                ema = copy.deepcopy(average)
                for pass_ in range(first, min(first + passes_per_round, passes)):
                    self.one_pass(k, pass_, clone_unet, ema, *rest)
                results.append(copy.deepcopy(clone_unet.state_dict()))
                averages.append(ema)
            sizes = [len(shard) for shard in self.shards]
            merged, average = self.merge(results, sizes), self.merge(averages, sizes)
        return average if self.ema_decay is not None else merged

    def new_clone(self, k, passes):
        unet = copy.deepcopy(self.pipeline.unet)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=self.lr, weight_decay=1e-2, eps=self.eps, fused=True)
        steps = passes * -(-len(self.shards[k]) // (self.batch * self.accumulate))
        schedule = get_scheduler(
            "constant_with_warmup", optimizer, num_warmup_steps=self.warmup, num_training_steps=steps
        )
        return unet, optimizer, schedule, [0.0] * len(self.noise_scheduler), [0]

    def merge(self, states, sizes):
        return {
            name: (sum(n * state[name].double() for n, state in zip(sizes, states, strict=True)) / sum(sizes)).float()
            for name in states[0]
        }

    def one_pass(self, k, pass_, unet, ema, optimizer, schedule, bank, counter):
        shard = self.shards[k]
        order = rng(self.seed, 1, k, pass_).permutation(len(shard))
        size = self.batch * self.accumulate
        for start in range(0, len(shard), size):
            positions = range(start, min(start + size, len(shard)))
            seen = []
            for i in range(0, len(positions), self.batch):
                loss, timesteps = self.losses(k, pass_, positions[i : i + self.batch], shard, order, unet)
                keep = [
                    value >= self.threshold * bank[t]
                    for value, t in zip(loss.tolist(), timesteps.tolist(), strict=True)
                ]
                (loss * torch.tensor(keep)).sum().div(len(positions)).backward()
                seen += zip(loss.tolist(), timesteps.tolist(), keep, positions[i : i + self.batch], strict=True)
            kept = sum(keep for _, _, keep, _ in seen)
            for loss, t, keep, position in seen:
                bank[t] = self.decay * bank[t] + (1 - self.decay) * loss
                if not keep:
                    self.skipped.append((k, pass_, position))
            counter[0] += 1
            if kept:
                for parameter in unet.parameters():
                    if parameter.requires_grad:
                        parameter.grad *= len(positions) / kept
                torch.nn.utils.clip_grad_norm_(unet.parameters(), self.clip)
                optimizer.step()
                self.update_average(ema, unet, counter[0])
            optimizer.zero_grad()
            schedule.step()

    def update_average(self, ema, unet, step):
        decay = 0.0 if step <= 1 else min(self.ema_decay or 0.0, step / (9 + step))
        for name, value in unet.state_dict().items():
            ema[name] = decay * ema[name] + (1 - decay) * value

    def losses(self, *where):
        prediction, target, timesteps = self.predictions(*where)
        return F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3)), timesteps

    def predictions(self, k, pass_, positions, shard, order, unet):
        streams = [rng(self.seed, 2, k, pass_, position) for position in positions]
        return self.predicted([self.samples[shard[order[position]]] for position in positions], streams, unet)

    def predicted(self, samples, streams, unet):
        pixels, captions, noise, posterior, timesteps = [], [], [], [], []
        for (image, caption), stream in zip(samples, streams, strict=True):
            uniform = stream.random(4)
            shape = (unet.config.in_channels, image.shape[1] // 2, image.shape[2] // 2)
            noise.append(torch.from_numpy(stream.standard_normal(shape, dtype=np.float32)))
            posterior.append(torch.from_numpy(stream.standard_normal(shape, dtype=np.float32)))
            timesteps.append(int(uniform[3] * len(self.noise_scheduler)))
            pixels.append(image)
            captions.append(caption)
        noise, timesteps = torch.stack(noise), torch.tensor(timesteps)
        distribution = self.pipeline.vae.encode(torch.stack(pixels)).latent_dist
        latents = distribution.mean + distribution.std * torch.stack(posterior)
        latents = latents * self.pipeline.vae.config.scaling_factor
        tokens = self.pipeline.tokenizer(
            captions, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
        )
        hidden = self.pipeline.text_encoder(tokens.input_ids)[0]
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        target = noise
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            target = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return unet(noisy, timesteps, hidden).sample, target, timesteps


class TeachingOddOnes(Reference):
    """Skips images of odd number, which learn half of the target instead; a step has one loss, written as one sum."""

    def one_pass(self, k, pass_, unet, ema, optimizer, schedule, bank, counter):
        shard, size = self.shards[k], self.batch * self.accumulate
        order = rng(self.seed, 1, k, pass_).permutation(len(shard))
        for start in range(0, len(shard), size):
            positions = range(start, min(start + size, len(shard)))
            prediction, target, _ = self.predictions(k, pass_, positions, shard, order, unet)
            loss, other = (
                F.mse_loss(prediction, t, reduction="none").mean(dim=(1, 2, 3)) for t in (target, target / 2)
            )
            odd = torch.tensor([shard[order[position]] % 2 for position in positions])
            weight = torch.tensor([0.1 + shard[order[position]] for position in positions])
            total = ((1 - odd) * loss).sum() / max((1 - odd).sum(), 1) + (odd * weight * other).sum() / len(positions)
            total.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), self.clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


class WithClassImages(Reference):
    """Prior preservation: a step's loss is its kept samples' mean plus `weight` times that of the class images beside.

    One is beside each sample, and every loss has its min-SNR weight.
    """

    def __init__(self, *args, class_samples, weight, gamma, **settings):
        super().__init__(*args, **settings)
        self.class_samples, self.weight, self.gamma, self.steps_without = class_samples, weight, gamma, 0

    def weights(self, timesteps):
        alphas = self.noise_scheduler.alphas_cumprod[timesteps]
        return (self.gamma * (1 - alphas) / alphas).clamp(max=1.0)

    def class_losses(self, k, pass_, positions, unet):
        streams = [rng(self.seed, 8, k, pass_, position) for position in positions]
        chosen = [self.class_samples[int(stream.integers(len(self.class_samples)))] for stream in streams]
        prediction, target, timesteps = self.predicted(chosen, streams, unet)
        return F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3)), timesteps

    def one_pass(self, k, pass_, unet, ema, optimizer, schedule, bank, counter):
        shard, size = self.shards[k], self.batch * self.accumulate
        order = rng(self.seed, 1, k, pass_).permutation(len(shard))
        for start in range(0, len(shard), size):
            positions = range(start, min(start + size, len(shard)))
            loss, timesteps = self.losses(k, pass_, positions, shard, order, unet)
            pairs = list(zip(loss.tolist(), timesteps.tolist(), strict=True))
            keep = torch.tensor([float(value >= self.threshold * bank[t]) for value, t in pairs])
            of_class, at = self.class_losses(k, pass_, positions, unet)
            kept = (keep * self.weights(timesteps) * loss).sum() / max(keep.sum(), 1)
            (kept + self.weight * (self.weights(at) * of_class).mean()).backward()
            for value, t in pairs:
                bank[t] = self.decay * bank[t] + (1 - self.decay) * value
            self.steps_without += int(keep.sum() == 0)
            torch.nn.utils.clip_grad_norm_(unet.parameters(), self.clip)
            optimizer.step()
            counter[0] += 1
            self.update_average(ema, unet, counter[0])
            optimizer.zero_grad()
            schedule.step()


class OneRoundOfAdapters(Reference):
    """Clones of an adapter that train one round; their merge gives the weights of the UNet without an adapter.

    W + s Σ n_k B_k A_k / Σ n_k, s being `scaling`.
    """

    def __init__(self, pipeline, samples, *, scaling, **settings):
        super().__init__(pipeline, samples, **settings)
        self.scaling = scaling

    def merge(self, states, sizes):
        merged = {}
        for name, value in states[0].items():
            if "lora_" not in name:
                total = value.double()
                layer = name.removesuffix("base_layer.weight")
                for n, state in zip(sizes, states, strict=True) if layer != name else ():
                    up, down = (state[f"{layer}lora_{side}.default.weight"].double() for side in "BA")
                    total = total + self.scaling * n * (up @ down) / sum(sizes)
                merged[name.replace(".base_layer", "")] = total.float()
        return merged
