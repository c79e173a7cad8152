"""Whole audits of made-up models: one that copies, one that does not, and what must make no difference."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_runs import run_audit, save_mosaic
from PIL import Image
from tiny import save_images

from iet_finetune import UserError
from iet_finetune.audit import measure
from iet_finetune.audit.measure import _feature_names
from iet_finetune.audit.request import read_request

SIZE = 16
BASELINES = ("f_mem", "extracted", "similarity_mean_mosaic", "similarity_p95_mosaic", "similarity_above_0.5_mosaic")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_images(folder / "train", 60)
    save_images(folder / "held", 24, seed=1)
    save_mosaic(folder)
    return folder


def settings(world: Path, generated: Path, **changes: Any) -> dict[str, Any]:
    flags = {"generated_dir": generated, "train_data_dir": world / "train", "holdout_data_dir": world / "held"}
    return {**flags, "features": world / "mosaic.pt", "resolution": SIZE, **changes}


def copied(source: Path, target: Path, count: int, mirrored: bool = False) -> Path:
    """The first images of a folder, without captions."""
    target.mkdir()
    for file in sorted(source.glob("*.png"))[:count]:
        image = Image.open(file)
        (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image).save(target / file.name)
    return target


def test_images_are_compared_by_the_best_features_that_can_be_had(world, tmp_path, monkeypatch, capsys):
    request = read_request({**settings(world, world / "held"), "output_dir": str(tmp_path)})
    assert _feature_names(request, silent=False) == (str(world / "mosaic.pt"),)
    unasked = replace(request, config=replace(request.config, audit=replace(request.config.audit, features=())))
    asked = []
    monkeypatch.setattr(measure, "preferred_features", lambda online: asked.append(online) or ("effnet_lite0",))
    assert _feature_names(unasked, silent=True) == ("effnet_lite0",)
    assert capsys.readouterr().out == ""
    of_hub = replace(unasked, model="somebody/something")
    assert _feature_names(of_hub, silent=False) == ("effnet_lite0",)
    assert asked == [False, True]
    assert "facebook/dinov2-base tells them apart better, but is not available here" in capsys.readouterr().out


def test_a_model_that_returns_training_images_is_found_out(world, tmp_path):
    audit = run_audit(tmp_path / "out", **settings(world, copied(world / "train", tmp_path / "made", 30)))
    metrics = audit["metrics"]
    assert metrics["f_mem"] == metrics["f_mem"] | {"value": 1.0, "baseline": 0.0, "count": 30, "total": 30}
    assert metrics["mq_0.15"]["value"] == 1.0
    assert metrics["extracted"] == metrics["extracted"] | {"value": 0.5, "baseline": 0.0, "count": 30, "total": 60}
    assert metrics["similarity_mean_mosaic"]["value"] == pytest.approx(1, abs=1e-5)
    assert metrics["similarity_mean_mosaic"]["baseline"] < 0.99
    pairs = json.loads((tmp_path / "out" / "pairs.json").read_text())
    assert len(pairs) == 30
    assert all(pair["distance"] == 0 and pair["ratio"] == 0 and not pair["flipped"] for pair in pairs)
    assert all(Path(pair["generated"]).name == Path(pair["training_name"]).name for pair in pairs)


def test_a_model_that_returns_held_out_images_scores_the_baseline(world, tmp_path):
    audit = run_audit(tmp_path / "out", **settings(world, copied(world / "held", tmp_path / "made", 24)))
    rates = [name for name in audit["metrics"] if name.startswith("mq_")]
    assert len(rates) == 10
    for name in (*BASELINES, *rates):
        assert audit["metrics"][name]["value"] == audit["metrics"][name]["baseline"], name
    assert audit["metrics"]["frechet_mosaic"]["value"] == pytest.approx(0, abs=1e-6)
    assert audit["metrics"]["coverage_mosaic"]["value"] == 1.0


def test_mirrored_copies_are_found(world, tmp_path):
    made = copied(world / "train", tmp_path / "made", 10, mirrored=True)
    audit = run_audit(tmp_path / "out", **settings(world, made))
    assert audit["metrics"]["f_mem"]["value"] == 1.0
    assert audit["metrics"]["similarity_mean_mosaic"]["value"] == pytest.approx(1, abs=1e-5)
    assert all(pair["flipped"] for pair in json.loads((tmp_path / "out" / "pairs.json").read_text()))


def test_exact_duplicates_in_the_training_images_change_no_metric_of_memorization(world, tmp_path):
    made = copied(world / "train", tmp_path / "made", 20)
    plain = run_audit(tmp_path / "plain", **settings(world, made))
    shutil.copytree(world / "train", tmp_path / "twice")
    rows = (tmp_path / "twice" / "metadata.jsonl").read_text().splitlines()
    for number in range(12):
        image = Image.open(tmp_path / "twice" / f"{number:03d}.png")
        image.save(tmp_path / "twice" / f"again-{number:03d}.png", compress_level=1)
        rows.append(rows[number].replace(f'"{number:03d}.png', f'"again-{number:03d}.png'))
    (tmp_path / "twice" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    twice = run_audit(tmp_path / "out", **settings(world, made, train_data_dir=tmp_path / "twice"))
    assert twice["data"]["exact_duplicates"] == 12
    assert twice["data"]["distinct"] == plain["data"]["distinct"] == 60
    for name, metric in plain["metrics"].items():
        if not name.startswith("extracted_"):
            assert twice["metrics"][name] == metric, name
    assert [row["repeats"] for row in twice["by_repeats"]] == ["1", "2-4"]
    assert twice["metrics"]["extracted_x2_4"]["value"] == 1.0
    repeats = {Path(pair["training_name"]).name: pair["repeats"] for pair in read_pairs(tmp_path / "out")}
    assert repeats["003.png"] == 2
    assert repeats["015.png"] == 1


def read_pairs(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "pairs.json").read_text()))


def test_held_out_images_that_were_trained_on_are_left_out(world, tmp_path):
    shutil.copytree(world / "held", tmp_path / "held")
    shutil.copyfile(world / "train" / "007.png", tmp_path / "held" / "000.png")
    mirrored = Image.open(world / "train" / "009.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(tmp_path / "held" / "001.png")
    made = copied(world / "train", tmp_path / "made", 20)
    audit = run_audit(tmp_path / "out", **settings(world, made, holdout_data_dir=tmp_path / "held"))
    assert audit["data"]["heldout_images"] == 22
    assert any(
        line.startswith("left out 2 held-out images that the training data have too") for line in audit["warnings"]
    )
    assert audit["metrics"]["f_mem"]["baseline"] == 0.0


def test_a_training_image_that_becomes_a_held_out_one_leaves_nothing_behind(world, tmp_path):
    """All images, in their order, are the same as before; only the border between the two sides has moved."""
    for name in ("train", "held"):
        shutil.copytree(world / name, tmp_path / name)
    made = copied(world / "train", tmp_path / "made", 60)
    flags = settings(world, made, train_data_dir=tmp_path / "train", holdout_data_dir=tmp_path / "held")
    assert run_audit(tmp_path / "out", **flags)["metrics"]["f_mem"]["value"] == 1.0
    rows = (tmp_path / "train" / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    (tmp_path / "train" / "059.png").rename(tmp_path / "held" / "!.png")
    held = tmp_path / "held" / "metadata.jsonl"
    held.write_text(rows[-1].replace("059.png", "!.png") + "\n" + held.read_text())
    after = run_audit(tmp_path / "out", **flags)
    assert (after["data"]["distinct"], after["data"]["heldout_images"]) == (59, 25)
    assert after["metrics"]["f_mem"]["count"] == 59
    assert after == run_audit(tmp_path / "fresh", **flags)


def test_what_a_killed_audit_left_half_done_is_removed(world, tmp_path):
    left = [tmp_path / "out" / ".report.html.partial", tmp_path / "out" / "work" / ".a-0.npy.partial"]
    (tmp_path / "out" / "work").mkdir(parents=True)
    for file in left:
        file.write_bytes(b"half")
    run_audit(tmp_path / "out", **settings(world, copied(world / "train", tmp_path / "made", 8)))
    assert not any(file.exists() for file in left)


def test_with_generated_images_alone_what_needs_the_model_is_listed(world, tmp_path):
    audit = run_audit(tmp_path / "out", **settings(world, copied(world / "train", tmp_path / "made", 8)))
    assert audit["model"] is None
    for name in ("mia_auc", "mia_tpr_at_1_fpr", "mia_ref_auc", "heldout_loss", "prompt_memorization"):
        assert audit["not_measured"][name] == "needs the model: only `--generated_dir` was given"
        assert name not in audit["metrics"]


def test_without_held_out_images_there_is_no_baseline_and_no_quality(world, tmp_path):
    flags = settings(world, copied(world / "train", tmp_path / "made", 8))
    del flags["holdout_data_dir"]
    audit = run_audit(tmp_path / "out", **flags)
    assert audit["metrics"]["f_mem"]["baseline"] is None
    assert "needs held-out images" in audit["not_measured"]["frechet_mosaic"]
    assert not any(name.startswith("frechet") for name in audit["metrics"])


def test_a_share_held_out_of_an_unknown_model_is_doubted(world, tmp_path):
    flags = settings(world, copied(world / "train", tmp_path / "made", 8), holdout_fraction=0.2)
    del flags["holdout_data_dir"]
    audit = run_audit(tmp_path / "out", **flags)
    assert audit["data"]["heldout_images"] == 12
    assert any("there is no record that the model was trained without them" in line for line in audit["warnings"])


def test_the_prompts_of_generated_images_are_read_from_their_metadata(world, tmp_path):
    run_audit(tmp_path / "out", **settings(world, world / "train"))
    pairs = read_pairs(tmp_path / "out")
    assert all(pair["prompt"] == f"thing {int(Path(pair['generated']).stem)}" for pair in pairs)


def test_the_resolution_is_that_of_the_first_generated_image_unless_given(world, tmp_path):
    made = copied(world / "train", tmp_path / "made", 8)
    for file in made.glob("*.png"):
        Image.open(file).resize((24, 32), Image.Resampling.NEAREST).save(file)
    flags = settings(world, made)
    del flags["resolution"]
    assert run_audit(tmp_path / "out", **flags)["settings"]["resolution"] == 24


def test_what_may_be_published_names_no_file_folder_or_caption(world, tmp_path):
    made = copied(world / "train", tmp_path / "made", 8)
    run_audit(tmp_path / "out", **settings(world, made))
    text = (tmp_path / "out" / "audit.json").read_text()
    assert str(tmp_path) not in text
    assert str(world) not in text
    assert ".png" not in text
    assert "thing" not in text


def test_the_same_audit_again_says_the_same(world, tmp_path):
    flags = settings(world, copied(world / "train", tmp_path / "made", 12))
    first = run_audit(tmp_path / "out", **flags)
    computed = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "work").iterdir()}
    assert run_audit(tmp_path / "out", **flags) == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "work").iterdir()} == computed
    assert run_audit(tmp_path / "other", **flags) == first


def test_no_generated_images_are_an_error(world, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = settings(world, tmp_path / "empty")
    with pytest.raises(UserError, match=r"`--generated_dir .*empty` has no images"):
        run_audit(tmp_path / "out", **flags)


def test_pixels_are_those_of_the_files(world, tmp_path):
    from iet_finetune import Config
    from iet_finetune.audit.inputs.images import file_array, training_transform
    from iet_finetune.audit.inputs.work import Work

    files = sorted((world / "train").glob("*.png"))[:5]
    transform = training_transform(Config.from_flags(resolution=SIZE))
    pixels, _ = file_array(Work(tmp_path), "images", files, transform, False)
    np.testing.assert_array_equal(pixels, np.stack([np.asarray(Image.open(file)) for file in files]))
