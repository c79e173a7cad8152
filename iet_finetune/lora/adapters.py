"""What is trained, seen as one ordered set of named tensors: a whole denoiser, or a LoRA adapter on a frozen one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ..config.settings import AdapterConfig
from ..distributed.groups import Placement
from ..ensemble.budget import Need
from ..errors import UserError
from ..method.seeding import adapter_seed
from .adapted import NAME, adapted_layers
from .low_rank import cut
from .quantised import QuantisedLinear
from .spectra import LowRank, Matrix, apart

Tensors = Mapping[str, Tensor]


class Adapter:
    """The LoRA layers of a denoiser, and the part of earlier rounds that is folded into the frozen weights below them.

    The *remainder* of a layer is the part of the update that an adapter of rank r could not hold. It is added to the
    layer's frozen weight, and so adds no per-step cost; the original weight stays on the host from then on. Nothing
    can be added to a quantised weight: its remainder stays beside it, as a frozen pair of factors of limited rank.

    Args:
        denoiser: with the adapter that `add_adapter` gave it, still on the host, or on the meta device to count
            bytes.
        remainder_rank: the highest rank of a remainder beside a quantised weight; 8 r if None. Half the smaller side
            is the most in any case.

    Attributes:
        layers: module's name -> layer, in the module's order.
        rank: r.
        quantised: names of the layers whose weights are quantised.
        norm: ‖W‖, the Frobenius norm over all these layers as they came.
        folded: module's name -> remainder that is in the frozen weights now.
        is_rounded: whether frozen weights are held in half precision or fewer bits.
        originals_are_mapped: whether the weights as they came stay on the host as they are mapped from their files.
    """

    def __init__(self, denoiser: Any, rank: int, remainder_rank: int | None = None) -> None:
        self._denoiser = denoiser
        self.rank = rank
        self._remainder_rank = 8 * rank if remainder_rank is None else remainder_rank
        self.layers = dict(adapted_layers(denoiser))
        self.quantised = {name for name, layer in self.layers.items() if isinstance(layer.base, QuantisedLinear)}
        is_empty = any(layer.weight.is_meta for layer in self.layers.values())
        self.norm = 0.0 if is_empty else math.sqrt(math.fsum(layer.energy() for layer in self.layers.values()))
        self._original: dict[str, Tensor] = {}
        # Layers whose frozen weights are not as they came.
        self._changed: set[str] = set()
        self.folded: Mapping[str, Matrix] = {}
        self.is_rounded = bool(self.quantised)
        self.originals_are_mapped = False

    def rounded_remainder(self, name: str, rest: Matrix) -> Matrix:
        """What of a remainder the layer can take: all of it, or below a quantised weight the best of limited rank."""
        return cut(rest, self._most(name)) if name in self.quantised else rest

    def _most(self, name: str) -> int:
        return max(1, min(self._remainder_rank, min(self.layers[name].shape) // 2))

    def keep_originals(self, mapped: bool) -> None:
        """Keeps the weights as they came where they are: the denoiser is about to be moved to another device.

        Args:
            mapped: whether they are mapped from their files, and so take no memory of their own.
        """
        self.originals_are_mapped = mapped
        for name in self.layers.keys() - self.quantised:
            self._original.setdefault(name, self.layers[name].weight.data)

    @torch.no_grad()
    def fold_remainders(self, remainders: Mapping[str, Matrix]) -> None:
        """Frozen weight ← weight as it came + remainder, rounded once; a layer without one is as it came.

        Args:
            remainders: module's name -> (out, in·kh·kw); not to be changed afterwards.
        """
        if remainders is self.folded:
            return
        for name in self.layers:
            if name in remainders or name in self._changed:
                self._put(name, *_present(remainders, name))
        self.folded, self._changed = remainders, set(remainders)

    def forget_folded(self) -> None:
        """Lets go of the remainders that are in the frozen weights: what holds them is about to be written over.

        The weights stay as they are until the next `fold_remainders`, which must come before anything is saved.
        """
        self.folded = {}

    @torch.no_grad()
    def round_frozen(self, dtype: torch.dtype) -> list[nn.Parameter]:
        """Holds the frozen linear and convolution layers in the precision to which autocast rounds them in every step.

        So nothing that is computed changes, at half the memory. What would be lost of the layers with an adapter waits
        on the host; the others can only be read again from where they came.

        Returns:
            the parameters that are held in it.
        """
        rounded = []
        adapted = {id(layer.weight): name for name, layer in self.layers.items()}
        factors = {id(weight) for layer in self.layers.values() for weight in (layer.up_weight, layer.down_weight)}
        for module in self._denoiser.modules():
            if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or id(module.weight) in factors:
                continue
            if isinstance(module, QuantisedLinear):
                continue
            for parameter in module.parameters(recurse=False):
                exact, parameter.data = parameter.data, parameter.data.to(dtype)
                rounded.append(parameter)
                if id(parameter) in adapted and not torch.equal(parameter.data.float(), exact.float()):
                    # Nobody else has it any more; one that is mapped from its file takes no memory.
                    self._original[adapted[id(parameter)]] = exact
        self.is_rounded = True
        return rounded

    @torch.no_grad()
    def fuse(self, denoiser: nn.Module | None = None) -> None:
        """Weight ← weight as it came + remainder + scaling · B A, rounded once; the adapter stays as it is.

        Args:
            denoiser: a plain model of the same layers to write to, rounding once more if it is in half precision, and
                which has those weights as they came that are quantised here; the adapter's own if None, which must not
                have been rounded.
        """
        for name in self.layers:
            weight = self.layers[name].weight if denoiser is None else denoiser.get_parameter(f"{name}.weight")
            weight.copy_(self.fused(name, weight if name in self.quantised else self._as_it_came(name)))

    @torch.no_grad()
    def fused(self, name: str, weight: Tensor) -> Tensor:
        """Weight + remainder + scaling · B A, fp32, rounded once.

        Args:
            weight: of the layer as it came, in any precision and on any device.

        Returns:
            of the weight's shape, on the layer's device.
        """
        return self._sum(name, weight, *_present(self.folded, name), self.layers[name].update(self.live))

    def remove(self) -> None:
        """Takes the adapter out of the denoiser, whose layers are again those that came."""
        if hasattr(self._denoiser, "unload_lora"):
            self._denoiser.unload_lora()
        else:
            recurse_remove_peft_layers(self._denoiser)
            del self._denoiser.peft_config

    def _put(self, name: str, *added: Matrix) -> None:
        weight, base = self.layers[name].weight, self.layers[name].base
        if isinstance(base, QuantisedLinear):
            base.put(*cut(added[0], self._most(name)) if added else base.no_factors())
            return
        if name not in self._original:
            # In the precision in which it is held: what that would lose is there already.
            self._original[name] = weight.detach().to("cpu", copy=True)
        weight.copy_(self._sum(name, self._original[name], *added))

    def _as_it_came(self, name: str) -> Tensor:
        return self._original.get(name, self.layers[name].weight.detach())

    def _sum(self, name: str, weight: Tensor, *added: Matrix) -> Tensor:
        """The layer's weight as it came + some matrices, summed in float64 on the layer's device; fp32."""
        device = self.layers[name].weight.device
        if device.type == "mps":
            device = torch.device("cpu")  # it has no float64
        total = weight.to(device).to(torch.float64, copy=True).flatten(1)
        for matrix in added:
            total += matrix.to(device) if isinstance(matrix, Tensor) else _to(matrix, device).dense()
        return total.to(torch.float32).view(weight.shape)

    def need(self, placement: Placement) -> Need:
        """Bytes of the frozen weights as they came, which stay on the host once there are remainders.

        Remainders beside quantised weights are on the device, too, in the precision in which it computes.
        """
        if placement.num_shards == 1:
            return Need()
        beside = {name: size for name, size in self.sizes.items() if name in self.quantised}
        live = sum(size * self.layers[name].holds_remainder[0].element_size() // 4 for name, size in beside.items())
        return Need(host=0 if self.originals_are_mapped else self.nbytes - sum(beside.values()), device=live)

    @property
    def nbytes(self) -> int:
        """Of the largest remainders in fp32: as large as the frozen weights, or as the rank beside them allows."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """The same by layer."""
        return {
            name: 4 * (self._most(name) * sum(layer.shape) if name in self.quantised else math.prod(layer.shape))
            for name, layer in self.layers.items()
        }

    @property
    def live(self) -> dict[str, Tensor]:
        """The parameters B and A of all layers, detached and live."""
        pairs = [((layer.up, layer.up_weight), (layer.down, layer.down_weight)) for layer in self.layers.values()]
        return {name: weight.detach() for pair in pairs for name, weight in pair}

    def updates(self, tensors: Tensors) -> dict[str, LowRank]:
        """scaling · B A of every layer, by the module's name."""
        return {name: layer.update(tensors) for name, layer in self.layers.items()}

    def distance(self, ours: Mapping[str, LowRank], theirs: Mapping[str, LowRank]) -> float:
        """‖ΔW − ΔW'‖ / ‖W‖ over all layers: how far two updates are apart, by the size of what they change."""
        return self.relative([apart(ours[name], theirs[name]) for name in self.layers])

    def relative(self, energies: Sequence[float]) -> float:
        """√(Σ energy) / ‖W‖; 0 if all weights are."""
        return math.sqrt(math.fsum(energies)) / self.norm if self.norm else 0.0


