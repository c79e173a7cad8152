"""Folders of images as people keep them: what is trained on, and what is said of the rest."""

import json
import unicodedata

import datasets
import numpy as np
import PIL.Image
import pytest
from data.made import load_all, png, refusal, write_folder, write_rows

BALLS = ["a red ball", "a green ball", "a blue ball", "a grey ball", "a pink ball", "a white ball"]


def pictures(folder, count=4, suffix=".png"):
    return write_folder(folder, {f"{i}{suffix}": i for i in range(count)})


def texts(folder, count, suffix=".txt", text="{}\n"):
    for i in range(count):
        (folder / f"{i}{suffix}").write_text(text.format(BALLS[i]), encoding="utf-8")
    return folder


def table(folder, text, encoding="utf-8", name="metadata.csv"):
    (pictures(folder) / name).write_bytes(text.encode(encoding))
    return folder


def jsonl(folder, captions, name="metadata.jsonl", **columns):
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(captions)]
    for column, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[column] = value
    write_rows(pictures(folder, len(captions)) / name, rows)
    return folder


def trained_on(folder, **flags):
    """The captions of the images by their number, after looking at the pixels."""
    images = load_all(folder, **flags)
    found = {}
    for index in range(len(images)):
        number = images.load(index).getpixel((0, 0))[0]
        found.setdefault(number, []).append(images.captions[index])
    return found, images


def assert_balls(folder, count=4, **flags):
    found, _ = trained_on(folder, **flags)
    assert found == {i: [(BALLS[i],)] for i in range(count)}


# Captions in text files, in folders' names, by default


@pytest.mark.parametrize(
    ("suffix", "image"), [(".txt", ".png"), (".caption", ".png"), (".TXT", ".png"), (".txt", ".jpg")]
)
def test_a_text_file_beside_an_image_is_its_caption(tmp_path, suffix, image):
    pictures(tmp_path, 6)
    if image == ".jpg":
        for path in tmp_path.glob("*.png"):
            path.rename(path.with_suffix(image))  # Pillow goes by the content
    assert_balls(texts(tmp_path, 6, suffix), 6)
    assert_balls(None, 6, dataset_name=str(tmp_path))


def test_each_line_of_a_text_file_is_a_caption(tmp_path):
    texts(pictures(tmp_path, 3), 3, text="{}\n\n  another view of it \n")
    found, _ = trained_on(tmp_path)
    assert found == {i: [(BALLS[i], "another view of it")] for i in range(3)}


def test_images_without_a_text_file_are_named_and_take_the_default_caption(tmp_path):
    texts(pictures(tmp_path, 6), 4)
    assert "2 images have no caption (`4.png`, `5.png`)" in refusal(tmp_path)
    found, images = trained_on(tmp_path, default_caption="a ball")
    assert found == {i: [(BALLS[i] if i < 4 else "a ball",)] for i in range(6)}
    assert "captions: 4 in text files, 2 by default" in images.notes


def test_folders_named_as_for_kohya_repeat_their_images_if_that_is_asked_for(tmp_path):
    texts(pictures(tmp_path / "10_sks ball", 6), 3)
    assert "3 images have no caption" in refusal(tmp_path)
    found, images = trained_on(tmp_path, caption_from="folder")
    assert found == {i: [(BALLS[i] if i < 3 else "sks ball",)] * 10 for i in range(6)}
    assert "each image of `10_sks ball` is in the data 10 times, as the folder's name says" in images.notes
    found, images = trained_on(tmp_path, default_caption="x")
    assert all(len(captions) == 1 for captions in found.values())
    assert any(
        "`--caption_from folder` would repeat each image of `10_sks ball` 10 times" in note for note in images.notes
    )


def test_images_alone_take_the_default_caption_or_their_folders_names(tmp_path):
    for kind in ("cats", "dogs"):
        pictures(tmp_path / kind, 3)
    assert "`--default_caption TEXT` or `--caption_from folder`" in refusal(tmp_path)
    assert load_all(tmp_path, needs_captions=False).captions == (("",),) * 6
    assert load_all(tmp_path, default_caption="pets").captions == (("pets",),) * 6
    assert load_all(tmp_path, caption_from="folder").captions == (("cats",),) * 3 + (("dogs",),) * 3


