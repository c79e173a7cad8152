"""`run.html` says how a run goes: whole after every round, safe whatever captions hold, fit for a real browser."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import CONTRASTS, SCREENS, Opened
from runs import run_until, train_on_ranks
from tiny import RESOLUTION, save_images, save_tiny_sd

from iet_finetune import Callback, Config, Trainer
from iet_finetune.training.callbacks import RunFacts
from iet_finetune.training.run_charts import charts, tiles
from iet_finetune.training.run_words import how_it_goes, in_words

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline of 10 timesteps, and 24 images; the first is there four times more, with such a caption."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 24)
    rows = [json.loads(line) for line in (folder / "data" / "metadata.jsonl").read_text().splitlines()]
    rows[0]["text"] = HOSTILE
    rows += [{**rows[0], "file_name": f"again-{number}.png"} for number in range(4)]
    for row in rows[24:]:
        (folder / "data" / row["file_name"]).write_bytes((folder / "data" / rows[0]["file_name"]).read_bytes())
    (folder / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(world: Path, output: Path, **flags) -> Config:
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"),
        "train_data_dir": str(world / "data"),
        "output_dir": str(output),
        "resolution": RESOLUTION,
        "train_batch_size": 4,
        "num_shards": 2,
        "num_train_epochs": 3,
        "merge_every_epochs": 1,
        "learning_rate": 1e-3,
        "agc_threshold": 0.9,
        "agc_decay": 0.1,
        "holdout_fraction": 0.3,
        "stop_when": "auto",
        "validation_prompts": ["a dog"],
        "num_validation_images": 1,
        "validation_rounds": 1,
        "validation_inference_steps": 2,
        "report_to": "none",
    }
    return Config.from_flags(**{**defaults, **flags})


class Pages(Callback):
    """Keeps the page as it stands after each round."""

    def __init__(self, output: Path) -> None:
        self.output, self.texts, self.pictures = output, [], []

    def on_round_end(self, facts) -> None:
        self.texts.append((self.output / "run.html").read_text())

    def on_images(self, facts) -> None:
        self.pictures.append((facts.round, facts.file.name))
        self.texts.append((self.output / "run.html").read_text())


@pytest.fixture(scope="module")
def written(world, tmp_path_factory) -> tuple[Path, Pages]:
    output = tmp_path_factory.mktemp("run") / "my model"
    pages = Pages(output)
    Trainer(config(world, output), callbacks=[pages]).train()
    return output, pages


def test_the_page_is_written_at_the_start_after_each_round_with_its_images_and_at_the_end(written):
    output, pages = written
    heads = [re.search(r'<h2 id="state">(.*?)</h2>', text)[1] for text in pages.texts]
    rounds = [f"Round {number} of 3 is done" for number in (1, 1, 2, 2, 3, 3)]
    assert heads == ["Training begins: 3 rounds", *rounds]
    assert pages.pictures == [(number, f"round-{number:04d}.png") for number in range(4)]
    assert [text.count('alt="Validation images') for text in pages.texts] == [1, 1, 2, 2, 3, 3, 4]
    last = (output / "run.html").read_text()
    assert "Finished after 3 rounds" in last
    assert "my model" in last
    assert "metrics.jsonl" in last


def test_its_numbers_are_those_of_the_records(written):
    output, _ = written
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    page = (output / "run.html").read_text()
    assert f"{lines[-1]['loss']:.4f}" in page
    looks = [line for line in lines if "heldout_loss" in line]
    assert f"{looks[-1]['heldout_loss']:.3f}" in page
    best = min(looks, key=lambda line: line["heldout_loss"])["round"]
    assert f"What is saved is round {best}, after which the held-out loss was lowest." in page
    for line in (lines[0], lines[-1]):
        assert f"{line['merge_drift']:.3g}" in page


def test_suspects_are_those_whose_mean_loss_in_the_ledger_is_lowest_each_content_once(written):
    import pyarrow.parquet as pq

    output, _ = written
    rows = [row for row in pq.read_table(output / "ledger.parquet").to_pylist() if row["split"] == "train"]
    rows = sorted((row for row in rows if (row["mean_log_ratio"] or 0) < 0), key=lambda row: row["mean_log_ratio"])
    expected = list(dict.fromkeys(row["content_hash"] for row in rows))
    page = (output / "run.html").read_text()
    files = re.findall(r"<dt>file</dt><dd>(.*?)</dd>", page)
    hashes = {row["image"]: row["content_hash"] for row in rows}
    shown = [hashes[file] for file in files]
    assert 2 < len(shown) <= 12
    assert len(set(shown)) == len(shown)
    # Those that were compared in less than half as many visits are left out.
    assert shown == [each for each in expected if each in shown]
    lowest = rows[0]["mean_log_ratio"]
    assert f"loss {1 - np.exp(lowest):.0%} below what is expected" in page


def test_the_ranks_find_the_same_suspects_as_one(written, world, tmp_path):
    alone, _ = written
    settings = config(world, tmp_path / "my model")
    for rank in train_on_ranks(2, settings):
        assert rank.code == 0, rank.stderr
    pages = [(folder / "run.html").read_text() for folder in (alone, tmp_path / "my model")]
    assert pages[0] == pages[1]


def test_a_resumed_run_writes_the_same_page(written, world, tmp_path):
    alone, _ = written
    settings = config(world, tmp_path / "my model")
    run_until(settings, 7)
    Trainer(config(world, tmp_path / "my model", resume_from_checkpoint="latest")).train()
    assert (tmp_path / "my model" / "run.html").read_text() == (alone / "run.html").read_text()


def test_the_guard_says_whom_it_suspects(world, tmp_path):
    flags = {"skip_rule": "guard", "guard_budget": 0.5, "guard_tau": 0.1, "guard_levels": [0.1], "guard_draws": 1}
    usual = {"agc_threshold": 0.8, "agc_decay": 0.8}
    Trainer(config(world, tmp_path / "out", **flags, **usual)).train()
    page = (tmp_path / "out" / "run.html").read_text()
    found = re.findall(r"loss fell further than that of held-out images, by (.*?) deviations", page)
    assert found
    assert [float(each) for each in found] == sorted(map(float, found), reverse=True)


def test_an_image_whose_file_is_gone_is_named_without_its_picture(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")

    class Remover(Callback):
        def on_run_begin(self, facts) -> None:
            for file in (tmp_path / "data").glob("*.png"):
                file.unlink()

    flags = {"train_data_dir": str(tmp_path / "data"), "stop_when": "end", "holdout_fraction": 0}
    Trainer(config(world, tmp_path / "out", **flags), callbacks=[Remover()]).train()
    page = (tmp_path / "out" / "run.html").read_text()
    assert page.count("<dt>file</dt>") > 2
    assert 'alt="Training image' not in page


def facts(done: int, total: int) -> RunFacts:
    return RunFacts(Path("out"), 0, 10, 2, 10 * total, total, 10 * done, done)


def line(number: int, loss: float = 1.0, skip: float = 0.0, heldout: float | None = None, levels=None) -> dict:
    found = {
        "round": number,
        "loss": loss,
        "skip_rate": skip,
        "skip_rate_by_noise_level": levels or [skip] * 10,
        "merge_drift": 0.01,
        "clone_drift": [0.01],
        "shard_loss": [loss],
        "lr": [1e-4],
    }
    return found if heldout is None else {**found, "heldout_loss": heldout}


def said(lines, total=10, watches=False, doubt=None) -> list[str]:
    return list(how_it_goes(lines, total, watches=watches, doubt=doubt))


def test_losses_are_told_in_words():
    assert said([line(1, 0.5)])[0] == "The training loss is 0.5000."
    assert said([line(1, 0.5), line(2, 0.4)])[0] == "The training loss is 0.4000, 20% lower than in the first round."
    assert said([line(1, 0.5), line(2, 0.501)])[0].endswith("the same as in the first round.")
    assert said([line(1, 0.5), line(2, 0.6)])[0].endswith("20% higher than in the first round.")


def test_the_held_out_loss_says_when_it_is_enough():
    rising = [line(1, heldout=-2.0), line(2, heldout=-2.5), line(3, heldout=-2.4)]
    assert "lowest after round 2 and has been higher since" in said(rising)[1]
    assert "at its lowest" in said(rising[:2])[1]
    assert "More rounds may help" in said(rising[:2], total=2)[1]
    assert "More rounds" not in said(rising[:2])[1]
    assert "`--holdout_fraction 0.1 --stop_when auto`" in said([line(1)])[1]
    assert "not been looked at yet" in said([line(1)], watches=True)[1]


def test_skipping_is_told_with_the_noise_that_it_is_most_frequent_at():
    assert said([line(1)])[2] == "Nothing has been skipped so far."
    assert said([line(1)], doubt="AGC can hardly skip anything.")[2].endswith("so far. AGC can hardly skip anything.")
    little = [0.3, 0.3, 0.3, *[None] * 3, 0.0, *[0.1] * 3]
    assert said([line(1, skip=0.125, levels=little)])[2].startswith("12.5% of the samples of the last round")
    assert said([line(1, skip=0.125, levels=little)])[2].endswith("most of them with little noise.")
    assert said([line(1, skip=0.1, levels=little[::-1])])[2].endswith("with much noise.")
    assert said([line(1, skip=0.1), line(2)])[2] == "Nothing was skipped in the last round."


def test_durations_are_told_as_people_tell_them():
    assert [in_words(seconds) for seconds in (0.2, 40, 89, 90, 420, 5399, 7500)] == [
        "1 s", "40 s", "89 s", "2 min", "7 min", "1 h 30 min", "2 h 5 min",
    ]  # fmt: skip


def test_four_numbers_are_shown_the_time_left_among_them():
    lines = [line(1, heldout=-1.0)]
    assert [title for title, _ in tiles([], facts(0, 3), None)] == ["Rounds done"]
    assert [title for title, _ in tiles(lines, facts(1, 3), 60.0)][-1] == "Time left"
    assert len(tiles(lines, facts(1, 3), 60.0)) == 4
    assert len(tiles(lines, facts(3, 3), None)) == 4


def test_a_curve_is_broken_where_there_is_no_value():
    lines = [line(1, heldout=-1.0), line(2), line(3, heldout=-2.0), line(4, heldout=-1.5)]
    drawn = next(str(each["svg"]) for each in charts(lines) if each["title"] == "Held-out loss")
    assert drawn.count('class="series-1 dot"') == 1
    assert drawn.count('class="series-1 outline"') == 1
    assert "from -1 to -1.5" in drawn


def test_small_numbers_fit_beside_an_axis():
    rates = [{**line(number), "lr": [1e-4]} for number in (1, 2)]
    drawn = next(str(each["svg"]) for each in charts(rates) if each["title"] == "Learning rate")
    assert ">1.05e-4<" in drawn
    assert ">9.50e-5<" in drawn


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_in_a_browser_it_is_whole_quiet_legible_and_no_wider_than_the_screen(browser, written, screen, scheme):
    output, _ = written
    with Opened(browser, output / "run.html", SCREENS[screen], scheme) as opened:
        page = opened.page
        loaded = page.evaluate("[...document.images].map(each => each.complete && each.naturalWidth > 0)")
        assert len(loaded) > 6
        assert all(loaded)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("document.scripts.length") == 0
        assert page.title() == "Training of my model"
        assert HOSTILE in page.evaluate("[...document.querySelectorAll('bdi')].map(each => each.textContent)")
        assert [each for each in page.evaluate(CONTRASTS) if each[0] < 4.5] == []
        assert opened.said == []
        assert [url for url in opened.requests if not url.startswith("data:")] == [(output / "run.html").as_uri()]


def test_many_rounds_show_the_first_and_last_images_and_some_between(world, tmp_path):
    trainer = Trainer(config(world, tmp_path / "out", num_train_epochs=12, stop_when="end"))
    trainer.train()
    page = (tmp_path / "out" / "run.html").read_text()
    titles = re.findall(r'alt="Validation images (.*?)"', page)
    assert len(titles) == 8
    assert (titles[0], titles[-1]) == ("before training", "after round 12")
