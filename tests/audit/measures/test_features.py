"""Features are the networks' own, of each image by itself, and know what they were made with."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer, Repository
from PIL import Image
from publish.test_hub import TOKEN, run_python
from transformers import AutoImageProcessor, BertConfig, BertModel, CLIPModel, Dinov2Model, ViTModel
from vision import SMALL, noise, save_clip, save_dinov2, save_processor, save_torchscript, save_vit

from iet_finetune.audit.measures.features import (
    BATCH_SIZE,
    DEFAULT_FEATURES,
    EfficientNetLite0,
    Features,
    TorchScriptFeatures,
    TransformersFeatures,
    load_features,
    slug_of,
)
from iet_finetune.audit.measures.preferred import PREFERRED
from iet_finetune.errors import UserError
from iet_finetune.families.quiet import quiet_loading

CPU = torch.device("cpu")
EMOJI = Path(__file__).parents[3] / "demo" / "data" / "heldout"


@pytest.fixture(scope="module")
def effnet() -> Features:
    return load_features(DEFAULT_FEATURES[0], CPU)


@pytest.fixture(autouse=True)
def silence():
    """Models are saved without progress bars."""
    with quiet_loading():
        yield


class Averages(torch.nn.Module):
    """Six features: the averages of the left and right half of each colour."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, images):
        return self.factor * torch.cat([images[..., :144].mean((2, 3)), images[..., 144:].mean((2, 3))], dim=1)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def prepared(images: np.ndarray, size: int) -> torch.Tensor:
    """What `save_processor` says, done with Pillow."""
    resized = [np.asarray(Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC)) for each in images]
    return (torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25


def refusal(spec: object) -> str:
    """The one line with which these features are refused."""
    with pytest.raises(UserError) as caught:
        load_features(str(spec), CPU)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"`--features {spec}`")
    return text


# EfficientNet-Lite0


def test_the_default_features_are_those_of_the_packaged_network(effnet):
    assert isinstance(effnet, EfficientNetLite0)
    features = effnet(noise(2))
    assert features.shape == (2, effnet.dimensions) == (2, 1280)
    assert features.dtype == np.float32
    assert (features >= 0).all()  # the average of ReLU6
    assert features.std() > 0.01


def test_two_crops_of_a_image_are_more_alike_than_two_images(effnet):
    names = sorted(EMOJI.glob("*.png"))[:4]
    images = [np.asarray(Image.open(name).convert("RGB").resize((72, 72))) for name in names]
    crops = effnet(np.stack([crop for each in images for crop in (each[:66, :66], each[6:, 6:])]))
    for i in range(len(images)):
        others = [cosine(crops[2 * i], crops[2 * j]) for j in range(len(images)) if j != i]
        assert cosine(crops[2 * i], crops[2 * i + 1]) > max(others)


def test_an_image_has_the_same_bits_in_any_batch_and_place(effnet):
    images = noise(BATCH_SIZE + 2, seed=1)
    together = effnet(images)
    np.testing.assert_array_equal(effnet(images[3:4])[0], together[3])
    np.testing.assert_array_equal(effnet(images[::-1])[::-1], together)


def test_a_mirrored_memory_map_has_the_features_of_its_images(effnet, tmp_path):
    images = noise(2)
    stored = np.memmap(tmp_path / "images", np.uint8, "w+", shape=images.shape)
    stored[:] = images[:, :, ::-1]
    np.testing.assert_array_equal(effnet(stored[:, :, ::-1]), effnet(images))


def test_no_images_have_no_features(effnet):
    assert effnet(noise(0)).shape == (0, 1280)


@pytest.mark.parametrize("images", [noise(1)[0], noise(1).astype(np.float32), noise(1)[..., :1]])
def test_what_is_no_batch_of_images_is_refused(effnet, images):
    with pytest.raises(ValueError, match=re.escape("(B, H, W, 3) uint8")):
        effnet(images)


def test_the_images_are_normalised_as_the_network_was_trained(effnet, monkeypatch):
    seen = []
    monkeypatch.setattr(
        effnet._network, "extract_features", lambda x: seen.append(x) or torch.zeros(len(x), 1280, 7, 7)
    )
    effnet(np.full((1, 8, 8, 3), 255, np.uint8))
    assert seen[0].shape == (BATCH_SIZE, 3, 224, 224)
    torch.testing.assert_close(seen[0], torch.ones_like(seen[0]))  # (255 - 127) / 128


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert refusal("effnet_lite0").endswith("needs the extra: pip install 'iet_finetune[audit]'")