def test_a_default_caption_fills_blank_ones_and_no_others(tmp_path):
    jsonl(tmp_path / "rows", ["", "two", None, " "])
    assert load_all(tmp_path / "rows", default_caption="x").captions == (("x",), ("two",), ("x",), ("x",))
    texts(pictures(tmp_path / "texts", 2), 2, text="\n")
    assert load_all(tmp_path / "texts").captions == (("",), ("",))
    assert load_all(tmp_path / "texts", default_caption="x").captions == (("x",), ("x",))


def test_a_table_and_a_text_file_that_differ_are_named(tmp_path):
    texts(jsonl(tmp_path, BALLS[:4]), 4)
    assert_balls(tmp_path)
    (tmp_path / "2.txt").write_text("a cube")
    message = refusal(tmp_path)
    assert "1 image has different captions in two places (`2.png`: line 3 of `metadata.jsonl` and `2.txt`)" in message


# Tables


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("captions.csv", "image, caption\n" + "".join(f"{i}.png, {BALLS[i]}\n" for i in range(4)), "utf-8"),
        ("captions.csv", "filename;prompt\n" + "".join(f'{i}.png;"{BALLS[i]}"\n' for i in range(4)), "utf-8"),
        ("metadata.csv", "file_name;text\n" + "".join(f"{i}.png;{BALLS[i]}\n" for i in range(4)), "utf-8"),
        ("metadata.csv", "file_name|text\r\n" + "".join(f"{i}.png|{BALLS[i]}\r\n" for i in range(4)), "utf-8-sig"),
        ("metadata.csv", "file_name,text\n" + "".join(f"{i}.png,{BALLS[i]}\n" for i in range(4)), "utf-16"),
        ("metadata.csv", "file_name, text\n" + "".join(f"{i}.png, {BALLS[i]}\n" for i in range(4)), "utf-8"),
        ("metadata.tsv", "text\tfile_name\n" + "".join(f"{BALLS[i]}\t{i}.png\n" for i in range(4)), "utf-8"),
        ("metadata.csv", "file_name,text\n" + "\n".join(f'"{i}.png","{BALLS[i]}"' for i in range(4)), "utf-8"),
        ("captions.json", json.dumps({f"{i}.png": BALLS[i] for i in range(4)}), "utf-8"),
        ("metadata.json", json.dumps({f"{i}.png": {"caption": BALLS[i], "tags": "x"} for i in range(4)}), "utf-8"),
        (
            "metadata.json",
            json.dumps([{"file_name": f"{i}.png", "text": BALLS[i]} for i in range(4)], indent=1),
            "utf-8",
        ),
        (
            "captions.jsonl",
            "".join(f'{{"image": "{i}.png", "caption": "{BALLS[i]}"}}\n\n' for i in range(4)),
            "utf-16",
        ),
        (
            "metadata.jsonl",
            "".join(f'{{"file_name": ".\\\\{i}.png", "text": "{BALLS[i]}"}}\n' for i in range(4)),
            "utf-8",
        ),
    ],
)
def test_tables_of_other_names_and_forms_are_read(tmp_path, name, text, encoding):
    folder = table(tmp_path, text.replace(".\\\\", "sub\\\\") if "sub" in text else text, encoding, name)
    assert_balls(folder)
    assert_balls(None, dataset_name=str(folder))


@pytest.mark.parametrize("caption", ["NA", "None", "null", "007", "7", "1e5", "2024-01-01", "true", "nan", "", " x "])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_captions_are_the_text_that_stands_in_the_file(tmp_path, caption, kind):
    folder = pictures(tmp_path, 2)
    if kind == "csv":
        (folder / "metadata.csv").write_text(f'file_name,text\n0.png,"{caption}"\n1.png,"{caption}"\n', newline="")
    elif kind == "jsonl":
        jsonl(folder, [caption, caption])
    else:
        datasets.Dataset.from_dict({"file_name": ["0.png", "1.png"], "text": [caption] * 2}).to_parquet(
            folder / "metadata.parquet"
        )
    assert load_all(folder).captions == ((caption,),) * 2


@pytest.mark.parametrize(
    ("value", "text"), [("7", "7"), ("1.50", "1.50"), ("true", "true"), ("NaN", "NaN"), ("-0", "0")]
)
def test_numbers_in_json_are_texts_as_they_are_written(tmp_path, value, text):
    write_folder(tmp_path, {"0.png": 0})
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "text": {value}}}\n')
    assert load_all(tmp_path).captions == ((text,),)


