"""How much memory do the recipes take on a GPU and on the host, phase by phase? Counted on tensors without values.

Nothing is downloaded, and nothing is measured. The models have their real shapes. A step of training, a step of
drawing, encoding and decoding run on torch's fake tensors, under autocast as the recipe has it, and the bytes of all
tensors that are alive at once are added up. What training keeps is what `iet_finetune.training.needs` counts before a
run.

Not counted: the CUDA context and gaps between the allocator's blocks (one to two GB), the workspaces of cuDNN and
cuBLAS, Python and its libraries (some 1.5 GB of the host a rank), the images and what is cached of them. Weights that
are mapped from their files are a column of their own: the ranks share them, and the system may drop them. The fake
tensors seem to be on a CPU: attention keeps no matrix of tokens by tokens there, as on a GPU, but autocast's lists of
operations differ a little.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from counted import GB, Peak
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from running import finish, print_table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5EncoderModel

from iet_finetune import Config
from iet_finetune.audit.inputs.batches import images_at_once
from iet_finetune.audit.inputs.pipelines import precision_on
from iet_finetune.distributed.placement import Placement
from iet_finetune.doctor import shapes
from iet_finetune.ensemble.ema import EMA
from iet_finetune.ensemble.trainable import Trainable
from iet_finetune.families import Family, family_class, source_of
from iet_finetune.families.encoding import Encoder
from iet_finetune.families.flux import Flux
from iet_finetune.families.precision import HALF, MULTIPLYING, bytes_to_compute, planned
from iet_finetune.families.prompts import encodes_first
from iet_finetune.lora.adapters import Adapter, add_adapter
from iet_finetune.lora.quantised import QuantisedLinear, quantise
from iet_finetune.lora.sharing import PORTION
from iet_finetune.training.needs import need_of_run

ROUNDS = 10
# The same recipe, with the denoiser and the text encoders in 4 bits.
IN_4_BITS = "flux_lora_nf4"
# What a pipeline's files hold most numbers in, as its makers publish it.
STORED = {"sd15": 4, "sdxl_lora": 4, "sd3_lora": 2, "flux_lora": 2, IN_4_BITS: 2}
# GB: of the device in all phases but those named; of the host over all phases, with one rank and with eight on one
# machine.
DEVICE = {"sd15": 20.0, "sdxl_lora": 12.5, "sd3_lora": 12.5, "flux_lora": 28.0, IN_4_BITS: 16.0}
OF_PHASE = {(IN_4_BITS, "drawing"): 24.0}
HOST = {("flux_lora", 1): 40.0, ("flux_lora", 8): 120.0}
GPU = torch.device("cuda")
PHASES = ("caching images", "caching captions", "training", "drawing", "auditing", "saving")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=list(DEVICE), help=f"some of {', '.join(DEVICE)}")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args(argv)


# --- the models ------------------------------------------------------------------------------------------------------


def pipeline_of(recipe: str) -> Any:
    """A recipe's pipeline in its real shapes, on the meta device."""
    if recipe == "sd15":
        return shapes.sd15("meta")
    if recipe == "sdxl_lora":
        return shapes.sdxl("meta")
    if recipe in ("flux_lora", IN_4_BITS):
        flux = shapes.flux("meta", torch.float32, double=19, single=38)
        flux.register_modules(text_encoder_2=_t5())
        return flux
    # Stable Diffusion 3 has SDXL's text encoders, T5, and a VAE like Flux's.
    sdxl, flux = shapes.sdxl("meta"), shapes.flux("meta", torch.float32, double=0, single=0)
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(caption_projection_dim=1536, num_attention_heads=24, num_layers=24)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flux.vae,
        text_encoder=sdxl.text_encoder,
        tokenizer=sdxl.tokenizer,
        text_encoder_2=sdxl.text_encoder_2,
        tokenizer_2=sdxl.tokenizer_2,
        text_encoder_3=_t5(),
        tokenizer_3=flux.tokenizer_2,
    )


