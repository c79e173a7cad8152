"""What a recipe needs of a GPU: its arithmetic and its memory, counted on tensors without values. Nothing is measured.

Networks are built on torch's `meta` device, where operations know shapes only: no weights are downloaded or held.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from iet_finetune import Config
from iet_finetune.config.settings import DEFAULT_MERGE_EPOCHS
from iet_finetune.distributed.placement import Placement
from iet_finetune.ensemble.ema import EMA
from iet_finetune.ensemble.trainable import Trainable
from iet_finetune.errors import UserError
from iet_finetune.families.scratch import read_recipe
from iet_finetune.method.schedule import Schedule
from iet_finetune.method.sharding import shard_indices
from iet_finetune.training.needs import need_of_run

GB = 10**9
# The denoisers of pretrained pipelines, as their unet/config.json says, where that differs from diffusers' defaults.
PRETRAINED: dict[str, dict[str, Any]] = {
    "stabilityai/stable-diffusion-2-1": {
        "attention_head_dim": [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "sample_size": 96,
        "upcast_attention": True,
        "use_linear_projection": True,
    }
}
# Of Stable Diffusion: pixels a latent on each side, tokens of a caption.
PIXELS, TOKENS = 8, 77
# A backward pass costs two forward passes; gradient checkpointing runs another forward pass in it.
PASSES, PASSES_CHECKPOINTED = 3, 4


@dataclass(frozen=True)
class Card:
    """A GPU, as its maker's data sheet describes it.

    Attributes:
        memory: GB (1e9 bytes).
        bf16, tf32: dense matrix products, TFLOP/s; a multiplication and an addition are two.
        reached: the assumed share of them that training a UNet reaches.
    """

    memory: float
    bf16: float
    tf32: float
    reached: float = 0.2

    def hours(self, flops: float, half: bool) -> float:
        """The time for so many FLOP; `half` says that they are in bf16."""
        return flops / (1e12 * self.reached * (self.bf16 if half else self.tf32)) / 3600


CARDS = {
    "A100 40 GB": Card(40, 312, 156),
    "A100 80 GB": Card(80, 312, 156),
    "H100 80 GB": Card(80, 989, 494.5),
    "H200 141 GB": Card(141, 989, 494.5),
    "L40S 48 GB": Card(48, 362, 183),
    "RTX 4090 24 GB": Card(24, 165.2, 82.6),
}


@dataclass(frozen=True)
class Cost:
    """What a command needs.

    Attributes:
        flops: its arithmetic; a multiplication and an addition are two.
        half: whether it is done in bf16.
        device, host: bytes of memory.
    """

    flops: float
    half: bool
    device: int
    host: int


def training_cost(config: Config, images: int) -> Cost:
    """What training needs on one GPU.

    Counted are the steps of all clones; weights, gradients, AdamW's state, the moving average and the activations of a
    step in fp32 on the device; idle clones on the host. Not counted are the data, encoding and decoding it, validation
    images, the other parts of the pipeline, and the libraries.

    Args:
        images: how many there are to train on.

    Raises:
        UserError: the denoiser of this pipeline is not known here.
    """
    training, size = config.training, config.training.train_batch_size
    checkpointed = training.gradient_checkpointing
    net = denoiser(config)
    trainable = Trainable(net)
    ema = EMA(trainable.parameters, config.optimizer.ema_max_decay) if config.optimizer.use_ema else None
    need = need_of_run(config, trainable, None, ema, Placement.plan(config.ensemble.num_shards, 1), 0)
    passes = PASSES_CHECKPOINTED if checkpointed else PASSES
    return Cost(
        flops=passes * forward_flops(config) * images_seen(schedule(config, images)),
        half=training.mixed_precision == "bf16",
        device=weights(net) + need.device + activations(config, size, checkpointed),
        host=need.memory(device_is_host=False, offloaded=False),
    )


def audit_cost(config: Config, *, num_images: int, num_inference_steps: int, eval_batch_size: int) -> Cost:
    """What drawing the images of an audit needs on one GPU; what is done with them is not counted.

    Args:
        config: of the training; a model with captions draws with guidance, which takes two forward passes a step.

    Raises:
        UserError: as `training_cost`.
    """
    guided = 1 if config.model.model_config is not None else 2
    return Cost(
        flops=guided * forward_flops(config) * num_images * num_inference_steps,
        half=config.training.mixed_precision == "bf16",
        device=weights(denoiser(config)) + activations(config, guided * eval_batch_size, None),
        host=0,
    )


def schedule(config: Config, images: int) -> Schedule:
    """When the clones of a run on so many images take their steps."""
    training, ensemble = config.training, config.ensemble
    return Schedule.plan(
        tuple(map(len, shard_indices(images, ensemble.num_shards, training.seed))),
        training.train_batch_size * training.gradient_accumulation_steps,
        num_train_epochs=training.num_train_epochs,
        max_train_steps=training.max_train_steps,
        total_train_steps=training.total_train_steps,
        merge_every_epochs=ensemble.merge_every_epochs or DEFAULT_MERGE_EPOCHS,
        merge_every_steps=ensemble.merge_every_steps,
    )


def images_seen(plan: Schedule) -> int:
    """How many images all clones together see, each as often as it is seen; the last step of a pass has fewer."""
    seen = 0
    for size, steps in zip(plan.shard_sizes, plan.total_steps, strict=True):
        passes, rest = divmod(steps, -(-size // plan.samples_per_step))
        seen += passes * size + rest * plan.samples_per_step
    return seen


def denoiser(config: Config) -> nn.Module:
    """The denoiser that a configuration trains, on the meta device.

    Raises:
        UserError: it is not known here.
    """
    return _network(config.model.model_config, config.model.pretrained_model_name_or_path, config.data.resolution)


def weights(net: nn.Module) -> int:
    """Bytes of the parameters in fp32."""
    return 4 * sum(parameter.numel() for parameter in net.parameters())


def forward_flops(config: Config) -> float:
    """FLOP of a forward pass of the denoiser for one image; a multiplication and an addition are two."""
    return _forward_flops(denoiser(config), config.data.resolution)


def activations(config: Config, batch: int, checkpointed: bool | None) -> int:
    """The most bytes of fp32 tensors that a step of training has at once, beside weights and gradients.

    Args:
        batch: images in it.
        checkpointed: with gradient checkpointing; None: of a forward pass without gradients.
    """
    return _activations(denoiser(config), config.data.resolution, batch, checkpointed)


@cache
def _network(preset: str | None, pretrained: str | None, resolution: int) -> nn.Module:
    with torch.device("meta"):
        if preset is not None:
            return UNet2DModel(**{"sample_size": resolution, **read_recipe(preset)[0]})
        if pretrained in PRETRAINED:
            return UNet2DConditionModel(**PRETRAINED[pretrained])
    raise UserError(f"the denoiser of `{pretrained}` is not known here: its needs cannot be counted.")


@cache
def _forward_flops(net: nn.Module, resolution: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*_inputs(net, resolution, 1))
    return counter.get_total_flops()


@cache
def _activations(net: nn.Module, resolution: int, batch: int, checkpointed: bool | None) -> int:
    inputs = _inputs(net, resolution, batch)
    net.train(checkpointed is not None)
    if checkpointed is None:
        with Peak() as peak, torch.no_grad():
            net(*inputs)
        return peak.most
    (net.enable_gradient_checkpointing if checkpointed else net.disable_gradient_checkpointing)()
    for parameter in net.parameters():
        # Gradients are counted elsewhere: what is added to one that is there needs no memory of its own for long.
        parameter.grad = torch.zeros_like(parameter)
    with Peak() as peak:
        out = net(*inputs).sample
        out.backward(torch.zeros_like(out))
    net.zero_grad(set_to_none=True)
    return peak.most


def _inputs(net: nn.Module, resolution: int, batch: int) -> Sequence[Tensor]:
    """What the denoiser is called with: noisy latents, timesteps, and captions or classes if it takes them."""
    settings: Any = net.config
    with torch.device("meta"):
        timesteps = torch.zeros(batch, dtype=torch.long)
        if isinstance(net, UNet2DConditionModel):
            side = resolution // PIXELS
            captions = torch.zeros(batch, TOKENS, settings.cross_attention_dim)
            return torch.zeros(batch, settings.in_channels, side, side), timesteps, captions
        classes = [] if settings.num_class_embeds is None else [timesteps]
        return torch.zeros(batch, settings.in_channels, resolution, resolution), timesteps, *classes


class Peak(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations make within it, until these are gone.

    Attributes:
        most: the highest sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, made=False)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            self._meet(tensor, made=True)
        self.most = max(self.most, self._now)
        return result

    def _meet(self, value: Any, made: bool) -> None:
        """Counts the memory of a tensor once; that of one that was there before, as a weight is, counts nothing."""
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes() if made else 0
            self._now += self._known[key]
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._known.pop(key)