def test_classes_of_a_csv_are_numbers_if_all_are_and_else_texts(tmp_path):
    for name, column in {"numbers": "0,10,2,2", "texts": "007,10,2,NA"}.items():
        rows = "".join(f"{i}.png,x,{value}\n" for i, value in enumerate(column.split(",")))
        table(tmp_path / name, "file_name,text,kind\n" + rows)
    assert load_all(tmp_path / "numbers", class_column="kind").classes == (0, 10, 2, 2)
    texts_ = load_all(tmp_path / "texts", class_column="kind")
    assert texts_.class_names == ("007", "10", "2", "NA")
    assert texts_.classes == (0, 1, 2, 3)


def test_a_column_that_nobody_asked_for_may_hold_anything(tmp_path):
    jsonl(tmp_path, BALLS[:4], score=[1, "high", None, {}], date=["2024-01-01", 7, [1], ""])
    assert_balls(tmp_path)
    table(
        tmp_path / "csv", "file_name,text,notes\n" + "".join(f"{i}.png,{BALLS[i]},{'x' * 200_000}\n" for i in range(4))
    )
    assert_balls(tmp_path / "csv")


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        ("file_name,text\n0.png,ball\n1.png,café\n", "latin-1", "line 3 has the byte 0xe9, which is not UTF-8"),
        ("file_name,text\n0.png,ball\n", "utf-16-le", "it has zero bytes, as UTF-16 without a byte-order mark has"),
        (
            "0.png,a red ball\n1.png,a green ball\n",
            "utf-8",
            "has no column `file_name`, which names the images; it has:",
        ),
        (
            "file_name,text\n0.png,red, round\n1.png,green\n",
            "utf-8",
            "line 2 of `metadata.csv` has 3 fields instead of 2",
        ),
        (
            "file_name:text\n0.png:ball\n",
            "utf-8",
            "has no column `file_name`, which names the images; it has: file_name:",
        ),
        ("file_name,titel\n0.png,ball\n", "utf-8", "`--caption_column text` is no column of"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, text, encoding, message):
    assert message in refusal(table(tmp_path, text, encoding))


def test_tables_of_names_that_are_not_looked_for_are_hinted_at(tmp_path):
    table(tmp_path, "image,caption\n0.png,x\n", name="labels.csv")
    message = refusal(tmp_path)
    assert "4 images have no caption" in message
    assert (
        "in labels.csv (columns image, caption): call it metadata.csv, with the columns file_name and text" in message
    )


# Which file a row is of


def test_names_that_begin_with_the_folder_itself_are_found(tmp_path):
    folder = pictures(tmp_path / "train")
    write_rows(folder / "metadata.jsonl", [{"file_name": f"train/{i}.png", "text": BALLS[i]} for i in range(4)])
    assert_balls(tmp_path)
    assert_balls(folder)