def _t5() -> T5EncoderModel:
    """The encoder of T5-XXL."""
    with torch.device("meta"):
        return T5EncoderModel(
            T5Config(
                vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip


def inputs_of(net: nn.Module, count: int, side: int, tokens: int) -> dict[str, Any]:
    """What a denoiser is called with for so many images; made on fake tensors.

    Args:
        side: of a latent.
        tokens: of a caption, all encoders together.
    """
    settings: Any = net.config
    if hasattr(settings, "joint_attention_dim") and hasattr(settings, "guidance_embeds"):
        packed = (side // 2) ** 2
        return {
            "hidden_states": torch.zeros(count, packed, settings.in_channels),
            "timestep": torch.zeros(count),
            "guidance": torch.zeros(count) if settings.guidance_embeds else None,
            "txt_ids": torch.zeros(tokens, 3),
            "img_ids": torch.zeros(packed, 3),
            "encoder_hidden_states": torch.zeros(count, tokens, settings.joint_attention_dim),
            "pooled_projections": torch.zeros(count, settings.pooled_projection_dim),
        }
    latents = torch.zeros(count, settings.in_channels, side, side)
    if hasattr(settings, "joint_attention_dim"):
        return {
            "hidden_states": latents,
            "timestep": torch.zeros(count),
            "encoder_hidden_states": torch.zeros(count, tokens, settings.joint_attention_dim),
            "pooled_projections": torch.zeros(count, settings.pooled_projection_dim),
        }
    called = {
        "sample": latents,
        "timestep": torch.zeros(count),
        "encoder_hidden_states": torch.zeros(count, tokens, settings.cross_attention_dim),
    }
    if settings.addition_embed_type == "text_time":
        called["added_cond_kwargs"] = {"text_embeds": torch.zeros(count, 1280), "time_ids": torch.zeros(count, 6)}
    return called


# --- counting --------------------------------------------------------------------------------------------------------


def numbers(module: nn.Module) -> int:
    """Of the parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def make_fake(module: nn.Module, halves: bool = False) -> None:
    """Gives a module tensors without values that seem to be on the host; call it in a `FakeTensorMode`.

    Args:
        halves: whether what is frozen in linear and convolution layers is in bf16, as `Adapter.round_frozen` has it.
    """
    for part in module.modules():
        is_quantised = isinstance(part, QuantisedLinear)
        for name, parameter in part._parameters.items():
            if parameter is not None:
                half = halves and isinstance(part, MULTIPLYING) and not parameter.requires_grad and not is_quantised
                kind = parameter.dtype if is_quantised else torch.bfloat16 if half else torch.float32
                fake = torch.empty(parameter.shape, dtype=kind)
                part._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def put(module: nn.Module, dtype: torch.dtype, *, layers_alone: bool = False) -> None:
    """Gives a module tensors without values in the precision in which it computes; call it in a `FakeTensorMode`."""
    made: dict[Tensor, Tensor] = {}
    for tensors, name, kind in list(planned(module, dtype, layers_alone=layers_alone)):
        tensor = tensors[name]
        # T5's embedding has two names.
        if tensor not in made:
            fake = torch.empty(tensor.shape, dtype=kind)
            made[tensor] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
        tensors[name] = made[tensor]


def held(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def peak_of(call: Callable[[], object]) -> int:
    """The most bytes of tensors that a call makes and that are alive at once."""
    with Peak() as peak, torch.no_grad():
        call()
    return peak.most


def peak_of_step(net: nn.Module, called: dict[str, Any], half: bool) -> int:
    """The same of a forward and a backward pass, gradients of the weights left out."""
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with Peak() as peak:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = net(**called, return_dict=False)[0]
        out.float().square().mean().backward()
    net.zero_grad(set_to_none=True)
    return peak.most


# --- the phases ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """A recipe's pipeline and its denoiser, as they are trained, before they are made fake."""

    name: str
    config: Config
    pipeline: Any
    family: Family
    adapter: Adapter | None
    ema: EMA | None
    trainable: Trainable

    @classmethod
    def of(cls, recipe: str) -> "Counted":
        """Counts nothing yet."""
        quantised = ["--quantize_base", "nf4", "--quantize_encoders", "nf4"] if recipe == IN_4_BITS else []
        config = Config.from_command_line(["--config", recipe.removesuffix("_nf4"), *quantised])
        pipeline = pipeline_of(recipe)
        kind = family_class(source_of(pipeline), config.model)
        family = kind(pipeline, config)
        net = pipeline.components[family.denoiser_name]
        for part in (net, *(pipeline.components[name] for name in family.caption_encoders)) if quantised else ():
            quantise(part, "nf4", torch.device("meta"))
        adapter = None
        if config.adapter.use_lora:
            adapter = add_adapter(net, config.adapter, family.lora_layers, 0)
            adapter.originals_are_mapped = True
        trainable = Trainable(net, buffers=adapter is None)
        ema = EMA(trainable.parameters, config.optimizer.ema_max_decay) if config.optimizer.use_ema else None
        return cls(recipe, config, pipeline, family, adapter, ema, trainable)

    @property
    def models(self) -> dict[str, nn.Module]:
        """By name."""
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    @property
    def net(self) -> nn.Module:
        """The denoiser."""
        return self.models[self.family.denoiser_name]


def on_the_device(run: Counted) -> dict[str, int]:
    """Bytes by phase on each GPU; the same for any number of them while each clone has one of its own."""
    config, models, family = run.config, run.models, run.family
    size, batch = config.data.resolution, config.training.train_batch_size
    half, side = config.training.mixed_precision == "bf16", size // 8
    need = need_of_run(config, run.trainable, run.adapter, run.ema, Placement.plan(config.ensemble.num_shards, 1), 0)
    average = sum(tensor.nbytes for tensor in run.ema.tensors.values()) if run.ema is not None else 0
    is_flux = isinstance(family, Flux)
    guided = 1 if is_flux else 2
    tokens = 512 if is_flux else {"sd15": 77, "sdxl_lora": 77, "sd3_lora": 77 + 256}[run.name]
    texts = {name: models[name] for name in family.caption_encoders}
    # As they are held while they are not in use.
    for text in texts.values():
        if run.name != IN_4_BITS:
            text.to(torch.bfloat16 if STORED[run.name] == 2 else torch.float32)
    dtypes = {name: family.encoding_dtype(name, GPU) for name in texts}
    found: dict[str, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, part in models.items():
            if name in texts:
                put(part, dtypes[name])
            else:
                make_fake(part, halves=part is run.net and run.adapter is not None)
        vae: Any = models["vae"]
        channels = vae.config.latent_channels

        def encoding(prompts: int) -> int:
            made = (
                peak_of(lambda text=text: text(torch.zeros(prompts, _tokens(text, tokens), dtype=torch.long)))
                for text in texts.values()
            )
            return sum(map(held, texts.values())) + sum(made)

        chunk = Encoder(family, batch, GPU).chunk
        found["caching images"] = held(vae) + peak_of(lambda: vae.encode(torch.zeros(chunk, 3, size, size)))
        drawn = config.validation.num_validation_images
        first = encodes_first(family)
        found["caching captions"] = encoding(max(chunk, drawn) if first else chunk)
        net: Any = run.net
        net.train()
        if config.training.gradient_checkpointing:
            net.enable_gradient_checkpointing()
        step = peak_of_step(net, inputs_of(net, batch, side, tokens), half)
        found["training"] = held(net) + need.device + step
        net.eval()

        def drawing(images: int) -> int:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                denoising = peak_of(lambda: net(**inputs_of(net, guided * images, side, tokens), return_dict=False))
            return max(denoising, peak_of(lambda: vae.decode(torch.zeros(1, channels, side, side))))

        beside = held(vae) if first else held(vae) + sum(map(held, texts.values()))
        found["drawing"] = held(net) + average + beside + drawing(drawn)
        found["saving"] = held(net) + average
        # An audit loads the base as it is, whatever it was trained on.
        if run.name != IN_4_BITS:
            found["auditing"] = _auditing(run, encoding, drawing)
    return {phase: found[phase] for phase in PHASES if phase in found}


def _auditing(run: Counted, encoding: Callable[[int], int], drawing: Callable[[int], int]) -> int:
    """Bytes while an audit has what it needs on a card as large as is wanted; it decodes images one at a time."""
    config, vae, net, size = run.config, run.models["vae"], run.net, run.config.data.resolution
    card = int(DEVICE[run.name] * GB)
    chosen = precision_on(GPU, Config(), type(run.pipeline).__name__, has_vae=True)
    half = torch.bfloat16 if chosen in HALF else torch.float32
    weights = bytes_to_compute(net, half, layers_alone=True) + bytes_to_compute(vae)
    images = images_at_once(config.audit.eval_batch_size, size, weights, card)
    looking = held(vae) + peak_of(lambda: vae.encode(torch.zeros(1, 3, size, size)))
    texts = encoding(images)
    put(net, half, layers_alone=True)
    print(f"{run.name}: an audit draws {images} images at once", flush=True)
    return max(looking, texts, weights + drawing(images))


def _tokens(text: nn.Module, tokens: int) -> int:
    settings: Any = text.config
    longest = getattr(settings, "max_position_embeddings", None)
    return longest or (512 if tokens == 512 else 256)


def on_the_host(run: Counted, ranks: int) -> tuple[dict[str, int], int]:
    """Bytes by phase of so many ranks on one machine, and of weights that are mapped from files, once for all."""
    config = run.config
    placement = Placement.plan(config.ensemble.num_shards, ranks)
    needs = [need_of_run(config, run.trainable, run.adapter, run.ema, placement, rank) for rank in range(ranks)]
    rests = remainders(run.adapter, config.ensemble.num_shards) if run.adapter is not None else 0
    # The check before a run counts remainders as dense, which these are not yet after so many rounds.
    dense = run.adapter.nbytes if run.adapter is not None and config.ensemble.num_shards > 1 else 0
    kept = sum(need.host for need in needs) + ranks * (rests - dense)
    found = {"loading": 0, "training": kept}
    if run.adapter is not None:
        largest = max(run.adapter.sizes.values())
        # A portion in fp32 as it is shared out, what each rank made of it, and a layer in float64 three times.
        portion = min(max(PORTION, ranks * largest), rests)
        found["merging"] = kept + ranks * (2 * portion + 3 * 2 * largest)
        found["saving a LoRA file"] = kept + 2 * rests + 3 * 2 * largest
        found["saving fused"] = kept + 4 * largest
    else:
        found["saving"] = kept
    return found, STORED[run.name] * sum(map(numbers, run.models.values()))


def remainders(adapter: Adapter, clones: int) -> int:
    """Bytes of all remainders after `ROUNDS` rounds: each adds (K - 1) r columns, until factors are no smaller."""
    width, total = (clones - 1) * adapter.rank * ROUNDS, 0
    for layer in adapter.layers.values():
        m, n = layer.weight.flatten(1).shape
        total += 4 * (m * n if 2 * width > min(m, n) else (m + n) * width)
    return total


def main(argv: list[str]) -> int:
    """Count, print, compare."""
    args = parse(argv)
    device_rows, host_rows, checks = [], [], []
    for recipe in args.recipes:
        run = Counted.of(recipe)
        # On the host it takes what the same recipe does, or less: remainders are on the device.
        for ranks in () if recipe == IN_4_BITS else (1, 8):
            phases, mapped = on_the_host(run, ranks)
            host_rows += [
                {"recipe": recipe, "ranks": ranks, "phase": phase, "GB": size / GB, "mapped GB": mapped / GB}
                for phase, size in phases.items()
            ]
            if (wanted := HOST.get((recipe, ranks))) is not None:
                most = max(phases.values()) / GB
                checks.append(
                    (f"{recipe}, {ranks} ranks: {most:.1f} GB of the host; wanted: {wanted}", most <= wanted)
                )
        for phase, size in on_the_device(run).items():
            wanted = OF_PHASE.get((recipe, phase), DEVICE[recipe])
            device_rows.append({"recipe": recipe, "phase": phase, "GB": size / GB, "wanted": wanted})
            text = f"{recipe}, {phase}: {size / GB:.1f} GB of the device; wanted: {wanted}"
            checks.append((text, size / GB <= wanted))
            print(text, flush=True)
    for rows in filter(None, (device_rows, host_rows)):
        print_table(rows)
    return finish(checks, args.json, {"device": device_rows, "host": host_rows})


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
