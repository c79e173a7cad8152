"""The first lines of a run: they count what is there, and warn where something makes little sense."""

import PIL.Image
import pytest
from data.made import load, write_rows
from tiny_families import tiny_pipeline

from iet_finetune import Config
from iet_finetune.config.registry import SKIP_RULES
from iet_finetune.data.dedup import nothing_left_out
from iet_finetune.families.flux import Flux
from iet_finetune.families.stable_diffusion import StableDiffusion
from iet_finetune.families.tiny import tiny_sd
from iet_finetune.method.agc import AntiGradientControl
from iet_finetune.training.data import Found, schedule_of, split
from iet_finetune.training.finish import _skipped
from iet_finetune.training.overview import UNREADABLE, doubts, overview, write_unreadable


def folder_of(folder, sizes, captions):
    folder.mkdir()
    for i, size in enumerate(sizes):
        PIL.Image.linear_gradient("L").resize(size).convert("RGB").rotate(10 * i).save(folder / f"{i}.png")
    write_rows(folder / "metadata.jsonl", [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(captions)])
    return folder


def announced(folder, family=StableDiffusion, pipeline=None, **flags):
    """The first lines, and warnings."""
    flags = {"train_data_dir": str(folder), "resolution": 32, "num_shards": 2, "output_dir": "there", **flags}
    config = Config.from_flags(**flags)
    images, heldout = load(folder, **{name: flags[name] for name in ("holdout_fraction", "default_caption",
                                                                    "skip_bad_images") if name in flags})  # fmt: skip
    found = Found(images, heldout, nothing_left_out(images), heldout)
    schedule = schedule_of(config, images, split(config, images))
    family = family(pipeline or tiny_sd(), config)
    return list(overview(config, found, schedule, family)), list(doubts(config, images, schedule, family))


def test_a_run_says_what_it_has_and_what_it_will_do(tmp_path):
    sizes = [(64, 64), (32, 64), (128, 64), *[(64, 64)] * 5]
    folder = folder_of(tmp_path / "images", sizes, [f"caption {i}" for i in range(7)] + ["word " * 20])
    lines, warnings = announced(
        folder, num_train_epochs=6, merge_every_epochs=2, train_batch_size=3, agc_threshold=0.0
    )
    assert lines == [
        "images: 8, 32 x 64 to 128 x 64 pixels; none held out",
        "held out: none, so nothing tells when to stop, and an audit cannot tell memory from chance; "
        "`--holdout_fraction 0.1` holds some out, or `--holdout_data_dir` names others",
        "captions: 8 distinct; 1 is longer than the 12 tokens that the text encoder reads (by up to 70) and is cut "
        "off there",
        f"crops: cutting to 32 x 32 takes away 12% of the pixels, 50% of `{folder}/1.png`",
        "steps: 24 (12 of each of 2 clones, 3 rounds); each image is visited 6 times",
        "output: there (open run.html there to see how it goes)",
        "curves: tensorboard --logdir there/logs",
    ]
    assert warnings == []


def test_copies_and_held_out_images_are_counted(tmp_path):
    folder = folder_of(tmp_path / "images", [(32, 32)] * 8, [f"caption {i}" for i in range(8)])
    for i in (5, 6):
        (folder / f"{i}.png").write_bytes((folder / "0.png").read_bytes())
    lines, _ = announced(folder)
    assert lines[0] == "images: 8 (6 distinct), 32 x 32 pixels; none held out"
    assert not any(line.startswith("crops") for line in lines)
    lines, _ = announced(folder, holdout_fraction=0.25)
    assert lines[0].endswith("; 2 held out")
    assert not any(line.startswith("held out") for line in lines)


def test_the_longest_text_encoder_counts(tmp_path):
    folder = folder_of(tmp_path / "images", [(32, 32)] * 4, ["word " * 30] * 3 + ["a"])
    flux = {"family": Flux, "pipeline": tiny_pipeline("flux dev")}
    assert "captions: 2 distinct" in announced(folder, **flux)[0]
    cut = announced(folder, **flux, max_sequence_length=16)[0][2]
    assert cut.startswith(
        "captions: 2 distinct; 1 is longer than the 16 tokens that the text encoder reads (by up to "
    )


