"""Which names of LoRA layers ComfyUI and A1111 match, written from their rules and from the models' own layouts.

Sources: ComfyUI comfy/lora.py (`model_lora_keys_unet`), comfy/utils.py (`unet_to_diffusers`, `flux_to_diffusers`,
`mmdit_to_diffusers`) and comfy/weight_adapter/lora.py (the ends of names); A1111
extensions-builtin/Lora/networks.py (`convert_diffusers_name_to_compvis`, `load_network`) and network_lora.py.

A table maps a tensor's name without its end to the layer of the original code that the tool adds it to. Where that
layer is several in diffusers, it is the layer's name and the place in it.
"""

import re

RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
EMBEDDINGS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}


def original_unet(unet):
    """Every linear layer and convolution of a diffusers UNet -> its path in the original code.

    The blocks are walked through in order, as the original code builds its lists.
    """
    homes = dict(EMBEDDINGS)

    def place(prefix, home, block, attention=True):
        parts = []
        for number, resnet in enumerate(block.resnets):
            parts.append([(f"{prefix}.resnets.{number}", resnet)])
            if attention and getattr(block, "attentions", None):
                parts[-1].append((f"{prefix}.attentions.{number}", block.attentions[number]))
        return parts

    def enter(path, module, home):
        for name, _ in module.named_modules():
            homes[f"{path}.{name}"] = f"{home}.{RESNET.get(name, name)}"

    count = 1
    for number, block in enumerate(unet.down_blocks):
        for parts in place(f"down_blocks.{number}", "input_blocks", block):
            for index, (path, module) in enumerate(parts):
                enter(path, module, f"input_blocks.{count}.{index}")
            count += 1
        if block.downsamplers:
            homes[f"down_blocks.{number}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    middle = unet.mid_block
    for index, (path, module) in enumerate(
        [("resnets.0", middle.resnets[0]), ("attentions.0", middle.attentions[0]), ("resnets.1", middle.resnets[1])]
    ):
        enter(f"mid_block.{path}", module, f"middle_block.{index}")
    count = 0
    for number, block in enumerate(unet.up_blocks):
        rows = place(f"up_blocks.{number}", "output_blocks", block)
        for row, parts in enumerate(rows):
            for index, (path, module) in enumerate(parts):
                enter(path, module, f"output_blocks.{count}.{index}")
            if row == len(rows) - 1 and block.upsamplers:
                homes[f"up_blocks.{number}.upsamplers.0.conv"] = f"output_blocks.{count}.{len(parts)}.conv"
            count += 1
    return homes


def comfy_unet(homes):
    """ComfyUI's table for a UNet: both paths with underscores, and diffusers' own with its old attention names."""
    table = {f"lora_unet_{home.replace('.', '_')}": home for home in homes.values()}
    table |= {f"diffusion_model.{home}": home for home in homes.values()}
    for path, home in homes.items():
        table[f"lora_unet_{path.replace('.', '_')}"] = home
        table[f"unet.{path.replace('.to_', '.processor.to_').removesuffix('.0')}"] = home
    return table


def a1111_unet(name, homes):
    """The original layer that A1111 finds for a name in a UNet of Stable Diffusion, or None."""
    modules = {home.replace(".", "_"): home for home in homes.values()}
    converted = _in_compvis(name)
    if converted in modules:
        return modules[converted]
    return modules.get(name.removeprefix("lora_unet_")) if name.startswith("lora_unet_") else None


def _in_compvis(name):
    resnet = {path: home.replace(".", "_") for path, home in RESNET.items()}
    if name == "lora_unet_conv_in":
        return "input_blocks_0_0"
    if name == "lora_unet_conv_out":
        return "out_2"
    if found := re.fullmatch(r"lora_unet_time_embedding_linear_(\d)", name):
        return f"time_embed_{2 * int(found[1]) - 2}"
    if found := re.fullmatch(r"lora_unet_down_blocks_(\d)_(attentions|resnets)_(\d)_(.+)", name):
        kind, rest = found[2], found[4]
        rest = resnet.get(rest, rest) if kind == "resnets" else rest
        return f"input_blocks_{1 + 3 * int(found[1]) + int(found[3])}_{int(kind == 'attentions')}_{rest}"
    if found := re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d)_(.+)", name):
        kind, rest = found[1], found[3]
        rest = resnet.get(rest, rest) if kind == "resnets" else rest
        return f"middle_block_{1 if kind == 'attentions' else 2 * int(found[2])}_{rest}"
    if found := re.fullmatch(r"lora_unet_up_blocks_(\d)_(attentions|resnets)_(\d)_(.+)", name):
        kind, rest = found[2], found[4]
        rest = resnet.get(rest, rest) if kind == "resnets" else rest
        return f"output_blocks_{3 * int(found[1]) + int(found[3])}_{int(kind == 'attentions')}_{rest}"
    if found := re.fullmatch(r"lora_unet_down_blocks_(\d)_downsamplers_0_conv", name):
        return f"input_blocks_{3 + 3 * int(found[1])}_0_op"
    if found := re.fullmatch(r"lora_unet_up_blocks_(\d)_upsamplers_0_conv", name):
        return f"output_blocks_{2 + 3 * int(found[1])}_{2 if int(found[1]) else 1}_conv"
    return name


