"""Flux's and SD 3's layers under the names of the original code, which has the projections of one input as one layer.

kohya's scripts, BFL's files and ComfyUI's own names have these. The tables follow ComfyUI's `flux_to_diffusers` and
`mmdit_to_diffusers` (comfy/utils.py) and diffusers' `_convert_kohya_flux_lora_to_diffusers`.

diffusers' converter is not called: it knows Flux at one width only and SD 3 not at all, and omits the alpha of Flux's
last layers.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from .layer import LoraLayer

# Original name, in which # is the number of a block -> diffusers' name, or names where one layer is several there.
Table = Mapping[str, tuple[str, ...]]
_BASIC = {
    "final_layer_linear": ("proj_out",),
    "final_layer_adaLN_modulation_1": ("norm_out.linear",),
}


def _joint(name: str, *layers: str) -> tuple[str, tuple[str, ...]]:
    return name, tuple(f"transformer_blocks.#.{layer}" for layer in layers)


def _flux() -> Table:
    double = [
        _joint("img_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
        _joint("img_attn_proj", "attn.to_out.0"),
        _joint("img_mlp_0", "ff.net.0.proj"),
        _joint("img_mlp_2", "ff.net.2"),
        _joint("img_mod_lin", "norm1.linear"),
        _joint("txt_attn_qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        _joint("txt_attn_proj", "attn.to_add_out"),
        _joint("txt_mlp_0", "ff_context.net.0.proj"),
        _joint("txt_mlp_2", "ff_context.net.2"),
        _joint("txt_mod_lin", "norm1_context.linear"),
    ]
    single = {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation_lin": ("norm.linear",),
    }
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
    return {
        **{f"double_blocks_#_{name}": layers for name, layers in double},
        **{
            f"single_blocks_#_{name}": tuple(f"single_transformer_blocks.#.{layer}" for layer in layers)
            for name, layers in single.items()
        },
        **{f"{name}_in_layer": (f"time_text_embed.{layer}.linear_1",) for name, layer in embedders.items()},
        **{f"{name}_out_layer": (f"time_text_embed.{layer}.linear_2",) for name, layer in embedders.items()},
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        **_BASIC,
    }


def _sd3() -> Table:
    joint = [
        _joint("x_block_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
        _joint("x_block_attn_proj", "attn.to_out.0"),
        _joint("x_block_attn2_qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v"),
        _joint("x_block_attn2_proj", "attn2.to_out.0"),
        _joint("x_block_mlp_fc1", "ff.net.0.proj"),
        _joint("x_block_mlp_fc2", "ff.net.2"),
        _joint("x_block_adaLN_modulation_1", "norm1.linear"),
        _joint("context_block_attn_qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        _joint("context_block_attn_proj", "attn.to_add_out"),
        _joint("context_block_mlp_fc1", "ff_context.net.0.proj"),
        _joint("context_block_mlp_fc2", "ff_context.net.2"),
        _joint("context_block_adaLN_modulation_1", "norm1_context.linear"),
    ]
    embedders = {"t_embedder": "timestep_embedder", "y_embedder": "text_embedder"}
    return {
        **{f"joint_blocks_#_{name}": layers for name, layers in joint},
        **{f"{name}_mlp_0": (f"time_text_embed.{layer}.linear_1",) for name, layer in embedders.items()},
        **{f"{name}_mlp_2": (f"time_text_embed.{layer}.linear_2",) for name, layer in embedders.items()},
        "context_embedder": ("context_embedder",),
        "x_embedder_proj": ("pos_embed.proj",),
        **_BASIC,
    }


FLUX, SD3 = _flux(), _sd3()
_PARTS = {**SD3, **FLUX}
_BLOCK = r"(?<=blocks\.)\d+"
_FLUX_WIDTH = 3072  # of Flux.1; SD 3's models are 1536 and 2432 wide


def is_original(name: str) -> bool:
    """Whether this is a layer of Flux's or SD 3's original code, its dots written as underscores."""
    return _numbered(name)[0] in _PARTS


def can_be_original(modules: Iterable[str]) -> bool:
    """Whether one of the two models has all these modules of a diffusers transformer."""
    return bool(_fitting(modules))


def to_original(layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Layers under the original names; several in one are block-diagonal, each block of the highest of their ranks.

    Args:
        layers: by the module's name in diffusers' transformer; scaling 1.

    Returns:
        as many factors as the original layers, each with scaling 1 and the update of its parts, exactly.

    Raises:
        ValueError: a module that the original code does not have; the text is its name.
    """
    homes = {layer: (name, place) for name, parts in _table(layers).items() for place, layer in enumerate(parts)}
    grouped: dict[str, dict[int, LoraLayer]] = {}
    for module, layer in layers.items():
        block, number = _numbered(module, _BLOCK)
        if block not in homes:
            raise ValueError(module)
        name, place = homes[block]
        grouped.setdefault(name.replace("#", number), {})[place] = layer
    made = {}
    for name, parts in grouped.items():
        count = len(_PARTS[_numbered(name)[0]])
        layer = _block_diagonal(parts, count) if count > 1 else parts[0]
        made[name] = _swapped(name, layer)
    return made