@pytest.mark.parametrize(
    ("captions", "flags", "words"),
    [
        (["", " ", "", ""], {}, "every caption is empty"),
        (["a", "", "b", ""], {}, "2 of 4 images have only an empty caption"),
        (["a"] * 4, {}, "every image has the same caption, 'a'"),
        (["a"] * 4, {"default_caption": "a"}, None),
        (["", "", "", ""], {"default_caption": "a"}, None),
    ],
)
def test_captions_that_teach_little_are_warned_of(tmp_path, captions, flags, words):
    folder = folder_of(tmp_path / "images", [(32, 32)] * 4, captions)
    _, warnings = announced(folder, agc_threshold=0.0, **flags)
    assert [warning[: len(words or "")] for warning in warnings] == ([] if words is None else [words])


def test_small_images_and_images_of_one_shade_are_warned_of(tmp_path):
    folder = folder_of(tmp_path / "images", [(32, 32), (16, 40), (15, 40), (64, 64)], "abcd")
    PIL.Image.new("L", (64, 64), 3).save(folder / "3.png")
    _, warnings = announced(folder, agc_threshold=0.0)
    assert len(warnings) == 2
    assert warnings[0].startswith("1 of 4 images are less than half as large as `--resolution 32`")
    assert warnings[1].startswith("1 of 4 images use only a small part of the range")
    assert "3.png" in warnings[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"num_train_epochs": 100},
            "each of the 1000 entries of a clone's loss bank sees 0.2 losses in",
        ),
        ({"num_train_epochs": 100, "agc_bins": 40}, None),
        ({"num_train_epochs": 100, "agc_bins": 41}, "`--agc_bins 10` or `--agc_bias_correction` lets it act sooner."),
        ({"num_train_epochs": 100, "agc_bins": 200, "agc_bias_correction": True}, None),
        ({"num_train_epochs": 100, "agc_threshold": 0.0}, None),
    ],
)
def test_a_skip_rule_that_can_hardly_act_is_warned_of(tmp_path, flags, words):
    folder = folder_of(tmp_path / "images", [(32, 32)] * 4, "abcd")
    _, warnings = announced(folder, **flags)
    assert len(warnings) == (words is not None)
    assert words is None or words in warnings[0]


def test_fewer_bins_let_agc_act_as_the_warning_says():
    """The doubt's measure against AGC itself: losses that repeat, of which each second one falls to a half."""
    import torch

    def skipped(bins, visits):
        agc, count = AntiGradientControl(bins, threshold=0.8), 0
        generator = torch.Generator().manual_seed(0)
        for visit in range(visits):
            bin_ = torch.randint(bins, (1,), generator=generator)
            loss = torch.tensor([1.0 if visit % 2 else 0.5])
            count += int((~agc.keep_mask(loss, bin_)).sum())
            agc.update(loss, bin_)
        return count

    config = Config.from_flags(pretrained_model_name_or_path="x", train_data_dir="y", agc_bins=200)
    entry, settings = config.chosen(SKIP_RULES)
    assert "`--agc_bins 10`" in entry.load().doubt(settings, None, 200, 4)
    assert skipped(200, 200) == 0
    assert skipped(10, 200) > 20


def test_what_cannot_be_read_is_written_down(tmp_path):
    folder = folder_of(tmp_path / "images", [(32, 32)] * 4, "abcd")
    (folder / "1.png").write_bytes(b"")
    lines, _ = announced(folder, skip_bad_images=True)
    assert f"left out 1 images that cannot be read, listed in {UNREADABLE}" in lines
    images, _ = load(folder, skip_bad_images=True)
    write_unreadable(tmp_path, images)
    assert (tmp_path / UNREADABLE).read_text().startswith(f"{folder}/1.png\t")
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    write_unreadable(tmp_path, load(folder)[0])
    assert not (tmp_path / UNREADABLE).exists()


def test_of_many_rounds_some_skip_rates_are_printed_and_their_mean():
    assert _skipped((0.1, 0.25), None) == "skipped by round: 10.0% 25.0%"
    assert _skipped((0.0, 0.0), None) == "nothing was skipped in any round: the rule found nothing to skip"
    assert _skipped((0.0,), "It cannot.") == "nothing was skipped in any round. It cannot."
    many = _skipped((0.0,) * 10 + (0.2,) * 10, None)
    zeros, twenties = " ".join(["0.0%"] * 6), " ".join(["20.0%"] * 6)
    assert many == f"skipped by round: {zeros} ... {twenties} (10.0% on average; metrics.jsonl has all)"
