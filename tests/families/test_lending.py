"""Encoders are on the device only while something is encoded."""

import pytest
import torch
from families.lending import travelling
from tiny import tiny_sd
from tiny_families import tiny_pipeline

from iet_finetune import UserError
from iet_finetune.families.stable_diffusion import StableDiffusion
from iet_finetune.families.stable_diffusion_3 import StableDiffusion3
from iet_finetune.families.stable_diffusion_xl import StableDiffusionXL

CUDA = torch.device("cuda")


def test_encoders_that_are_lent_are_on_the_device_inside_and_at_home_afterwards():
    family = StableDiffusionXL(tiny_pipeline("sdxl"))
    journeys = travelling(family, ("vae", "text_encoder", "text_encoder_2"))
    with family.lent(family.image_encoders, CUDA):
        assert journeys == [("vae", "cuda")]
    assert journeys == [("vae", "cuda"), ("vae", "cpu")]
    journeys.clear()
    with family.lent(family.caption_encoders, CUDA):
        assert journeys == [("text_encoder", "cuda"), ("text_encoder_2", "cuda")]
    assert sorted(journeys[2:]) == [("text_encoder", "cpu"), ("text_encoder_2", "cpu")]


@pytest.mark.parametrize("error", [UserError("unreadable"), KeyboardInterrupt()])
def test_encoders_that_are_lent_go_home_when_something_fails(error):
    family = StableDiffusion(tiny_sd())
    journeys = travelling(family, ("vae",))
    with pytest.raises(type(error)), family.lent(("vae",), CUDA):
        raise error
    assert journeys == [("vae", "cuda"), ("vae", "cpu")]


def test_encoders_go_home_when_there_is_no_room_for_the_next_one():
    family = StableDiffusionXL(tiny_pipeline("sdxl"))
    journeys = travelling(family, ("text_encoder", "text_encoder_2"), refuses="text_encoder_2")
    with pytest.raises(RuntimeError, match="out of memory"), family.lent(family.caption_encoders, CUDA):
        pytest.fail("it has not all that it needs")
    assert sorted(journeys[2:]) == [("text_encoder", "cpu"), ("text_encoder_2", "cpu")]


def test_a_component_that_a_pipeline_does_without_is_passed_over():
    family = StableDiffusion3(tiny_pipeline("sd3 without t5"))
    journeys = travelling(family, ("text_encoder", "text_encoder_2"))
    with family.lent(family.caption_encoders, CUDA):
        assert len(journeys) == 2
    assert len(journeys) == 4


def test_an_encoder_without_weights_is_lent_too():
    family = StableDiffusion(tiny_sd())
    family.pipeline.vae = torch.nn.Identity()
    with family.lent(("vae",), CUDA):
        assert isinstance(family.pipeline.vae, torch.nn.Identity)


@pytest.mark.parametrize(("encoders", "expected"), [(False, []), (True, ["vae", "text_encoder"])])
def test_encoders_are_on_the_device_while_training_only_where_images_are_encoded_then(encoders, expected):
    family = StableDiffusion(tiny_sd())
    journeys = travelling(family, ("vae", "text_encoder"))
    family.place(torch.device("meta"), encoders=encoders)
    assert journeys == [(name, "meta") for name in expected]
