"""What an audit draws with."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from iet_finetune.audit.inputs.subject import Subject


class Pipeline:
    """Notes whether its VAE decodes images one after the other when it is called."""

    def __init__(self) -> None:
        self.vae = SimpleNamespace(use_slicing=False)
        self.seen: list[bool] = []

    def __call__(self, prompt: list[str], generator: list[torch.Generator], num_inference_steps: int) -> Any:
        self.seen.append(self.vae.use_slicing)
        return SimpleNamespace(images=[Image.new("L", (8, 8)) for _ in prompt])


@pytest.mark.parametrize(("device", "sliced"), [("meta", True), ("cpu", False)])
def test_images_are_decoded_one_by_one_except_on_a_cpu_and_the_setting_is_put_back(device, sliced):
    pipeline = Pipeline()
    subject = Subject("tiny", "Pipeline", None, pipeline, torch.device(device), "none")
    images = subject.draw(["a", "b"], [0, 0], [torch.Generator()] * 2, steps=1, guidance=None, size=8)
    assert [image.mode for image in images] == ["RGB"] * 2
    assert pipeline.seen == [sliced]
    assert pipeline.vae.use_slicing is False
