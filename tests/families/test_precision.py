"""Models are loaded as they are stored, and compute in fp32 with the bits of models that were loaded in it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families.text_to_image import HALVES
from runs import assert_equal
from safetensors.torch import load_file, save_file
from tiny import RESOLUTION
from tiny_families import PIPELINES, tiny_pipeline
from torch import nn

from iet_finetune.cache.keys import _model_digest
from iet_finetune.config.config import Config
from iet_finetune.config.settings import ModelConfig
from iet_finetune.families import family_class, find_pipeline, load_as_stored, load_pipeline
from iet_finetune.families.precision import inexact_tensors, widened

CPU = torch.device("cpu")


def store(folder: Path, name: str) -> Path:
    """A pipeline of which all is in half precision but some layers of T5, which are in fp32."""
    tiny_pipeline(name).save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        dtype = HALVES.get(file.parent.name, torch.bfloat16)
        tensors = load_file(file)
        halves = {key: tensor if ".wo." in key else tensor.to(dtype) for key, tensor in tensors.items()}
        save_file(halves, file, metadata={"format": "pt"})
    return folder


def both_ways(folder: Path) -> SimpleNamespace:
    """The stored pipeline loaded as it is stored, and in fp32, each behind its family."""
    model = ModelConfig(pretrained_model_name_or_path=str(folder))
    source, config = find_pipeline(model), Config(model=model)
    kind = family_class(source, model)
    stored, whole = load_as_stored(source, model), load_pipeline(source, model)
    return SimpleNamespace(source=source, stored=kind(stored, config), whole=kind(whole, config))


@pytest.fixture(scope="module", params=PIPELINES)
def loaded(request, tmp_path_factory):
    return both_ways(store(tmp_path_factory.mktemp("world") / "base", request.param))


def modules(family) -> dict[str, nn.Module]:
    return {name: part for name, part in family.pipeline.components.items() if isinstance(part, nn.Module)}


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def test_what_is_loaded_as_it_is_stored_has_the_values_of_what_is_loaded_in_fp32(loaded):
    for name, module in modules(loaded.stored).items():
        exact = tensors(modules(loaded.whole)[name])
        ours = {key: tensor.to(exact[key].dtype) for key, tensor in tensors(module).items()}
        assert_equal(ours, exact)
        wide = [key for key, parameter in module.named_parameters() if parameter.dtype == torch.float32]
        assert all(".wo." in key for key in wide)


def test_lent_encoders_give_the_bits_of_encoders_in_fp32_and_come_back_as_they_were(loaded):
    pixels = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = ["a thing", "thing 3"]
    encoders = (*loaded.stored.image_encoders, *loaded.stored.caption_encoders)
    held = {name: {key: t.data_ptr() for key, t in tensors(m).items()} for name, m in modules(loaded.stored).items()}
    answers = []
    for family in (loaded.stored, loaded.whole):
        with family.lent(encoders, CPU):
            mean, std = family.encode_images(pixels)
            answers.append({"mean": mean, "std": std, **family.encode_captions(captions)})
    assert_equal(*answers)
    for name, module in modules(loaded.stored).items():
        assert {key: tensor.data_ptr() for key, tensor in tensors(module).items()} == held[name]


def test_fingerprints_and_keys_of_the_cache_do_not_depend_on_how_a_model_is_held(loaded):
    assert loaded.stored.fingerprint() == loaded.whole.fingerprint()
    assert all(
        _model_digest(part) == _model_digest(modules(loaded.whole)[n]) for n, part in modules(loaded.stored).items()
    )
    nn.init.ones_(next(loaded.whole.denoiser.parameters()))
    assert loaded.stored.fingerprint() != loaded.whole.fingerprint()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_weights_stay_mapped_from_their_files_so_that_ranks_share_them(tmp_path):
    family = both_ways(store(tmp_path / "base", "flux dev")).stored
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    files = [
        (int(start, 16), int(end, 16))
        for (start, end), path in ((line[0].split("-"), line[5]) for line in lines if len(line) == 6)
        if path.strip().endswith(".safetensors")
    ]
    for module in (family.denoiser, family.pipeline.vae, family.pipeline.text_encoder):
        for tensor in module.parameters():
            assert any(start <= tensor.data_ptr() < end for start, end in files)


def test_a_module_is_in_fp32_while_it_is_lent_and_has_its_own_tensors_again_when_that_fails():
    module = nn.BatchNorm1d(3).to(torch.bfloat16)
    before = {name: tensor.data_ptr() for name, tensor in tensors(module).items()}

    def interrupted() -> None:
        with widened(module, CPU):
            assert {tensor.dtype for tensor in tensors(module).values()} == {torch.float32, torch.int64}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {name: tensor.data_ptr() for name, tensor in tensors(module).items()} == before
    assert module.weight.dtype == module.running_mean.dtype == torch.bfloat16


def test_tensors_that_may_have_been_rounded_while_loading_are_named():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to(torch.bfloat16)
    module.register_buffer("positions", torch.zeros(2, dtype=torch.bfloat16), persistent=False)
    assert inexact_tensors(module, torch.bfloat16, {}) == ["positions"]
    del module.positions
    assert inexact_tensors(module, torch.bfloat16, {}) == []
    assert inexact_tensors(module, torch.bfloat16, {"0.bias": torch.float32}) == ["0.bias"]
    module[0].bias.data = module[0].bias.data.float()  # kept by the library
    assert inexact_tensors(module, torch.bfloat16, {"0.bias": torch.float32}) == []
    # Stored under other names than it has here: there is no telling which they are.
    assert inexact_tensors(module, torch.bfloat16, {"old.bias": torch.float32}) == ["0.weight", "1.bias", "1.weight"]
