"""The report: complete in one file, safe whatever captions hold, and fit to be read in a real browser.

What the browser shows is kept in the folder AUDIT_SCREENSHOTS, if that is set.
"""

import base64
import io
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from audit_samples import HOSTILE, even, sample_audit, sample_images, sample_json, sample_pairs
from browser import CONTRASTS, SCREENS, Opened
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iet_finetune.audit.measures.metrics import Metric
from iet_finetune.audit.report.charts import histogram_chart, interval_mark, level_chart
from iet_finetune.audit.report.compare import compare, write_comparison
from iet_finetune.audit.report.comparison import Comparison
from iet_finetune.audit.report.record import AuditRecord
from iet_finetune.audit.report.report import (
    FIRST_PAIRS,
    report_page,
    write_report,
)
from iet_finetune.pages.page import LARGEST, LOCAL_BEGINS, LOCAL_ENDS, embedded

COMMAND = "iet-finetune audit --model emoji-sd-iet --train_data_dir emoji --holdout_data_dir emoji-heldout"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.pieces))

    def attributes(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def page_of(audit=None, pairs=(), folder=None, images_of=sample_images, command=COMMAND) -> Page:
    written = write_report(folder, audit or sample_audit(), list(pairs), images_of, command)
    return Page(written.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Page:
    return page_of(pairs=sample_pairs(), folder=tmp_path_factory.mktemp("report"))


def test_the_report_is_one_file(tmp_path):
    path = write_report(tmp_path / "audit", sample_audit(), sample_pairs(2), sample_images)
    assert path == tmp_path / "audit" / "report.html"
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]


def test_the_same_audit_gives_the_same_report(tmp_path):
    paths = [write_report(tmp_path / name, sample_audit(), sample_pairs(2), sample_images) for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_parts_come_in_the_order_in_which_they_are_read(whole):
    titles = (
        "emoji-sd-iet",
        "The model repeats training images.",
        "Metrics",
        "By how often an image is in the training data",
        "Distributions",
        "The closest pairs",
        "Warnings",
        "Not measured",
        "How to reproduce this",
    )
    places = [whole.text.index(title) for title in titles[1:]]
    assert places == sorted(places)
    assert "25 November 2026" in whole.text


def test_every_metric_is_shown_with_interval_and_baseline(whole):
    for words in ("2.3 %", "1.5 to 3.4", "23 of 1,000", "FD-EffNetLite0", "31.42", "29.22 to 33.62", "0.842"):
        assert words in whole.text, words
    for words in ("MQ at 0.15", "MQ at 0.6", "Recall (EffNetLite0)", "Loss on held-out images"):
        assert words in whole.text, words


def test_a_pair_is_shown_with_all_that_is_known_about_it(whole):
    for words in (
        "ratio0.080",
        "rms distance0.0200",
        "mirroredyes",
        "in the data15 times",
        "similarity (effnet_lite0)",
    ):
        assert words.replace(" ", "") in whole.text.replace(" ", ""), words
    assert "seen 240 times, skipped 31 times" in whole.text
    assert "a red heart with an arrow" in whole.text
    assert "without a caption" in whole.text
    assert "without a prompt" in whole.text


def test_how_to_do_it_again_is_told(whole):
    for words in ("iet-finetune audit --model emoji-sd-iet", "--num_inference_steps 50", "torch 2.13.0"):
        assert words in whole.text, words
    for words in ("5f1d0c77a1be9e02", "0badc0ffee123456", "--sampling_guidance_scale not set"):
        assert words in whole.text, words


def test_what_names_files_and_folders_can_be_taken_out_whatever_captions_hold(tmp_path):
    hostile = {"prompt": f"{LOCAL_ENDS} {LOCAL_BEGINS}", "training_name": "/home/me/000.png"}
    pair, tiny = replace(sample_pairs(1)[0], **hostile), Image.new("RGB", (2, 2))
    command = "iet-finetune audit --model /home/me/model"
    path = write_report(tmp_path, sample_audit(), [pair], lambda pair: (tiny, tiny), command)
    written = path.read_text(encoding="utf-8")
    rest = Page(re.sub(f"{LOCAL_BEGINS}.*?{LOCAL_ENDS}", "", written, flags=re.DOTALL))
    assert "/home/me/000.png" in Page(written).text
    assert "/home/me/model" in Page(written).text
    assert "/home/me" not in rest.text
    assert "samples/" not in rest.text
    for words in (f"{LOCAL_ENDS} {LOCAL_BEGINS}", "rms distance", "--num_inference_steps", "Versions"):
        assert words in rest.text, words


def test_nothing_is_fetched_and_nothing_is_run(whole):
    sources = whole.attributes("src")
    assert len(sources) == 2 * len(sample_pairs())
    assert all(source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for source in sources)
    assert not whole.attributes("href")
    assert not {tag for tag, _ in whole.tags} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    policy = next(each["content"] for tag, each in whole.tags if tag == "meta" and "http-equiv" in each)
    assert policy.startswith("default-src 'none'")


def test_each_image_has_words_for_those_who_do_not_see_it(whole):
    words = [each.get("alt") for tag, each in whole.tags if tag == "img"]
    assert all(words)
    assert len(set(words)) == len(words)


def test_each_chart_has_a_title_and_a_description_of_its_own(whole):
    charts = [each for tag, each in whole.tags if tag == "svg" and each.get("role") == "img"]
    assert len(charts) == len(sample_audit().histograms) + 1
    identities = whole.attributes("id")
    assert len(set(identities)) == len(identities)
    for each in charts:
        assert set(each["aria-labelledby"].split()) <= set(identities)


def test_pairs_beyond_the_first_are_folded_away(tmp_path):
    many = page_of(pairs=sample_pairs(FIRST_PAIRS + 3), folder=tmp_path)
    assert "3 more pairs" in many.text
    assert sum(tag == "img" for tag, _ in many.tags) == 2 * (FIRST_PAIRS + 3)


def test_an_audit_with_next_to_nothing_in_it_still_makes_a_report(tmp_path):
    little = page_of(AuditRecord(), folder=tmp_path, command=None)
    assert "Memorization was not measured." in little.text
    assert "No metric was measured." in little.text
    assert "Distributions" not in little.text


def test_a_metric_that_the_catalogue_does_not_know_is_shown_by_its_name(tmp_path):
    page = page_of(sample_audit(metrics={"unheard_of": even(1.5, 0.5)}), folder=tmp_path)
    assert "unheard_of" in page.text
    assert "1.500" in page.text


def test_small_images_are_kept_to_the_pixel_and_large_ones_are_made_smaller():
    small, large = (Image.effect_noise((side, side // 2), 60) for side in (64, 1000))
    kept, reduced = embedded(small), embedded(large)
    shown = Image.open(io.BytesIO(base64.b64decode(kept["uri"].split(",")[1])))
    assert kept["small"]
    assert np.array_equal(np.asarray(shown), np.asarray(small.convert("RGB")))
    assert not reduced["small"]
    assert (reduced["width"], reduced["height"]) == (LARGEST, LARGEST // 2)
    assert reduced["uri"].startswith("data:image/jpeg")


BASELINE = {"html", "head", "meta", "title", "style", "body", "main", "header", "section", "article", "details"}
KNOWN = BASELINE | {
    *("p", "h1", "h2", "h3", "ul", "li", "span", "dl", "div", "dt", "dd", "small", "br", "strong", "b", "bdi", "code"),
    *("pre", "table", "colgroup", "col", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "img", "summary"),
    *("svg", "desc", "line", "path", "text", "circle"),
}
JSON_TEXT = st.one_of(
    st.text(st.characters(codec=None), max_size=60), st.just(HOSTILE), st.from_regex(r"[<>&\"'`/a-z ]+")
)


@settings(max_examples=40)
@given(texts=st.lists(JSON_TEXT, min_size=12, max_size=12))
def test_no_text_of_an_audit_ever_becomes_a_tag_or_an_attribute(texts, tmp_path_factory):
    names = iter(texts)
    hostile = ("prompt", "training_caption", "training_name", "generated")
    pair = replace(sample_pairs(1)[0], **{name: next(names) for name in hostile})
    audit = sample_audit(
        model=next(names),
        pipeline_class=next(names),
        date=next(names),
        warnings=[next(names)],
        settings={next(names): next(names)},
        not_measured={"f_mem": next(names)},
        features=[{"slug": "effnet_lite0", "title": texts[0], "fingerprint": texts[1]}],
        versions={texts[2]: texts[3]},
    )
    tiny = Image.new("RGB", (2, 2))
    folder, command = tmp_path_factory.mktemp("report"), next(names)
    page = page_of(audit, [pair], folder, lambda pair: (tiny, tiny), command)
    assert {tag for tag, _ in page.tags} <= KNOWN
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not page.attributes("href")
    assert len(page.attributes("src")) == 2
    assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_a_hostile_caption_is_shown_as_the_text_that_it_is(whole):
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in whole.text
    assert "{{ 7*7 }}" in whole.text


def test_a_lone_surrogate_in_a_caption_does_not_stop_the_report(tmp_path):
    pair = replace(sample_pairs(1)[0], prompt="half \ud83d of it")
    assert "half ? of it" in page_of(pairs=[pair], folder=tmp_path).text


def test_bars_of_a_histogram_are_shares_of_their_own_series():
    edges, counts = [0.0, 0.5, 1.0], [30, 10]
    one = histogram_chart("t", edges, [("few", counts), ("many", [300, 100])], "x")
    paths = re.findall(r' d="([^"]+)"', str(one))
    assert len(paths) == 2
    assert paths[0] == paths[1]


def test_a_square_root_scale_makes_a_share_of_a_quarter_half_as_high():
    def heights(root):
        chart = str(histogram_chart("t", [0.0, 1.0, 2.0], [("a", [80, 20])], "x", root=root))
        path = re.findall(r' d="M\S+ (\S+?)L\S+ (\S+?)H\S+?L\S+ (\S+?)H', chart)[0]
        base, first, second = map(float, path)
        return (base - second) / (base - first)

    assert heights(False) == pytest.approx(0.25, abs=0.01)
    assert heights(True) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("counts", [[0, 0], [0, 5], [1, 0]])
def test_a_histogram_of_nothing_or_little_is_drawn_all_the_same(counts):
    chart = str(histogram_chart("t", [0.0, 0.5, 1.0], [("a", counts), ("b", [0, 0])], "x", (0.4, "here")))
    assert "nan" not in chart
    assert "here" in chart


def test_one_noise_level_alone_and_a_missing_one_are_drawn():
    point = Metric(0.6, 0.5, 0.7)
    one = str(level_chart("t", [0.1], [("a", [point])]))
    assert one.count("<circle") == 1
    two = str(level_chart("t", [0.1, 0.2], [("a", [point, None]), ("b", [None, point])]))
    assert two.count("<circle") == 2


def test_a_mark_puts_value_interval_and_baseline_in_their_places():
    mark = str(interval_mark(Metric(0.5, 0.25, 0.75, 0.0), 0.0, 1.0))
    assert 'cx="60.0"' in mark
    assert 'x1="32.0" x2="88.0"' in mark
    assert 'class="baseline" x1="4.0"' in mark
    assert "baseline" not in str(interval_mark(Metric(0.5, 0.4, 0.6), 0.0, 1.0))


# The same in a real browser.


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A report and a comparison, written once."""
    folder = tmp_path_factory.mktemp("pages")

    def images_of(pair):
        return sample_images(pair, 64 if pair.training_name < "008" else 512)

    report = write_report(folder, sample_audit(), sample_pairs(), images_of, COMMAND)
    return {"report": report, "compare": write_comparison(folder, three_audits(folder))}


def three_audits(folder: Path) -> Comparison:
    files = [folder / f"{name}.json" for name in ("plain", "iet", "agc")]
    for number, file in enumerate(files):
        few = sample_json()["data"] | {"generated_images": 1000 - 100 * number}
        metrics = sample_json()["metrics"] | {"mia_auc": even(0.9 - 0.2 * number, 0.05, 0.5)}
        file.write_text(json.dumps(sample_json(model=file.stem, data=few, metrics=metrics)), encoding="utf-8")
    return compare(files)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_page_is_whole_quiet_and_no_wider_than_the_screen(browser, pages, tmp_path, name, screen, scheme):
    with Opened(browser, pages[name], SCREENS[screen], scheme) as opened:
        page = opened.page
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        loaded = page.evaluate("[...document.images].map(each => each.complete && each.naturalWidth > 0)")
        assert len(loaded) == (2 * len(sample_pairs()) if name == "report" else 0)
        assert all(loaded)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        shots = Path(os.environ.get("AUDIT_SCREENSHOTS") or tmp_path)
        shots.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=shots / f"{name}-{screen}-{scheme}.png", full_page=True)
        assert opened.said == []
        assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []
        assert len([url for url in opened.requests if url.startswith("file:")]) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "compare"])
def test_all_text_stands_out_from_its_ground(browser, pages, name, scheme):
    with Opened(browser, pages[name], SCREENS["desktop"], scheme) as opened:
        found = opened.page.evaluate(CONTRASTS)
        assert len(found) > 100
        assert [each for each in found if each[0] < 4.5] == []


def test_the_browser_uses_the_colours_that_the_reader_asks_for(browser, pages):
    grounds = []
    for scheme in ("light", "dark"):
        with Opened(browser, pages["report"], SCREENS["desktop"], scheme) as opened:
            grounds.append(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(253, 253, 252)", "rgb(20, 22, 25)"]


def test_a_hostile_caption_runs_nothing_in_the_browser(browser, pages):
    with Opened(browser, pages["report"], SCREENS["desktop"], "light") as opened:
        page = opened.page
        page.wait_for_timeout(200)
        assert page.evaluate("document.scripts.length") == 0
        assert page.evaluate("document.querySelectorAll('[onerror]').length") == 0
        shown = page.evaluate("[...document.querySelectorAll('bdi')].map(each => each.textContent)")
        assert HOSTILE.replace("\x00", "") in shown
        assert opened.said == []


def test_small_images_are_enlarged_pixel_by_pixel_and_large_ones_smoothly(browser, pages):
    with Opened(browser, pages["report"], SCREENS["desktop"], "light") as opened:
        drawn = opened.page.evaluate(
            "[...document.images].map(each => [each.naturalWidth, getComputedStyle(each).imageRendering])"
        )
    assert {tuple(each) for each in drawn} == {(64, "pixelated"), (LARGEST, "auto")}


def test_tables_are_stacked_on_a_phone_with_the_names_of_their_columns(browser, pages):
    with Opened(browser, pages["report"], SCREENS["phone"], "light") as opened:
        assert opened.page.evaluate("getComputedStyle(document.querySelector('.metrics thead')).display") == "none"
        label = "getComputedStyle(document.querySelector('.metrics td[data-label]'), '::before').content"
        assert opened.page.evaluate(label) == '"Value"'


def test_printed_the_report_is_black_on_white_with_nothing_folded_away(browser, pages):
    with Opened(browser, pages["report"], SCREENS["desktop"], "dark") as opened:
        opened.page.emulate_media(media="print", color_scheme="dark")
        colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        assert opened.page.evaluate(colours) == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
        heights = "[...document.querySelectorAll('details > :not(summary)')].map(each => each.offsetHeight)"
        assert all(height > 0 for height in opened.page.evaluate(heights))


def test_the_page_can_be_made_without_a_folder():
    assert report_page(sample_audit()).startswith("<!doctype html>")
