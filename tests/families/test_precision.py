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

from iet_finetune.cache.keys import _model_digest, caption_facts
from iet_finetune.config.config import Config
from iet_finetune.config.settings import ModelConfig
from iet_finetune.families import base, family_class, find_pipeline, load_as_stored, load_pipeline, source_of
from iet_finetune.families.encoding import Encoder
from iet_finetune.families.precision import computing, encoding_dtype, inexact_tensors, predicting
from iet_finetune.lora.quantised import quantise

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
        with computing(module, CPU):
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


def test_text_encoders_compute_in_fp32_on_a_cpu_and_in_half_precision_on_a_gpu(loaded, monkeypatch):
    gpu, family = torch.device("cuda"), loaded.stored
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for name, encoder in modules(family).items():
        held = next(tensor.dtype for tensor in encoder.parameters())
        assert family.encoding_dtype(name, CPU) == torch.float32
        is_text = name in family.caption_encoders
        is_t5 = type(encoder).__name__.startswith("T5")
        as_held = torch.bfloat16 if is_t5 and held == torch.float16 else held
        assert family.encoding_dtype(name, gpu) == (as_held if is_text else torch.float32)
        assert encoding_dtype(encoder, gpu, torch.bfloat16) == torch.bfloat16
        assert encoding_dtype(encoder, gpu, torch.float16) == (torch.bfloat16 if is_t5 else torch.float16)
        assert encoding_dtype(nn.Linear(1, 1), gpu, None) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    for encoder in filter(None, (getattr(family.pipeline, name, None) for name in family.caption_encoders)):
        if type(encoder).__name__.startswith("T5"):
            assert encoding_dtype(encoder, gpu, torch.float16) == torch.float32


def test_the_cache_tells_captions_that_were_encoded_in_half_precision_from_others(loaded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    gpu, family = torch.device("cuda"), loaded.whole
    on_cpu, on_gpu = (caption_facts(family, Encoder(family, 4, device), device) for device in (CPU, gpu))
    assert "computed in" not in on_cpu
    assert "computed in" not in on_gpu
    half = caption_facts(loaded.stored, Encoder(family, 4, gpu), gpu)
    assert set(half["computed in"]) == set(modules(family)) & set(family.caption_encoders)


def test_a_quantised_layer_keeps_its_scales_in_fp32_in_a_model_that_computes_in_half_precision():
    module = nn.Sequential(nn.Sequential(nn.Linear(64, 8)), nn.LayerNorm(8))
    quantise(module, "nf4", CPU)
    with computing(module, CPU, torch.bfloat16):
        assert module[0][0].scale.dtype == module[0][0].codes.dtype == torch.float32
        assert module[0][0].weight.dtype == torch.int8
        assert {t.dtype for t in (module[1].weight, module[0][0].bias)} == {torch.bfloat16}
        assert module(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_denoiser_predicts_in_half_precision_with_norms_in_fp32_and_nothing_around_it_does():
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    before, x = tensors(module), torch.linspace(0, 1, 8).view(2, 4)
    held, exact = {name: tensor.data_ptr() for name, tensor in before.items()}, module(x)
    with predicting(module, CPU, torch.bfloat16):
        assert module[0].weight.dtype == module[2].bias.dtype == torch.bfloat16
        assert module[1].weight.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        rounded = module(x)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.05)
    assert {name: tensor.data_ptr() for name, tensor in tensors(module).items()} == held
    assert torch.equal(module(x), exact)
    with predicting(module, CPU, torch.bfloat16, rounds=False):
        assert {tensor.dtype for tensor in module.parameters()} == {torch.float32}
        assert torch.equal(module(x), rounded)


def test_encoders_that_stay_on_the_device_in_half_precision_are_given_back_as_they_came(monkeypatch):
    pipeline = tiny_pipeline("sdxl")
    family = family_class(source_of(pipeline), ModelConfig())(pipeline)
    exact = {name: tensor.clone() for name, tensor in pipeline.text_encoder.state_dict().items()}
    monkeypatch.setattr(base, "encoding_dtype", lambda *_: torch.bfloat16)
    family.place(CPU)
    assert {tensor.dtype for tensor in pipeline.text_encoder.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in pipeline.vae.parameters()} == {torch.float32}
    placed = {name: tensor.data_ptr() for name, tensor in tensors(pipeline.text_encoder).items()}
    with family.as_it_came():
        assert_equal(dict(pipeline.text_encoder.state_dict()), exact)
    assert {name: tensor.data_ptr() for name, tensor in tensors(pipeline.text_encoder).items()} == placed
    family.take_back()
    assert_equal(dict(pipeline.text_encoder.state_dict()), exact)
