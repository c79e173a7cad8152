"""The rules of `iet-finetune fit`: what they choose is a run's flag, fits together, and stands in docs/fit.md."""

import re
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from iet_finetune import Config
from iet_finetune.config.fitting import CHOSEN, GB, LEAST_HELDOUT, Circumstances, choose, held_out_share

PAGE = (Path(__file__).parents[2] / "docs" / "fit.md").read_text(encoding="utf-8")
PHOTOS = Circumstances(300, 1200, 512, adapters=True, prompts=("a cat", "a dog"), device_memory=24 * GB)
SIDES = st.integers(64, 4096)
CIRCUMSTANCES = st.builds(
    Circumstances,
    images=st.integers(1, 10**6),
    side=SIDES,
    own_side=st.sampled_from([64, 512, 768, 1024]),
    adapters=st.booleans(),
    prompts=st.sampled_from([(), ("a cat",)]),
    cut=st.floats(0, 0.9),
    device_memory=st.none() | st.integers(4 * GB, 200 * GB),
    has_bf16=st.booleans(),
    can_audit=st.booleans(),
    features=st.sampled_from([("effnet_lite0",), ("facebook/dinov2-base",)]),
)


def chosen(found: Circumstances) -> dict:
    return {each.flag: each.value for each in choose(found)}


@settings(max_examples=200)
@given(CIRCUMSTANCES)
def test_whatever_there_is_the_choices_are_a_run_each_flag_once_and_with_a_reason(found):
    choices = choose(found)
    assert len({each.flag for each in choices}) == len(choices)
    assert all(each.reason for each in choices)
    config = Config.from_flags(**chosen(found), pretrained_model_name_or_path="base", train_data_dir="images")
    config.check_sources()
    assert config.data.resolution % 8 == 0
    assert config.training.train_batch_size * config.training.gradient_accumulation_steps == 4


@given(st.integers(1, 10**6))
def test_enough_images_are_held_out_for_the_guard_and_the_end_or_none_and_then_it_asks_for_neither(images):
    found, share = chosen(replace(PHOTOS, images=images)), held_out_share(images)
    if share is None:
        assert images < 27
        assert found["holdout_fraction"] == 0
        assert "skip_rule" not in found
        assert "stop_when" not in found
    else:
        assert found["holdout_fraction"] == share <= 0.3
        assert int(share * images + 0.5) >= LEAST_HELDOUT
        assert (found["skip_rule"], found["stop_when"]) == ("guard", "auto")


def test_a_small_card_gets_small_batches_that_add_up_and_no_card_gets_full_precision():
    small = chosen(replace(PHOTOS, device_memory=8 * GB, has_bf16=False))
    assert small["mixed_precision"] == "fp16"
    assert (small["train_batch_size"], small["gradient_accumulation_steps"]) == (1, 4)
    assert small["gradient_checkpointing"]
    assert "gradient_checkpointing" not in chosen(replace(PHOTOS, device_memory=80 * GB))
    assert "mixed_precision" not in chosen(replace(PHOTOS, device_memory=None))


def test_small_images_are_not_blown_up_and_models_without_prompts_get_none():
    assert chosen(PHOTOS)["resolution"] == 512
    assert chosen(replace(PHOTOS, side=200))["resolution"] == 256
    bare = chosen(replace(PHOTOS, prompts=(), adapters=False))
    assert not {"validation_prompts", "caption_dropout", "use_lora", "rank"} & bare.keys()
    assert bare["learning_rate"] == 1e-5


def test_photos_keep_their_shapes_and_squares_stay_squares():
    assert chosen(replace(PHOTOS, cut=0.29))["aspect_ratio_buckets"] == "auto"
    assert "aspect_ratio_buckets" not in chosen(replace(PHOTOS, cut=0.02))


def test_fewer_images_get_a_lower_rank_and_more_passes():
    ranks = [chosen(replace(PHOTOS, images=images))["rank"] for images in (30, 300, 3000)]
    passes = [chosen(replace(PHOTOS, images=images))["num_train_epochs"] for images in (30, 300, 3000, 300_000)]
    assert ranks == [4, 8, 16]
    assert passes == [200, 200, 20, 10]


def test_the_page_has_every_flag_that_may_be_chosen():
    some = (
        PHOTOS,
        replace(PHOTOS, cut=0.3),
        replace(PHOTOS, images=9),
        replace(PHOTOS, device_memory=8 * GB, can_audit=False),
    )
    in_table = set(re.findall(r"^\| ((?:`--\w+`(?:, )?)+) \|", PAGE, flags=re.MULTILINE))
    named = {name for cell in in_table for name in re.findall(r"--(\w+)", cell)}
    assert named == {each.flag for found in some for each in choose(found)} == {*CHOSEN}
