"""What an audit knows from the folder of a model that was trained here, and what it is told besides."""

from pathlib import Path

import pytest
import yaml

from iet_finetune import Config
from iet_finetune.audit.request import read_request
from iet_finetune.files import LORA_NAME

RUN = {
    "pretrained_model_name_or_path": "owner/base",
    "revision": "v2",
    "variant": "fp16",
    "cache_dir": "cache",
    "prediction_type": "v_prediction",
    "train_data_dir": "images",
    "holdout_fraction": 0.1,
    "seed": 3,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a run, as far as it is looked into before anything is loaded."""
    (tmp_path / "model").mkdir()
    flags = Config.from_flags(**RUN).to_flags()
    (tmp_path / "model" / "training_config.yaml").write_text(yaml.safe_dump(flags))
    return tmp_path / "model"


def test_the_base_of_an_adapter_is_loaded_as_the_run_loaded_it(model):
    (model / LORA_NAME).touch()
    base = read_request({"model": str(model)}).config.model
    assert (base.pretrained_model_name_or_path, base.revision, base.variant) == ("owner/base", "v2", "fp16")
    other = read_request({"model": str(model), "pretrained_model_name_or_path": "owner/other"}).config.model
    assert (other.pretrained_model_name_or_path, other.revision, other.variant) == ("owner/other", None, None)
    assert read_request({"model": str(model), "revision": "v3"}).config.model.revision == "v3"


def test_a_whole_pipeline_has_no_revision_of_its_base(model):
    loaded = read_request({"model": str(model)}).config.model
    assert (loaded.revision, loaded.variant) == (None, None)


def test_the_base_as_reference_is_loaded_as_the_run_loaded_it(model):
    reference = read_request({"model": str(model)}).reference
    assert reference is not None
    assert {name: getattr(reference, name) for name in list(RUN)[:5]} == dict(list(RUN.items())[:5])


def test_another_reference_shares_but_the_cache(model):
    reference = read_request(
        {"model": str(model), "reference_model": "owner/other", "cache_dir": "elsewhere"}
    ).reference
    assert reference is not None
    assert (reference.pretrained_model_name_or_path, reference.cache_dir) == ("owner/other", "elsewhere")
    assert (reference.revision, reference.variant, reference.prediction_type) == (None, None, None)


@pytest.mark.parametrize("change", [{}, {"holdout_fraction": "0.2"}, {"seed": "4"}])
def test_only_the_share_of_the_run_itself_is_known_to_be_held_out(model, change):
    assert read_request({"model": str(model), **change}).split_is_known is (not change)


def test_of_a_model_from_elsewhere_no_split_is_known(tmp_path):
    given = {"model": "owner/name", "output_dir": str(tmp_path), "holdout_fraction": "0.1"}
    assert not read_request(given).split_is_known