def test_loading_prints_nothing_and_leaves_the_random_numbers_alone(capfd, caplog, tmp_path):
    state = torch.random.get_rng_state()
    specs = ("effnet_lite0", str(save_vit(tmp_path, with_pooler=False)))
    capfd.readouterr()
    for spec in specs:
        load_features(spec, CPU)(noise(1))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert torch.equal(torch.random.get_rng_state(), state)


# Models of transformers


def test_dinov2_gives_its_class_token(tmp_path):
    folder, images = save_dinov2(tmp_path / "my-dino"), noise(3)
    features = load_features(str(folder), CPU)
    hidden = Dinov2Model.from_pretrained(folder)(prepared(images, 28)).last_hidden_state
    np.testing.assert_allclose(features(images), hidden[:, 0].detach(), atol=1e-5)
    assert (features.slug, features.title, features.dimensions) == ("my_dino", "my-dino", 16)


def test_clip_gives_its_image_features(tmp_path):
    folder, images = save_clip(tmp_path / "clip"), noise(3)
    model = CLIPModel.from_pretrained(folder)
    expected = model.visual_projection(model.vision_model(prepared(images, 28)).pooler_output)
    features = load_features(str(folder), CPU)
    np.testing.assert_allclose(features(images), expected.detach(), rtol=1e-4, atol=1e-6)
    assert features.dimensions == 8


def test_a_pooler_counts_only_where_its_weights_are_stored(tmp_path):
    images = noise(2)
    pooling = save_vit(tmp_path / "pooling", with_pooler=True)
    expected = ViTModel.from_pretrained(pooling)(prepared(images, 28)).pooler_output
    np.testing.assert_allclose(load_features(str(pooling), CPU)(images), expected.detach(), atol=1e-5)

    classifier = save_vit(tmp_path / "classifier", with_pooler=False)
    network = ViTModel.from_pretrained(classifier, add_pooling_layer=False)
    expected = network(prepared(images, 28)).last_hidden_state.mean(1)
    np.testing.assert_allclose(load_features(str(classifier), CPU)(images), expected.detach(), atol=1e-5)


def test_the_stored_processor_prepares_the_images(tmp_path):
    folder, images = save_dinov2(tmp_path), noise(2, size=40)
    save_processor(folder, "BitImageProcessor", 28, 0.4, size={"shortest_edge": 32}, do_center_crop=True, crop_size=28)
    pixels = AutoImageProcessor.from_pretrained(folder)(images=list(images), return_tensors="pt")["pixel_values"]
    expected = Dinov2Model.from_pretrained(folder)(pixels).pooler_output
    np.testing.assert_allclose(load_features(str(folder), CPU)(images), expected.detach(), atol=1e-5)


# TorchScript


