"""Is the GPU used as it should be, and what fits on it? Models and images are made up: nothing is downloaded."""

from ..checks import Check
from .agreement import agreement, repeats, scaled
from .attention import attention, cudnn_attention
from .audits import audits, decoding
from .card import card
from .compiled import compiled
from .limits import eight_bits, out_of_memory
from .quantised import quantised
from .recipes import flux_cut, sd15_full, sdxl_lora
from .steps import steps
from .transfers import one_rank, transfers

CHECKS = (
    Check("card", "the card, and what bounds everything", card, 60),
    Check("attention", "gradients of attention, bf16 against fp32", attention, 120),
    Check("cudnn_attention", "the same with cuDNN's kernels, which runs leave out", cudnn_attention, 120),
    Check(
        "steps", "no step of a tiny model of each kind waits for the device, full and LoRA, each precision", steps, 300
    ),
    Check("agreement", "CPU and GPU agree in fp32: losses and skips", agreement, 120),
    Check("repeats", "equal clones merge to themselves; a resumed run has the same bits", repeats, 120),
    Check("scaled", "fp16: gradients that overflow, steps in which all is skipped", scaled, 120),
    Check("transfers", "copies between host and device", transfers, 60),
    Check("sd15", "SD 1.5, all weights, 512 px, batch 4, EMA, bf16, checkpointing, K = 2", sd15_full, 300),
    Check("sdxl", "SDXL, LoRA of rank 16, 1024 px, batch 1, bf16, checkpointing, K = 2", sdxl_lora, 240),
    Check("flux", "Flux.1 cut to 4 + 8 blocks, LoRA of rank 16, 512 px, bf16, from load to fuse", flux_cut, 240),
    Check("compile", "`--compile`: two clones share their graphs", compiled, 240),
    Check("nccl", "one rank in a process group, and its collectives", one_rank, 120),
    Check("audit", "a small audit with a reference", audits, 120),
    Check("decoding", "16 images of 1024 px decoded", decoding, 120),
    Check("out_of_memory", "out of memory ends in one line", out_of_memory, 120),
    Check("eight_bits", "`--use_8bit_adam`", eight_bits, 120),
    Check("quantised", "LoRA on a base in 4 and in 8 bits", quantised, 120),
)