@pytest.mark.parametrize(("on_disk", "in_row"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_may_differ_in_their_unicode_form(tmp_path, on_disk, in_row):
    name = "café ṩ.png"
    write_folder(tmp_path, {unicodedata.normalize(on_disk, name): 0, "b.png": 1})
    rows = [{"file_name": unicodedata.normalize(in_row, name), "text": "coffee"}, {"file_name": "b.png", "text": "b"}]
    write_rows(tmp_path / "metadata.jsonl", rows)
    assert trained_on(tmp_path)[0] == {0: [("coffee",)], 1: [("b",)]}
    (tmp_path / "metadata.jsonl").unlink()
    for row in rows:
        (tmp_path / row["file_name"]).with_suffix(".txt").write_text(row["text"])
    assert trained_on(tmp_path)[0] == {0: [("coffee",)], 1: [("b",)]}


def test_rows_may_name_images_elsewhere(tmp_path):
    pictures(tmp_path / "images")
    rows = [{"file_name": f"../images/{i}.png", "text": BALLS[i]} for i in range(4)]
    write_rows(tmp_path / "captions" / "metadata.jsonl", rows)
    assert_balls(tmp_path)


def test_a_missing_file_shows_the_one_of_the_same_name(tmp_path):
    write_folder(
        tmp_path,
        {"sub/A.PNG": 1, "b.png": 2},
        [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b"}],
    )
    assert "`a.png` in line 1 of `metadata.jsonl` (there is `sub/A.PNG`)" in refusal(tmp_path)


def test_links_and_loops_count_an_image_once(tmp_path):
    texts(pictures(tmp_path / "real"), 4)
    (tmp_path / "again").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "real" / "9.png").symlink_to("0.png")
    assert_balls(tmp_path / "real")
    found, images = trained_on(tmp_path)
    assert found == {i: [(BALLS[i],)] for i in range(4)}
    assert "1 links lead to images that are there by another name, and count once" in images.notes


def test_two_tables_count_an_image_once_and_may_not_contradict_each_other(tmp_path):
    jsonl(tmp_path, BALLS[:4])
    rows = "".join(f"{i}.png,{BALLS[i]}\n" for i in range(4))
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + rows)
    assert_balls(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + rows.replace("a blue", "a dark"))
    message = refusal(tmp_path)
    assert (
        "1 image has different captions in two places (`2.png`: `2.png` in `metadata.csv` and `2.png` in `meta"
        in message
    )


# Which files are images


def test_pictures_of_every_format_need_captions_like_all_others(tmp_path):
    jsonl(tmp_path, BALLS[:4])
    for i in range(4, 8):
        PIL.Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.avif", quality=100)
    assert "4 images have no caption (`4.avif`, `5.avif`, `6.avif`, `7.avif`)" in refusal(tmp_path)
    assert len(load_all(tmp_path, default_caption="x")) == 8


def test_a_picture_whose_name_does_not_say_so_is_one(tmp_path):
    jsonl(tmp_path, BALLS[:2])
    (tmp_path / "photo").write_bytes(png(7))
    (tmp_path / "photo.jpg_large").write_bytes(png(8))
    assert "2 images have no caption (`photo`, `photo.jpg_large`)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "words"),
    [(".cr2", "Pillow does not read .cr2"), (".jxl", "Pillow reads .jxl with `pip install pillow-jxl-plugin`")],
)
def test_a_picture_that_needs_a_plug_in_is_named(tmp_path, suffix, words):
    jsonl(tmp_path, BALLS[:2])
    (tmp_path / f"raw{suffix}").write_bytes(b"raw" * 100)
    message = refusal(tmp_path, default_caption="x")
    assert f"1 image cannot be read (`raw{suffix}`: {words}" in message
    images = load_all(tmp_path, default_caption="x", skip_bad_images=True)
    assert len(images) == 2
    assert images.unreadable[0][0] == f"{tmp_path}/raw{suffix}"


def test_other_files_are_counted(tmp_path):
    jsonl(tmp_path, BALLS[:2])
    for name in ("clip.mp4", "more.mp4", "notes.md", "README.txt"):
        (tmp_path / name).write_text("x")
    assert load_all(tmp_path).notes == (
        "1 text files are not called like an image, and are not read",
        "files that are neither images nor captions: 2 .mp4, 1 .md",
    )


def test_images_that_cannot_be_read_are_all_named_or_left_out(tmp_path):
    jsonl(tmp_path, BALLS[:4])
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "2.png").write_text("<html>404</html>")
    message = refusal(tmp_path)
    assert "2 images cannot be read (`1.png` " in message
    assert ", `2.png` " in message
    assert message.endswith("or leave them out with `--skip_bad_images`.")
    found, images = trained_on(tmp_path, skip_bad_images=True)
    assert found == {i: [(BALLS[i],)] for i in (0, 3)}
    assert [name for name, _ in images.unreadable] == [f"{tmp_path}/1.png", f"{tmp_path}/2.png"]


def test_half_a_picture_is_found_before_training(tmp_path):
    jsonl(tmp_path, BALLS[:4])
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    for name in ("2.png", "3.jpg"):
        PIL.Image.fromarray(noise).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[: (tmp_path / name).stat().st_size // 2])
    message = refusal(tmp_path, default_caption="x")
    assert "2 images cannot be read (`2.png` " in message
    assert "`3.jpg` " in message


def test_every_fault_is_told_at_once_and_no_more_than_ten_of_a_kind(tmp_path):
    write_folder(tmp_path, {f"{i:02}.png": i for i in range(20)})
    write_rows(tmp_path / "metadata.jsonl", [{"file_name": f"{i:02}.png", "text": "x"} for i in (*range(5), 30)])
    (tmp_path / "03.png").write_bytes(b"")
    message = refusal(tmp_path)
    assert "1 row names a file that is not there (`30.png` in line 6 of `metadata.jsonl`)" in message
    assert "15 images have no caption (`05.png`, " in message
    assert "`14.png`, and 5 more)" in message
    assert "1 image cannot be read (`03.png` " in message


def test_nothing_but_bad_images_is_an_error_even_if_they_may_be_left_out(tmp_path):
    write_folder(tmp_path, {})
    (tmp_path / "a.png").write_bytes(b"")
    assert "none of the 1 images can be read" in refusal(tmp_path, skip_bad_images=True, default_caption="x")