def _to(matrix: LowRank, device: torch.device) -> LowRank:
    return LowRank(matrix.up.to(device), matrix.down.to(device))


def _present(matrices: Mapping[str, Matrix], name: str) -> list[Matrix]:
    return [matrices[name]] if name in matrices else []


def add_adapter(denoiser: Any, config: AdapterConfig, default_layers: Sequence[str], seed: int) -> Adapter:
    """Freezes the denoiser and gives it a trainable adapter, A drawn from the seed and B = 0.

    Args:
        denoiser: a diffusers model, on the host in any precision; the adapter is in fp32.
        default_layers: of the family, if `--lora_layers` names none.

    Raises:
        UserError: a layer is not there or cannot be merged.
    """
    layers = config.layer_names if config.lora_layers else tuple(default_layers)
    _check_layers(denoiser, layers)
    denoiser.requires_grad_(False)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        init_lora_weights="gaussian",
        target_modules=list(layers),
    )
    with torch.random.fork_rng(devices=[]), _seen_in_fp32(denoiser):
        torch.manual_seed(adapter_seed(seed))
        if hasattr(denoiser, "add_adapter"):
            denoiser.add_adapter(settings, adapter_name=NAME)
        else:
            # Models whose LoRA files no pipeline loads, such as UNet2DModel, leave this to peft.
            inject_adapter_in_model(settings, denoiser, adapter_name=NAME)
    adapter = Adapter(denoiser, config.rank, config.lora_remainder_rank)
    for layer in adapter.layers.values():
        layer.down_weight.requires_grad_(config.lora_merge != "freeze_a")
    return adapter


@contextmanager
def _seen_in_fp32(module: nn.Module) -> Iterator[None]:
    """Parameters in half precision seem to be in fp32 inside: peft would round the adapter's to theirs."""
    held = [(parameter, parameter.data) for parameter in module.parameters() if parameter.is_floating_point()]
    try:
        for parameter, data in held:
            if data.dtype != torch.float32:
                parameter.data = torch.zeros((), device=data.device).expand(data.shape)  # takes no memory
        yield
    finally:
        for parameter, data in held:
            parameter.data = data


def _check_layers(denoiser: Any, layers: Sequence[str]) -> None:
    for layer in layers:
        found = {name: module for name, module in denoiser.named_modules() if f".{name}".endswith(f".{layer}")}
        if not found:
            raise UserError(f"`--lora_layers`: the {type(denoiser).__name__} has no layer named {layer}.")
        for name, module in found.items():
            if not isinstance(module, nn.Linear | nn.Conv2d) or getattr(module, "groups", 1) != 1:
                raise UserError(
                    f"`--lora_layers`: {name} is a {type(module).__name__}, and only linear layers and convolutions "
                    "without groups can have an adapter that is merged."
                )