def comfy_flux(double, single):
    """ComfyUI's table for Flux with so many blocks: `transformer.` and diffusers' path, or the original one."""
    homes = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        homes[f"time_text_embed.{ours}_embedder.linear_1"] = f"{theirs}_in.in_layer"
        homes[f"time_text_embed.{ours}_embedder.linear_2"] = f"{theirs}_in.out_layer"
    for i in range(double):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for place, letter in enumerate("qkv"):
            homes[f"{ours}.attn.to_{letter}"] = f"{theirs}.img_attn.qkv", place
            homes[f"{ours}.attn.add_{letter}_proj"] = f"{theirs}.txt_attn.qkv", place
        homes[f"{ours}.attn.to_out.0"] = f"{theirs}.img_attn.proj"
        homes[f"{ours}.attn.to_add_out"] = f"{theirs}.txt_attn.proj"
        for stream, suffix in (("img", ""), ("txt", "_context")):
            homes[f"{ours}.norm1{suffix}.linear"] = f"{theirs}.{stream}_mod.lin"
            homes[f"{ours}.ff{suffix}.net.0.proj"] = f"{theirs}.{stream}_mlp.0"
            homes[f"{ours}.ff{suffix}.net.2"] = f"{theirs}.{stream}_mlp.2"
    for i in range(single):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for place, layer in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
            homes[f"{ours}.{layer}"] = f"{theirs}.linear1", place
        homes[f"{ours}.proj_out"] = f"{theirs}.linear2"
        homes[f"{ours}.norm.linear"] = f"{theirs}.modulation.lin"
    return _with_original(homes)


def comfy_sd3(blocks):
    """ComfyUI's table for SD 3 with so many blocks."""
    homes = {
        "context_embedder": "context_embedder",
        "pos_embed.proj": "x_embedder.proj",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    for ours, theirs in (("timestep", "t"), ("text", "y")):
        homes[f"time_text_embed.{ours}_embedder.linear_1"] = f"{theirs}_embedder.mlp.0"
        homes[f"time_text_embed.{ours}_embedder.linear_2"] = f"{theirs}_embedder.mlp.2"
    for i in range(blocks):
        ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        for place, letter in enumerate("qkv"):
            homes[f"{ours}.attn.to_{letter}"] = f"{theirs}.x_block.attn.qkv", place
            homes[f"{ours}.attn2.to_{letter}"] = f"{theirs}.x_block.attn2.qkv", place
            homes[f"{ours}.attn.add_{letter}_proj"] = f"{theirs}.context_block.attn.qkv", place
        homes[f"{ours}.attn.to_out.0"] = f"{theirs}.x_block.attn.proj"
        homes[f"{ours}.attn2.to_out.0"] = f"{theirs}.x_block.attn2.proj"
        homes[f"{ours}.attn.to_add_out"] = f"{theirs}.context_block.attn.proj"
        for stream, suffix in (("x", ""), ("context", "_context")):
            homes[f"{ours}.norm1{suffix}.linear"] = f"{theirs}.{stream}_block.adaLN_modulation.1"
            homes[f"{ours}.ff{suffix}.net.0.proj"] = f"{theirs}.{stream}_block.mlp.fc1"
            homes[f"{ours}.ff{suffix}.net.2"] = f"{theirs}.{stream}_block.mlp.fc2"
    return _with_original(homes)


def _with_original(homes):
    table = {f"transformer.{path}": home for path, home in homes.items()}
    for home in homes.values():
        whole = home if isinstance(home, str) else home[0]
        table |= {f"lora_unet_{whole.replace('.', '_')}": whole, f"diffusion_model.{whole}": whole}
    return table


def a1111_sd3(blocks):
    """Of SD 3 A1111 matches the attention of images, under diffusers' names, and no file that has an alpha."""
    homes = {}
    for i in range(blocks):
        for place, letter in enumerate("qkv"):
            homes[f"transformer.transformer_blocks.{i}.attn.to_{letter}"] = f"joint_blocks.{i}.x_block.attn.qkv", place
        homes[f"transformer.transformer_blocks.{i}.attn.to_out.0"] = f"joint_blocks.{i}.x_block.attn.proj"
    return homes


def without_end(keys):
    """The layers' names of a file for ComfyUI and A1111, which know lora_up and lora_down, lora_B and lora_A."""
    ends = {re.fullmatch(r"(.+)\.lora_(up|down|A|B)\.weight", key)[1] for key in keys if not key.endswith(".alpha")}
    assert {name.removesuffix(".alpha") for name in keys if name.endswith(".alpha")} <= ends
    return ends
