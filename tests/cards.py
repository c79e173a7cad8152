"""The facts of made-up runs, for tests of the model card and of the push."""

from dataclasses import replace

from iet_finetune.config.config import Config
from iet_finetune.publish.card import CardFacts


def facts(**changes: object) -> CardFacts:
    """The facts of a short run on a local folder of images."""
    flags = Config.from_flags(num_shards=2, validation_prompts=["a cat", "a `dog`"], output_dir="out").to_flags()
    made = CardFacts(
        base_model="somebody/tiny-sd",
        base_license="openrail++",
        pipeline_class="StableDiffusionPipeline",
        flags=flags,
        num_images=40,
        num_distinct_images=37,
        num_heldout=5,
        rounds=3,
        steps=24,
        skip_rates=(0.0, 0.125, 0.25),
        sample_grid=None,
        versions={"diffusers": "0.42.1"},
    )
    return replace(made, **changes)  # type: ignore[arg-type]  # of as many types as the facts have


def with_flags(made: CardFacts, **flags: object) -> CardFacts:
    """The same facts of a run with other flags."""
    return replace(made, flags=made.flags | flags)
