"""Promises of the model card: it says what was done and measured, and nothing else."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from audit_samples import sample_json
from cards import facts, with_flags
from huggingface_hub import ModelCard

from iet_finetune.config.flags import flag
from iet_finetune.config.registry import SKIP_RULES, register_skip_rule
from iet_finetune.errors import UserError
from iet_finetune.publish.card import base_license, show_audit, write_model_card


def test_the_card_states_the_recipe_and_the_data(tmp_path: Path):
    card = ModelCard.load(write_model_card(tmp_path, facts()))
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card.text, flags=re.MULTILINE))
    assert rows["shards (K)"] == "2 (iid)"
    assert rows["local training between merges"] == "5 passes"
    assert (rows["merges"], rows["steps of all clones together"], rows["seed"]) == ("3", "24", "0")
    assert (rows["AGC threshold"], rows["AGC decay (d)"], rows["learning rate"]) == ("0.8", "0.8", "0.0001")
    assert [rows[number] for number in "123"] == ["0.00 %", "12.50 %", "25.00 %"]
    assert "40 images (37 distinct) from a local data set" in card.text
    assert "5 images were held out" in card.text
    assert "only differential privacy" in card.text
    assert "https://arxiv.org/abs/2407.15328" in card.text
    metadata = card.data.to_dict()
    assert (metadata["base_model"], metadata["license"]) == ("somebody/tiny-sd", "openrail++")
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert "datasets" not in metadata


def test_the_card_of_an_adapter_states_its_merge_and_what_its_file_lost(tmp_path: Path):
    flags = {"use_lora": True, "rank": 8, "lora_alpha": 16, "lora_layers": "to_q,proj_in", "use_rslora": True}
    lost = "a LoRA file of rank 8, which lost 1.2 % of the update's energy"
    text = write_model_card(tmp_path, with_flags(facts(lora_export=lost), **flags)).read_text()
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, flags=re.MULTILINE))
    assert rows["LoRA"] == "rank 8, alpha 16, scaled as in rsLoRA, dropout 0"
    assert (rows["layers with an adapter"], rows["merge of adapters"]) == ("to_q,proj_in", "the mean of their updates")
    assert rows["saved as"] == lost
    assert "every shard trained its own clone of the LoRA adapter" in text
    whole = write_model_card(tmp_path, facts()).read_text()
    assert "LoRA" not in whole


def test_the_card_gives_warm_up_only_to_a_schedule_that_has_one(tmp_path: Path):
    warm = with_flags(facts(), lr_scheduler="constant_with_warmup", lr_warmup_steps=7)
    assert "| constant_with_warmup, 7 warm-up steps |" in write_model_card(tmp_path, warm).read_text()
    assert "warm-up" not in write_model_card(tmp_path, facts()).read_text()


def test_a_base_of_unknown_licence_gives_a_card_without_one(tmp_path: Path):
    card = ModelCard.load(write_model_card(tmp_path, facts(base_license=None)))
    assert "license" not in card.data.to_dict()
    assert "license:" not in (tmp_path / "README.md").read_text()
    assert "The base model's licence could not be read" in card.text


def test_local_folders_never_reach_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/base").mkdir(parents=True)
    for name in ("models/base", str(tmp_path), "./base", "~/base", "base/", "../base", "C:\\models\\base"):
        local = with_flags(facts(base_model=name), dataset_name=name, train_data_dir=str(tmp_path))
        card = ModelCard.load(write_model_card(tmp_path, local))
        assert name not in (tmp_path / "README.md").read_text()
        assert not {"base_model", "datasets"} & card.data.to_dict().keys()


def test_a_public_data_set_is_named(tmp_path: Path):
    card = ModelCard.load(write_model_card(tmp_path, with_flags(facts(), dataset_name="somebody/cats")))
    assert card.data.datasets == ["somebody/cats"]
    assert "40 images (37 distinct) from [somebody/cats](https://huggingface.co/datasets/somebody/cats)" in card.text


def test_the_card_says_that_nothing_was_measured_until_there_is_an_audit(tmp_path: Path):
    assert "Memorization of this pipeline: not measured." in write_model_card(tmp_path, facts()).read_text()
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit/audit.json").write_text("{}")
    text = write_model_card(tmp_path, facts()).read_text()
    assert "not measured." not in text
    assert "[audit/audit.json](audit/audit.json)" in text


def test_a_later_audit_gives_the_card_that_an_audited_run_has(tmp_path: Path):
    made = with_flags(facts(), dataset_name="somebody/cats")
    plain = write_model_card(tmp_path, made).read_text()
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit/audit.json").write_text(json.dumps(sample_json()))
    show_audit(tmp_path)
    audited = (tmp_path / "README.md").read_text()
    assert audited.index("## Audit") < audited.index("## Limits")
    assert ModelCard.load(tmp_path / "README.md").data.eval_results
    assert audited == write_model_card(tmp_path, made).read_text()
    (tmp_path / "audit/audit.json").unlink()
    show_audit(tmp_path)
    assert (tmp_path / "README.md").read_text() == plain


def test_a_card_that_was_edited_is_left_alone_until_it_is_removed(tmp_path: Path, capsys):
    path = write_model_card(tmp_path, facts())
    path.write_text(edited := path.read_text() + "Drawn by me.\n")
    for _ in range(2):
        write_model_card(tmp_path, facts(steps=48))
        show_audit(tmp_path)
        assert path.read_text() == edited
    assert set(capsys.readouterr().err.splitlines()) == {
        f"warning: `{path}` was edited and is left as it is: remove it, and resume or audit, to have it written anew."
    }
    path.unlink()
    show_audit(tmp_path)
    assert "| steps of all clones together | 48 |" in path.read_text()
    write_model_card(tmp_path, facts(steps=72))
    assert "| steps of all clones together | 72 |" in path.read_text()
    assert capsys.readouterr().err == ""


def test_a_kill_between_card_and_facts_does_not_make_the_card_an_edited_one(tmp_path: Path, capsys):
    path = write_model_card(tmp_path, facts())
    old = (tmp_path / "card.json").read_bytes()
    write_model_card(tmp_path, facts(steps=48))
    (tmp_path / "card.json").write_bytes(old)
    write_model_card(tmp_path, facts(steps=48))
    write_model_card(tmp_path, facts(steps=72))
    assert "| steps of all clones together | 72 |" in path.read_text()
    assert capsys.readouterr().err == ""


def test_facts_that_are_missing_or_damaged_are_named_and_the_card_stays(tmp_path: Path, capsys):
    path = write_model_card(tmp_path, facts())
    text = path.read_text()
    (tmp_path / "card.json").write_text('{"facts": 1')
    with pytest.raises(UserError, match=r"card\.json` is damaged"):
        show_audit(tmp_path)
    (tmp_path / "card.json").unlink()
    show_audit(tmp_path)
    assert capsys.readouterr().err.startswith(f"warning: `{path}` is left as it is: card.json")
    assert path.read_text() == text


def test_the_stored_facts_name_nothing_of_this_machine(tmp_path: Path):
    local = with_flags(facts(base_model="./base"), dataset_name="./cats", train_data_dir="here", hub_token="hf_x")
    write_model_card(tmp_path, with_flags(local, output_dir=str(tmp_path)))
    stored = json.loads((tmp_path / "card.json").read_text())["facts"]
    text = json.dumps(stored)
    for name in ("./base", "./cats", "here", "hf_x", str(tmp_path)):
        assert f'"{name}"' not in text
    assert stored["flags"]["seed"] == 0


def test_a_rule_from_outside_is_in_the_card_with_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SKIP_RULES, "entries", dict(SKIP_RULES.entries))

    @dataclass(frozen=True)
    class Settings:
        reference_share: float = flag(0.75, "Skip below this share.", resume="fixed", scope="public")

    register_skip_rule("reference", Settings)(object)
    text = write_model_card(tmp_path, with_flags(facts(), skip_rule="reference", reference_share=0.75)).read_text()
    assert "Samples were skipped by the rule `reference`." in text
    assert "| skip rule | reference |\n| reference_share | 0.75 |" in text
    assert "AGC threshold" not in text


def test_the_card_claims_no_part_of_the_method_that_was_off(tmp_path: Path):
    plain = with_flags(facts(skip_rates=(0.0,)), num_shards=1, agc_threshold=0.0)
    text = write_model_card(tmp_path, plain).read_text()
    assert "The data was not split" in text
    assert "Anti-gradient control was off" in text
    assert "| AGC threshold | 0 (off) |" in text
    assert "Samples skipped" not in text


def test_a_rule_that_skipped_nothing_is_said_to_have_changed_nothing(tmp_path: Path):
    text = write_model_card(tmp_path, facts(skip_rates=(0.0, 0.0))).read_text()
    assert "Nothing was skipped in any round: the rule changed nothing.\n\n## " in text
    assert "| round | skipped |" not in text
    assert "changed nothing" not in write_model_card(tmp_path, facts(skip_rates=(0.0, 0.1))).read_text()


def test_an_unconditional_pipeline_is_called_without_a_prompt(tmp_path: Path):
    card = ModelCard.load(write_model_card(tmp_path, facts(pipeline_class="DDPMPipeline")))
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "pipeline().images[0]" in card.text


def test_a_grid_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="grid.png"):
        write_model_card(tmp_path, facts(sample_grid="grid.png"))


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("---\nlicense: creativeml-openrail-m\ntags: [x]\n---\n# Model", "creativeml-openrail-m"),
        ("---\nlicense: [mit]\n---\n", "mit"),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\nlicense: unknown\n---\n", None),
        ("---\ntags: [x]\n---\nlicense: mit", None),
        ("# Model\nlicense: mit", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n- mit\n---\n", None),
        (None, None),
    ],
)
def test_the_base_licence_is_read_and_never_guessed(tmp_path: Path, readme: str | None, found: str | None):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert base_license(tmp_path) == found


def test_a_model_from_scratch_has_no_base_and_no_licence_of_one(tmp_path: Path):
    made = facts(base_model=None, base_license=None, pipeline_class="DDPMPipeline")
    text = write_model_card(tmp_path, made).read_text()
    assert "# DDPMPipeline trained with IET-AGC" in text
    assert "Trained from scratch with IET-AGC" in text
    assert "the weights began at random" in text
    assert "base model" not in text.split("## License")[1]
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


@pytest.mark.parametrize(
    ("names", "listed"),
    [(("bag", "ankle  boot"), "Classes: 0 bag, 1 ankle boot."), (("0", "1", "2"), "Classes: 0 to 2.")],
)
def test_a_model_that_draws_by_class_names_its_classes_and_a_pipeline_class_that_loads_it(
    tmp_path: Path, names, listed
):
    text = write_model_card(tmp_path, facts(pipeline_class="DDPMPipeline", class_names=names)).read_text()
    assert "from iet_finetune import ClassConditionalPipeline" in text
    assert "pipeline(class_labels=[0])" in text
    assert listed in text
    assert ModelCard.load(tmp_path / "README.md").data.get("pipeline_tag") is None
