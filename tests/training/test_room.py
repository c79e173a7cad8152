"""The memory that a run needs is counted before a weight is read."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from ranks import run_ranks
from tiny import RESOLUTION, save_images, tiny_sd

from iet_finetune import Config, Trainer, UserError
from iet_finetune.distributed.groups import Placement, Ranks
from iet_finetune.ensemble import budget
from iet_finetune.families import find_pipeline
from iet_finetune.training import assembly
from iet_finetune.training.room import check_room

MB = 1_000_000


@pytest.fixture
def world(tmp_path):
    """A pipeline in bf16 and 8 images."""
    tiny_sd().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    save_images(tmp_path / "data", 8)
    return tmp_path


def config(world, **flags) -> Config:
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"),
        "train_data_dir": str(world / "data"),
        "output_dir": str(world / "output"),
        "resolution": RESOLUTION,
        "train_batch_size": 2,
        "num_shards": 2,
        "num_train_epochs": 1,
        "lr_warmup_steps": 0,
        "report_to": "none",
    }
    return Config.from_flags(**{**defaults, **flags})


def counted(world, monkeypatch, device="cpu", ranks=1, **flags) -> int:
    """The bytes that are asked of a machine with so many ranks."""
    settings, asked = config(world, **flags), []

    def note(needed, ranks_on_machine, **ways):
        asked.append(needed * ranks_on_machine)

    monkeypatch.setattr("iet_finetune.training.room.check_memory", note)
    placement, all_ranks = Placement.plan(settings.ensemble.num_shards, ranks), Ranks.alone()
    all_ranks.local_size = ranks
    check_room(settings, find_pipeline(settings.model), placement, all_ranks, torch.device(device))
    return asked[0]


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_that_does_not_fit_is_refused_in_one_line_before_a_weight_is_read(world, monkeypatch, lora):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(budget, "available_memory", lambda: 1000)
    monkeypatch.setattr(assembly, "load_model", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(UserError, match=r"needs .* GB of memory on this machine, .*`--offload_dir`") as caught:
        Trainer(config(world, use_lora=lora))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_what_is_counted_is_what_training_keeps_and_what_it_computes_with(world, monkeypatch, lora, ema):
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = {"use_lora": lora, "use_ema": ema}
    trainer = Trainer(config(world, **flags))
    kept = trainer.run.need.memory(device_is_host=True, offloaded=False)
    parameters = sum(parameter.numel() for parameter in tiny_sd().unet.parameters())
    assert counted(world, monkeypatch, **flags) == kept + 4 * parameters
    on_gpu = trainer.run.need.memory(device_is_host=False, offloaded=False)
    # There the weights below an adapter stay mapped from their files.
    on_gpu -= trainer.model.adapter.nbytes if lora else 0
    assert counted(world, monkeypatch, device="cuda", **flags) == on_gpu


def test_a_base_that_stays_as_it_is_stored_takes_no_memory_of_its_own(world, monkeypatch):
    flags = {"use_lora": True, "num_shards": 1}
    unet, vae, text = (
        sum(p.numel() for p in part.parameters()) for part in (tiny_sd().unet, tiny_sd().vae, tiny_sd().text_encoder)
    )
    whole = counted(world, monkeypatch, **flags)
    mixed = counted(world, monkeypatch, mixed_precision="bf16", **flags)
    assert whole - mixed == 4 * (unet - max(vae, text))
    uncached = counted(world, monkeypatch, cache_latents=False, **flags)
    assert abs(uncached - whole - 4 * (vae + text)) <= 4 * 100  # positions of tokens are stored too
    assert counted(world, monkeypatch, device="cuda", **flags) < whole - 4 * unet


def test_ranks_of_a_machine_need_their_own_and_what_cannot_be_mapped_counts_for_each(world, monkeypatch):
    flags = {"use_lora": True, "optimizer_across_rounds": "reset", "device": "cuda"}
    one = counted(world, monkeypatch, num_shards=1, **flags)
    assert counted(world, monkeypatch, num_shards=8, ranks=8, **flags) > 8 * one
    tiny_sd().to(torch.bfloat16).save_pretrained(world / "base", safe_serialization=False)
    for part in ("unet", "vae"):  # transformers writes no other files than safetensors
        (world / "base" / part / "diffusion_pytorch_model.safetensors").unlink()
    stored = sum(p.nbytes for part in ("unet", "vae") for p in getattr(tiny_sd(), part).parameters())
    pickled = counted(world, monkeypatch, num_shards=1, **flags)
    assert pickled - one == stored // 2


def test_only_the_rank_that_draws_and_saves_keeps_encoders_whose_work_is_done(world):
    body = """
from iet_finetune import Config, Trainer
sys.stdout, out = sys.stderr, sys.stdout
flags = json.loads(os.environ["FLAGS"])
places = []
for more in ({}, {"cache_latents": False}, {"holdout_fraction": 0.25}):
    trainer = Trainer(Config.from_flags(**{**flags, **more, "output_dir": flags["output_dir"] + str(len(places))}))
    pipeline = trainer.model.family.pipeline
    places.append([str(part.device) for part in (pipeline.vae, pipeline.text_encoder)])
sys.stdout = out
emit(places)
"""
    shared = {"ACCELERATE_USE_CPU": "true", "FLAGS": json.dumps(config(world).to_flags())}
    ended = run_ranks(body, 2, environments={rank: {**shared, "LOCAL_RANK": str(rank)} for rank in range(2)})
    assert [rank.code for rank in ended] == [0, 0], ended[0].stderr
    assert ended[0].output == [[["cpu", "cpu"]] * 3]
    assert ended[1].output == [[["meta", "meta"], ["cpu", "cpu"], ["meta", "meta"]]]
