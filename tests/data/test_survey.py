"""`iet-finetune data` says what a set of images is like, and shows it on a page that any browser opens."""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from browser import CONTRASTS, SCREENS, Opened
from data.made import png, write_folder, write_rows

from iet_finetune import cli
from iet_finetune.config.settings import DataConfig
from iet_finetune.data.survey import MOST_GROUPS, lines, survey, write_survey

DEMO = Path(__file__).parents[2] / "demo" / "data"
HOSTILE = "<script>document.title = 'taken'</script>"


def saved(image: PIL.Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Ten emoji; of the first a copy, a mirrored and a compressed one; of the second a crop; and a wide picture."""
    folder = tmp_path_factory.mktemp("made") / "my photos"
    folder.mkdir()
    files = sorted((DEMO / "heldout").glob("*.png"))[:10]
    images = [PIL.Image.open(file).convert("RGB") for file in files]
    for number, image in enumerate(images):
        (folder / f"{number}.png").write_bytes(saved(image, "PNG"))
    (folder / "again.png").write_bytes(saved(images[0], "PNG"))
    (folder / "mirrored.png").write_bytes(saved(images[0].transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT), "PNG"))
    (folder / "smaller.jpg").write_bytes(saved(images[0], "JPEG", quality=80))
    (folder / "cropped.png").write_bytes(saved(images[1].crop((2, 1, 63, 62)), "PNG"))
    wide = np.tile(np.arange(120, dtype=np.uint8)[None, :, None] * 2, (60, 1, 3))
    (folder / "wide.png").write_bytes(saved(PIL.Image.fromarray(wide), "PNG"))
    names = sorted(path.name for path in folder.iterdir())
    write_rows(folder / "metadata.jsonl", [{"file_name": name, "text": "a face"} for name in names[:-1]])
    with (folder / "metadata.jsonl").open("a") as stream:
        stream.write(json.dumps({"file_name": names[-1], "text": HOSTILE}) + "\n")
    return folder


def found_in(folder: Path, cache: Path, **settings):
    return survey(DataConfig(train_data_dir=str(folder), resolution=64, **settings), seed=0, cache_dir=str(cache))


@pytest.fixture(scope="module")
def found(photos, tmp_path_factory):
    return found_in(photos, tmp_path_factory.mktemp("cache"))


def test_copies_are_grouped_the_largest_group_first(found):
    named = [{found.name(index) for index in group} for group in found.groups]
    assert named == [{"0.png", "again.png", "mirrored.png", "smaller.jpg"}, {"1.png", "cropped.png"}]
    assert {found.name(index) for index in np.flatnonzero(found.exact)} == {"again.png", "mirrored.png"}
    assert found.copies == 4


def test_the_lines_say_how_many_how_large_which_captions_and_what_is_cut_off(found, photos):
    said = list(lines(found))
    assert said[0].startswith("images: 15 (11 distinct), 61 x 61 to 120 x 60 pixels")
    assert "copies: 2 exact, 2 near, in 2 groups; `--dedup near` trains on one of each" in said
    assert "captions: 2 distinct" in said
    (crops,) = (line for line in said if line.startswith("crops: "))
    assert crops.startswith("crops: cutting to 64 x 64 takes away 3% of the pixels, 50% of ")
    assert f"`{photos}/wide.png`" in crops


def test_the_page_shows_groups_crops_and_captions(found, tmp_path):
    page = write_survey(tmp_path / "page.html", "my photos", found).read_text()
    assert page.count(">exact or mirrored<br>") == 2
    assert page.count(">near copy<br>") == 2
    assert re.findall(r"<h3>(\d+) images</h3>", page) == ["4", "2"]
    assert "50% cut off" in page
    assert HOSTILE not in page


def test_without_captions_a_folder_is_looked_at_all_the_same(tmp_path):
    write_folder(tmp_path / "bare", {"a.png": 1, "b.png": 2})
    said = list(lines(found_in(tmp_path / "bare", tmp_path / "cache")))
    assert "captions: none; `--default_caption TEXT` gives all images one, models without prompts need none" in said


def test_doubts_are_told(tmp_path):
    write_folder(tmp_path / "same", {"a.png": 1, "b.png": 2})
    write_rows(tmp_path / "same" / "metadata.jsonl", [{"file_name": f"{name}.png", "text": "it"} for name in "ab"])
    said = list(lines(found_in(tmp_path / "same", tmp_path / "cache")))
    assert any(line.startswith("look at: every image has the same caption") for line in said)
    assert any(line.startswith("look at: 2 of 2 images are less than half as large") for line in said)


def test_a_table_of_a_data_set_is_looked_at(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"image": [png(1), png(0xF08020), png(1)], "text": ["a", "b", "c"]})
    table.to_parquet(tmp_path / "set" / "train.parquet")
    config = DataConfig(dataset_name=str(tmp_path / "set"), resolution=16)
    seen = survey(config, seed=0, cache_dir=str(tmp_path / "cache"))
    assert [sorted(group) for group in seen.groups] == [[0, 2]]
    assert write_survey(tmp_path / "page.html", "set", seen).exists()


def test_only_the_largest_groups_are_shown_and_the_others_counted(tmp_path):
    count = MOST_GROUPS + 3
    names = {f"{number}-{letter}.png": number * 1000 + 7 for number in range(count) for letter in "ab"}
    write_folder(tmp_path / "many", names)
    seen = found_in(tmp_path / "many", tmp_path / "cache")
    assert len(seen.groups) == count
    page = write_survey(tmp_path / "page.html", "many", seen).read_text()
    assert page.count("<h3>2 images</h3>") == MOST_GROUPS
    assert "3 more are not shown" in page


# The command.


def run(*arguments: str) -> int:
    return cli.main(["data", *arguments])


def test_the_command_prints_the_lines_and_writes_a_page_named_after_the_folder(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(str(photos), "--resolution", "64", "--cache_dir", str(tmp_path / "cache")) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("images: 15 (11 distinct)")
    assert said[-1] == "page: my photos.html"
    assert sorted(os.listdir(photos)).count("my photos.html") == 0
    assert "Images of my photos" in (tmp_path / "my photos.html").read_text()


@pytest.mark.parametrize("caller", ["folder", "flag", "file"])
def test_the_folder_may_come_first_as_a_flag_or_from_a_file(photos, tmp_path, caller, capsys):
    (tmp_path / "run.yaml").write_text(f"train_data_dir: {photos}\nholdout_fraction: 0.5\nmax_train_samples: 3\n")
    source = {
        "folder": [str(photos)],
        "flag": ["--train_data_dir", str(photos)],
        "file": ["--config", str(tmp_path / "run.yaml")],
    }
    flags = ["--cache_dir", str(tmp_path / "cache"), "--page", str(tmp_path / "it.html")]
    assert run(*source[caller], *flags) == 0
    assert capsys.readouterr().out.startswith("images: 15 (11 distinct)")
    assert (tmp_path / "it.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no images: name their folder, as in `iet-finetune data my_photos`, or give `--dataset_name`."),
        (["missing"], "`--train_data_dir missing` is not a folder. Give the folder that holds the images."),
        (["--resolutoin", "3"], "unknown flag `--resolutoin`. Did you mean `--resolution`?"),
        (["{photos}", "--page", "{photos}/0.png/page.html"], "cannot be written"),
        (["{broken}"], "1 image cannot be read (`b.png`"),
    ],
)
def test_mistakes_end_in_one_line(photos, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    broken = write_folder(tmp_path / "broken", {"a.png": 1})
    (broken / "b.png").write_bytes(png(2)[:40])
    given = [argument.format(photos=photos, broken=broken) for argument in arguments]
    assert run(*given, "--cache_dir", str(tmp_path / "cache")) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert message in shown.err


def test_unreadable_images_are_listed_on_the_page_if_they_may_be_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    broken = write_folder(tmp_path / "broken", {"a.png": 1})
    (broken / "b.png").write_bytes(png(2)[:40])
    assert run(str(broken), "--skip_bad_images", "--cache_dir", str(tmp_path / "cache")) == 0
    assert f"cannot be read: 1, such as `{broken}/b.png`" in capsys.readouterr().out
    assert "Cannot be read" in (tmp_path / "broken.html").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_in_a_browser_it_is_whole_quiet_legible_and_no_wider_than_the_screen(browser, found, tmp_path, screen, scheme):
    path = write_survey(tmp_path / "page.html", "my photos", found)
    with Opened(browser, path, SCREENS[screen], scheme) as opened:
        page = opened.page
        loaded = page.evaluate("[...document.images].map(each => each.complete && each.naturalWidth > 0)")
        assert len(loaded) == 6 + 2 * 12
        assert all(loaded)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("document.scripts.length") == 0
        assert page.title() == "Images of my photos"
        assert [each for each in page.evaluate(CONTRASTS) if each[0] < 4.5] == []
        assert opened.said == []
        assert [url for url in opened.requests if not url.startswith("data:")] == [path.as_uri()]
