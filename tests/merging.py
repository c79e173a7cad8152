"""Running `iet-finetune merge` in tests."""

from loras import ATTENTION

from iet_finetune import cli

NAME = "pytorch_lora_weights.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LOW = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}


def merge(*arguments):
    """Runs `iet-finetune merge` in this process."""
    return cli.main(["merge", *map(str, arguments)])


def the_line(capsys, stream="out"):
    """The one line that was printed; nothing may stand on the other stream."""
    shown = capsys.readouterr()
    said, other = (shown.out, shown.err) if stream == "out" else (shown.err, shown.out)
    assert other == ""
    assert len(said.splitlines()) == 1
    return said.strip()
