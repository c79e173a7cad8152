"""Prompts are encoded before anything is drawn from them: the images stay the same, and text encoders stay away."""

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tiny import RESOLUTION, tiny_sd
from tiny_families import PIPELINES, tiny_pipeline
from torch import nn

from iet_finetune import Config
from iet_finetune.families import base, family_class, source_of
from iet_finetune.families.prompts import NotThere
from iet_finetune.training.validation import _row, encode_validation, sampling

CPU = torch.device("cpu")
PROMPTS = ("thing 3", "a thing")


def family_of(name: str, **flags: Any) -> tuple[Config, base.Family]:
    pipeline = tiny_sd() if name == "sd" else tiny_pipeline(name)
    settings = {"validation_inference_steps": 2, "num_validation_images": 2, "resolution": RESOLUTION, **flags}
    config = Config.from_flags(
        train_data_dir="data", output_dir="out", validation_prompts=list(PROMPTS), mixed_precision="no", **settings
    )
    family = family_class(source_of(pipeline), config.model)(pipeline, config)
    family.freeze()
    return config, family


def drawn(config: Config, family: base.Family, encoded: Any) -> np.ndarray:
    with sampling(family, encoded) as pipeline:
        return np.stack([np.asarray(image) for text in PROMPTS for image in _row(config, family, pipeline, text)])


@pytest.mark.parametrize("guidance", [None, 4.0])
@pytest.mark.parametrize("name", ["sd", *PIPELINES])
def test_images_of_prompts_that_were_encoded_first_have_the_same_bits_and_need_no_text_encoder(name, guidance):
    config, family = family_of(name, validation_guidance_scale=guidance)
    before = drawn(config, family, None)
    classes = dict(family.pipeline.config)
    encoded = encode_validation(config, family, CPU)
    assert encoded is not None
    for part in family.caption_encoders:
        if (encoder := getattr(family.pipeline, part)) is not None:
            encoder.forward = None
    assert np.array_equal(drawn(config, family, encoded), before)
    assert dict(family.pipeline.config) == classes


def test_prompts_that_were_not_encoded_are_refused():
    config, family = family_of("sd")
    encoded = encode_validation(config, family, CPU)
    with pytest.raises(NotThere, match="another"), sampling(family, encoded) as pipeline:
        _row(config, family, pipeline, "another")


def test_text_encoders_and_denoiser_are_never_lent_together(monkeypatch):
    config, family = family_of("flux dev")
    lent: list[str] = []
    there: set[str] = set()
    names = {part: name for name, part in family.pipeline.components.items() if isinstance(part, nn.Module)}

    @contextmanager
    def noting(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
        there.add(names[module])
        lent.append(names[module])
        yield
        there.remove(names[module])

    def called(*args: Any) -> None:
        assert there == {"vae"}

    monkeypatch.setattr(base, "computing", noting)
    encoded = encode_validation(config, family, CPU)
    assert lent == ["text_encoder", "text_encoder_2"]
    assert not there
    lent.clear()
    family.denoiser.register_forward_pre_hook(called)
    drawn(config, family, encoded)
    assert lent == ["vae"]


def test_what_was_encoded_in_half_precision_is_drawn_from_in_fp32(monkeypatch):
    config, family = family_of("sd3")
    before = drawn(config, family, None).astype(float)
    own = {name: tensor.data_ptr() for name, tensor in family.pipeline.text_encoder_3.named_parameters()}
    monkeypatch.setattr(base, "encoding_dtype", lambda *_: torch.bfloat16)
    encoded = encode_validation(config, family, CPU)
    assert {name: t.data_ptr() for name, t in family.pipeline.text_encoder_3.named_parameters()} == own
    difference = np.abs(drawn(config, family, encoded).astype(float) - before).mean()
    assert 0 < difference < 3