def from_original(name: str, layer: LoraLayer) -> dict[str, LoraLayer]:
    """What an original layer's adapter is in diffusers' modules; each keeps the scaling.

    Where the factors are block-diagonal, as `to_original` and diffusers have them, each module gets its own block.
    Elsewhere all share `down`.

    Args:
        name: for which `is_original` holds.

    Raises:
        ValueError: `up` cannot be cut into the modules.
    """
    pattern, number = _numbered(name)
    modules = [module.replace("#", number) for module in _PARTS[pattern]]
    layer = _swapped(name, layer)
    if len(modules) == 1:
        return {modules[0]: layer}
    ups = layer.up.split(_heights(len(modules), layer.up.shape[0], layer.down.shape[1]))
    rank, rest = divmod(layer.rank, len(modules))
    blocks = [up[:, i * rank : (i + 1) * rank] for i, up in enumerate(ups)]
    inside = sum(int(block.count_nonzero()) for block in blocks)
    if rest or inside != int(layer.up.count_nonzero()) or not layer.down.any():
        # Copies: a file holds no memory twice.
        return {
            name: layer._replace(up=up.clone(), down=layer.down.clone()) for name, up in zip(modules, ups, strict=True)
        }
    pairs = [_without_padding(up, down) for up, down in zip(blocks, layer.down.split(rank), strict=True)]
    found = zip(modules, pairs, strict=True)
    return {name: layer._replace(up=pair[0], down=pair[1]) for name, pair in found if pair is not None}


def _numbered(name: str, number: str = r"(?<=blocks_)\d+") -> tuple[str, str]:
    """The name with # for its block's number, and that number."""
    found = re.search(number, name)
    return (f"{name[: found.start()]}#{name[found.end() :]}", found[0]) if found else (name, "")


def _fitting(modules: Iterable[str]) -> list[Table]:
    blocks = {_numbered(module, _BLOCK)[0] for module in modules}
    return [table for table in (FLUX, SD3) if blocks <= {layer for layers in table.values() for layer in layers}]


def _table(layers: Mapping[str, LoraLayer]) -> Table:
    """That of the model that the adapter is for; both call most of their modules alike, but are not equally wide."""
    fitting = _fitting(layers)
    if len(fitting) == 1:
        return fitting[0]
    return FLUX if any(_FLUX_WIDTH in (layer.up.shape[0], layer.down.shape[1]) for layer in layers.values()) else SD3


def _swapped(name: str, layer: LoraLayer) -> LoraLayer:
    """The last modulations give shift and scale in the original code, scale and shift in diffusers'."""
    if not name.endswith("adaLN_modulation_1") or layer.up.shape[0] != 2 * layer.down.shape[1]:
        return layer
    first, second = layer.up.chunk(2)
    return layer._replace(up=torch.cat([second, first]))


def _block_diagonal(parts: Mapping[int, LoraLayer], count: int) -> LoraLayer:
    """One layer of all parts. Those without an adapter are zeros; q, k, v are square, the MLP four times as wide."""
    width, rank = next(iter(parts.values())).down.shape[1], max(layer.rank for layer in parts.values())
    absent = [width, width, width, 4 * width][:count]
    heights = [parts[place].up.shape[0] if place in parts else absent[place] for place in range(count)]
    starts = [0, *accumulate(heights)]
    dtypes = {factor.dtype for layer in parts.values() for factor in layer[:2]}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    up, down = torch.zeros(starts[-1], count * rank, dtype=dtype), torch.zeros(count * rank, width, dtype=dtype)
    for place, layer in parts.items():
        first = place * rank
        up[starts[place] : starts[place + 1], first : first + layer.rank] = layer.up
        down[first : first + layer.rank] = layer.down
    return LoraLayer(up, down, 1.0)


def _heights(count: int, total: int, width: int) -> list[int]:
    """Rows of each part: q, k and v are square where the MLP's first layer is among them, and else alike."""
    heights = [total // 3] * 3 if count == 3 else [width, width, width, total - 3 * width]
    if sum(heights) != total or min(heights) < 1:
        raise ValueError(f"its {total} rows cannot be cut into {count} layers")
    return heights


def _without_padding(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor] | None:
    """A block without what `to_original` filled with zeros; None if that is all of it."""
    used = (up != 0).any(dim=0) | (down != 0).any(dim=1)
    if not used.any():
        return None
    rank = int(used.nonzero().max()) + 1
    return up[:, :rank].clone(), down[:rank].clone()