def test_a_torchscript_file_sees_the_image_as_sscd_does(tmp_path):
    file = save_torchscript(tmp_path / "sscd_disc_mixup.torchscript.pt", Averages())
    features = load_features(str(file), CPU)
    assert isinstance(features, TorchScriptFeatures)
    assert (features.slug, features.title, features.dimensions) == ("sscd_disc_mixup", "sscd_disc_mixup", 6)
    image = np.zeros((1, 20, 20, 3), np.uint8)
    image[..., 0] = 255
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225] * 2
    np.testing.assert_allclose(features(image)[0], expected, rtol=1e-5)
    image = noise(1, size=20)
    resized = np.asarray(Image.fromarray(image[0]).resize((288, 288), Image.Resampling.BILINEAR)) / 255
    colours = np.array([resized[:, half].mean((0, 1)) for half in (slice(144), slice(144, None))])
    expected = ((colours - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).ravel()
    for _ in range(4):  # torch would make other code of it after some calls
        np.testing.assert_allclose(features(image)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_network_that_gives_no_rows_of_features_is_refused(tmp_path):
    file = save_torchscript(tmp_path / "map.pt", torch.nn.Conv2d(3, 2, 8, 8))
    assert "does not make one row of features" in refusal(file)


def test_features_that_are_no_numbers_are_refused(tmp_path):
    features = load_features(str(save_torchscript(tmp_path / "broken.pt", Averages(float("nan")))), CPU)
    with pytest.raises(UserError, match="`broken` are not all finite"):
        features(noise(1))


# What cannot be loaded


def test_a_file_that_is_no_torchscript_is_refused(tmp_path):
    text, weights = tmp_path / "text.pt", tmp_path / "weights.pth"
    text.write_text("no network")
    torch.save({"weight": torch.zeros(3)}, weights)
    assert "is not a TorchScript file" in refusal(text)
    assert "is not a TorchScript file" in refusal(weights)


@pytest.mark.parametrize("spec", ["missing.pt", "./nowhere", "/no/such/folder", "~/sscd.torchscript", ""])
def test_a_path_to_nothing_is_not_looked_for_on_the_hub(spec):
    assert refusal(spec).endswith("there is no such file or folder.")


def test_a_hub_that_cannot_be_reached_is_said_so():
    assert "the Hub gave no vision model of that name" in refusal("nobody/dinov2-of-nobody")


def test_a_folder_without_a_vision_model_is_refused(tmp_path):
    assert "holds no vision model" in refusal(tmp_path)
    BertModel(BertConfig(vocab_size=50, **SMALL)).save_pretrained(tmp_path)
    save_processor(tmp_path, "ViTImageProcessor", 28)
    assert "BertModel, which takes no images" in refusal(tmp_path)


def test_a_model_whose_weights_are_not_complete_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_dinov2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "1 weights are missing or do not fit, such as layernorm.weight" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert "holds no vision model" in refusal(tmp_path)


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    save_processor(tmp_path, "ViTImageProcessor", 28)
    names = {"AutoConfig": "theirs.Settings", "AutoModel": "theirs.Network"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": names}))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    assert "holds no vision model" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


# Names and fingerprints


def test_weights_that_are_not_stored_are_no_part_of_the_fingerprint(tmp_path):
    folder, prints = save_vit(tmp_path, with_pooler=False), set()
    for seed in (0, 1):
        torch.manual_seed(seed)  # of the pooler that is drawn and left out
        prints.add(load_features(str(folder), CPU).fingerprint)
    assert len(prints) == 1


def test_fingerprints_tell_weights_and_preprocessing_apart_but_not_folders(tmp_path):
    same = [save_dinov2(tmp_path / name) for name in "ab"]
    other = [save_dinov2(tmp_path / "weights", seed=1), save_dinov2(tmp_path / "mean", mean=0.4)]
    first, again, weights, mean = (TransformersFeatures(str(folder), CPU).fingerprint for folder in (*same, *other))
    assert first == again
    assert len({first, weights, mean}) == 3


def test_fingerprints_of_files_and_of_the_packaged_network_differ(tmp_path, effnet):
    files = [save_torchscript(tmp_path / f"{factor}.pt", Averages(factor)) for factor in (1.0, 2.0)]
    prints = {load_features(str(file), CPU).fingerprint for file in files}
    assert len(prints | {effnet.fingerprint}) == 3
    assert EfficientNetLite0(CPU).fingerprint == effnet.fingerprint


@pytest.mark.parametrize(
    ("name", "slug"),
    [("facebook/dinov2-base", "facebook_dinov2_base"), ("a.b--c", "a_b_c"), ("épée", "p_e"), ("??", "features")],
)
def test_a_slug_has_letters_digits_and_underscores_only(name, slug):
    assert slug_of(name) == slug


def test_those_of_dinov2_are_preferred_where_they_are_here_or_the_hub_gives_them(tmp_path):
    code = """
from iet_finetune.audit.measures.features import load_features
from iet_finetune.audit.measures.preferred import preferred_features
found = [preferred_features(online) for online in (False, True, False)]
print(*sum(found, ()), load_features(found[-1][0], "cpu").title)
"""
    files = {path.name: path.read_bytes() for path in save_dinov2(tmp_path / "dino").iterdir()}
    with HubServer(TOKEN) as hub:
        without = run_python(code, [], tmp_path, HF_ENDPOINT=hub.url)
        hub.repositories[PREFERRED] = Repository(commits=[("all", files)])
        done = run_python(code, [], tmp_path, HF_ENDPOINT=hub.url)
    default = DEFAULT_FEATURES[0]
    assert without.stdout == f"{default} {default} {default} EfficientNet-Lite0 (ImageNet)\n", without.stderr
    assert done.stdout == f"{default} {PREFERRED} {PREFERRED} {PREFERRED}\n", done.stderr
