"""The verdict says what the metrics show, and no more than their intervals allow."""

import re

import pytest
from audit_samples import even, sample_audit, share

from iet_finetune.audit.report.record import AuditRecord
from iet_finetune.audit.report.tones import BAD, GOOD, OPEN, PLAIN, RARE, enough_without_copy
from iet_finetune.audit.report.verdict import GUARANTEE, Sentence, verdict

DATA = {"heldout_images": 300, "generated_images": 1000}


def bare(**changes):
    """An audit without metrics; `changes` replace its parts."""
    empty = {"metrics": {}, "features": [], "by_repeats": [], "not_measured": {}, "warnings": [], "data": DATA}
    return sample_audit(**(empty | changes))


def sentence(audit, about) -> Sentence:
    (found,) = [each for each in verdict(audit).sentences if each.about == about]
    return found


def test_what_one_attack_may_find_several_may_not_as_one_of_them_does_so_by_chance():
    slight = {"mia_auc": even(0.53, 0.027, 0.5)}
    alone = verdict(bare(metrics=slight))
    assert [each.tone for each in alone.sentences if each.about == "membership"] == [BAD]
    assert not [each for each in alone.sentences if each.about == "attacks"]
    # Three in all: 2.5 % / 3 lie beyond 2.39 standard errors, and .53 is 2.18 of them above chance.
    more = {"prompt_memorization_auc": even(0.5, 0.03, 0.5), "f_mem": share(3, 1000, 0.003)}
    audit = bare(metrics=slight | more)
    assert sentence(audit, "membership").tone == OPEN
    assert sentence(audit, "membership").text.endswith("With so many attacks, one may find this much by chance.")
    assert sentence(audit, "attacks").text.startswith("3 attacks were tried;")
    # With two, beyond 2.24; this one is 2.27 above chance.
    clearer = bare(metrics={"mia_auc": even(0.5313, 0.027, 0.5), "prompt_memorization_auc": even(0.5, 0.03, 0.5)})
    assert sentence(clearer, "membership").tone == BAD


def test_copies_are_counted_with_their_interval_and_the_score_of_held_out_images():
    found = sentence(sample_audit(), "copies")
    assert found == Sentence(
        BAD,
        "23 of 1,000 generated images are nearly copies of training images (2.3 %, 95 % interval 1.5 to 3.4); "
        "held-out images score 0.0 %. That is more than chance explains.",
        "copies",
    )


def test_no_copies_among_many_is_said_with_what_may_be_missed():
    audit = bare(metrics={"f_mem": share(0, 1000, 0.0)})
    found = sentence(audit, "copies")
    assert found.tone == GOOD
    assert found.text == (
        "None of 1,000 generated images is nearly a copy of a training image; with 95 % confidence fewer than 0.4 % "
        "are."
    )
    assert verdict(audit).headline == "No copies of training images were found."


def test_no_memorization_is_said_only_where_membership_was_looked_at():
    metrics = {"f_mem": share(0, 1000, 0.0), "mia_auc": even(0.51, 0.03, 0.5)}
    assert verdict(bare(metrics=metrics)).headline == "No memorization was found."
    unclear = metrics | {"mia_auc": even(0.6, 0.2, 0.5)}
    assert verdict(bare(metrics=unclear)).headline == "No copies of training images were found."


def test_few_images_without_a_copy_are_no_good_news():
    found = verdict(bare(metrics={"f_mem": share(0, 20, 0.0)}))
    assert found.sentences[0].tone == OPEN
    assert found.headline == "Whether the model memorizes cannot be told from this audit."
    assert sentence(bare(metrics={"f_mem": share(0, 80, 0.0)}), "copies").tone == GOOD


def test_training_images_hit_in_more_tries_than_held_out_ones_had_are_not_held_against_the_model():
    # One in fifty by chance: of 1,000 generated images twenty hit something, of 60 held-out ones one.
    metrics = {"f_mem": share(20, 1000, 1 / 60), "extracted": share(18, 300, 1 / 300)}
    found = verdict(bare(metrics=metrics, data={"heldout_images": 60}))
    assert [each.tone for each in found.sentences if each.about in ("copies", "extraction")] == [OPEN, OPEN]
    assert found.tone == OPEN


def test_one_copy_is_spoken_of_in_the_singular():
    text = sentence(bare(metrics={"f_mem": share(1, 40, 0.0)}), "copies").text
    assert text.startswith("1 of 40 generated images is nearly a copy of training images (2.5 %")


def test_few_held_out_images_cannot_rule_out_chance():
    few = {"heldout_images": 20}
    found = sentence(bare(metrics={"f_mem": share(23, 1000, 0.0)}, data=few), "copies")
    assert found.tone == OPEN
    assert "the score of 20 held-out images, it cannot be told from chance" in found.text


def test_as_many_as_by_chance_is_no_memorization():
    found = sentence(bare(metrics={"f_mem": share(23, 1000, 0.0233)}), "copies")
    assert found.tone == OPEN
    fewer = sentence(bare(metrics={"f_mem": share(3, 1000, 0.1)}), "copies")
    assert fewer.tone == GOOD
    assert fewer.text.endswith("That is less than unseen images score by chance.")


@pytest.mark.parametrize(("count", "tone"), [(500, BAD), (5, OPEN)])
def test_without_held_out_images_only_many_copies_are_called_memorization(count, tone):
    found = sentence(bare(metrics={"f_mem": share(count, 1000)}, data={}), "copies")
    assert found.tone == tone
    assert "Without held-out images" in found.text


def test_what_was_not_measured_is_said_with_its_reason_and_is_no_good_news():
    audit = bare(not_measured={"f_mem": "needs two training images"})
    found = sentence(audit, "copies")
    assert found == Sentence(
        PLAIN, "How many generated images are copies was not measured: needs two training images.", "copies"
    )
    assert verdict(audit).headline == "Memorization was not measured."
    assert verdict(audit).tone == OPEN


def test_repeated_images_are_set_against_all_others():
    found = sentence(sample_audit(), "extraction")
    assert found.text == (
        "Repeated images suffer most: 12 of 20 images that are in the data 10 or more times can be extracted, "
        "1 of 280 others."
    )
    assert found.tone == BAD


def test_all_classes_but_the_most_repeated_are_the_others():
    rows = [
        {"repeats": "1", "extracted": share(0, 100)},
        {"repeats": "2-4", "extracted": share(2, 30)},
        {"repeats": "5-9", "extracted": share(20, 40)},
    ]
    audit = bare(metrics={"f_mem": share(0, 1000, 0.0), "extracted": share(22, 170, 0.0)}, by_repeats=rows)
    assert "20 of 40 images that are in the data 5 to 9 times can be extracted, 2 of 130 others" in (
        sentence(audit, "extraction").text
    )
    assert verdict(audit).tone == BAD


def test_repeats_are_blamed_only_where_the_intervals_say_so():
    rows = [{"repeats": "1", "extracted": share(1, 280)}, {"repeats": "2-4", "extracted": share(0, 20)}]
    found = sentence(bare(metrics={"extracted": share(1, 300, 0.0)}, by_repeats=rows), "extraction")
    assert found.text == (
        "1 of 300 distinct training images can be extracted. Whether repeated images suffer more cannot be told."
    )
    assert found.tone == OPEN


def test_nothing_extracted_is_good_news():
    rows = [{"repeats": "1", "extracted": share(0, 280)}, {"repeats": "10 or more", "extracted": share(0, 20)}]
    found = sentence(bare(metrics={"extracted": share(0, 300, 0.0)}, by_repeats=rows), "extraction")
    assert (found.tone, found.text) == (GOOD, "None of 300 distinct training images was extracted.")


@pytest.mark.parametrize(
    ("auc", "reach", "tone", "words"),
    [
        (0.55, 0.03, BAD, "a slight leak"),
        (0.7, 0.03, BAD, "a clear leak"),
        (0.9, 0.03, BAD, "a strong leak"),
        (0.51, 0.03, GOOD, "No leak was found this way"),
        (0.6, 0.2, OPEN, "Too few images"),
        (0.45, 0.03, OPEN, "differ in other ways"),
        (0.1, 0.05, OPEN, "differ in other ways"),
    ],
)
def test_a_membership_attack_is_judged_by_its_interval(auc, reach, tone, words):
    found = sentence(bare(metrics={"mia_auc": even(auc, reach, 0.5)}), "membership")
    assert found.tone == tone
    assert f"in {100 * auc:.0f} % of cases" in found.text
    assert words in found.text
    assert "by its loss alone" in found.text


def test_the_stronger_attack_with_a_reference_model_goes_first():
    metrics = {"mia_auc": even(0.51, 0.03, 0.5), "mia_ref_auc": even(0.84, 0.03, 0.5)}
    assert "compared with a reference model) picks the right one in 84 %" in (
        sentence(bare(metrics=metrics), "membership").text
    )


def test_a_leak_without_copies_makes_the_headline():
    found = verdict(bare(metrics={"f_mem": share(0, 1000, 0.0), "mia_auc": even(0.7, 0.03, 0.5)}))
    assert found.headline == "No copies were found, but the model gives away what it was trained on."
    assert found.tone == BAD


def test_a_leak_with_copies_unmeasured_does_not_claim_that_there_are_none():
    found = verdict(bare(metrics={"mia_auc": even(0.7, 0.03, 0.5)}))
    assert "No copies" not in found.headline


@pytest.mark.parametrize(
    ("baseline", "about", "tone"),
    [(0.7, "similarity", BAD), (0.83, "similarity_none", GOOD), (None, "similarity_alone", PLAIN)],
)
def test_similarity_is_set_against_held_out_images(baseline, about, tone):
    audit = bare(
        metrics={"similarity_p95_effnet_lite0": even(0.83, 0.01, baseline)},
        features=[{"slug": "effnet_lite0", "title": "EfficientNet-Lite0 (ImageNet)"}],
    )
    assert sentence(audit, about).tone == tone


@pytest.mark.parametrize(
    ("baseline_reach", "about", "tone"), [(0.01, "similarity", BAD), (0.2, "similarity_open", OPEN)]
)
def test_the_similarity_of_few_held_out_images_is_no_more_certain_than_their_number(baseline_reach, about, tone):
    of_heldout = {"baseline_low": 0.75 - baseline_reach, "baseline_high": 0.75 + baseline_reach}
    audit = bare(
        metrics={"similarity_p95_effnet_lite0": even(0.83, 0.01, 0.75) | of_heldout},
        features=[{"slug": "effnet_lite0", "title": "EfficientNet-Lite0 (ImageNet)"}],
    )
    assert sentence(audit, about).tone == tone


def test_quality_is_told_beside_what_a_copyist_would_score_and_changes_no_headline():
    found = verdict(sample_audit(metrics={"frechet_effnet_lite0": even(31.42, 2.0, 21.06)}, by_repeats=[]))
    (text,) = [each.text for each in found.sentences if each.about == "quality"]
    assert text == (
        "Quality: the FD-EffNetLite0 to held-out images is 31.42; copies of the training images would score 21.06. "
        "Lower is better."
    )
    assert found.headline == "Memorization was not measured."


def test_a_rule_that_skipped_nothing_in_training_is_named():
    said = sentence(bare(training={"skip_rule": "agc", "agc_threshold": 0.8, "skipped": 0.0}), "skipping")
    assert said.text == "In training, `--skip_rule agc` skipped nothing: the rule changed nothing."
    for run in (
        {},
        {"skip_rule": "guard", "skipped": 0.1},
        {"skip_rule": "agc", "agc_threshold": 0.0, "skipped": 0.0},
    ):
        assert "skipping" not in [each.about for each in verdict(bare(training=run)).sentences]


@pytest.mark.parametrize(("warnings", "words"), [(["a"], "1 warning below"), (["a", "b"], "2 warnings below")])
def test_warnings_are_pointed_to(warnings, words):
    assert words in sentence(bare(warnings=warnings), "warnings").text


@pytest.mark.parametrize("audit", [sample_audit(), bare(), bare(metrics={"f_mem": share(0, 1000, 0.0)})])
def test_every_verdict_ends_with_what_a_measurement_cannot_give(audit):
    assert verdict(audit).sentences[-1].text == GUARANTEE


def test_an_empty_audit_still_gets_a_verdict():
    assert verdict(AuditRecord()).headline == "Memorization was not measured."


# In short, for readers who know no metric, and what to do next.


def test_what_was_got_out_is_told_first_in_plain_words():
    copied = verdict(sample_audit()).sentences[0]
    pictures = sample_audit().metrics["extracted"]
    assert copied == Sentence(
        BAD,
        f"Strangers who have only the model can get {pictures.count} of the {pictures.total} training images out of "
        "it, as 1,000 tries showed.",
        "in short",
    )
    uncounted = sentence(bare(metrics={"f_mem": share(23, 1000, 0.0)}), "in short")
    assert "can get copies of training images out of it, as 1,000 tries showed" in uncounted.text
    clean = sentence(bare(metrics={"f_mem": share(0, 1000, 0.0)}), "in short")
    assert clean.tone == GOOD
    assert clean.text == "Strangers who have only the model could not get any training image out of it in 1,000 tries."
    few = sentence(bare(metrics={"f_mem": share(0, 1, 0.0)}), "in short")
    assert few.tone == OPEN
    assert few.text.endswith("in 1 try, which is too few to say more.")
    chance = sentence(bare(metrics={"f_mem": share(23, 1000, 0.0233)}), "in short")
    assert chance.tone == OPEN
    assert "or look like them by chance" in chance.text
    assert "in short" not in [each.about for each in verdict(AuditRecord()).sentences]


def test_against_copies_it_advises_fewer_passes_and_rest_and_one_of_each_where_repeated_ones_are_extracted():
    words = " ".join(verdict(sample_audit()).advice)
    assert all(flag in words for flag in ("--dedup near", "--stop_when auto", "--skip_rule guard", "private_photos"))
    alone = verdict(bare(metrics={"f_mem": share(23, 1000, 0.0)})).advice
    assert "--dedup" not in " ".join(alone)
    assert "--stop_when auto" in alone[0]


def test_against_a_leak_it_advises_fewer_passes_more_images_and_a_lower_rank():
    leaks = bare(metrics={"f_mem": share(0, 1000, 0.0), "mia_auc": even(0.7, 0.03, 0.5)})
    assert verdict(leaks).advice == (
        "Train for fewer passes: `--holdout_fraction 0.1 --stop_when auto` stops once the model gets no better on "
        "held-out images.",
        "Add training images, or try in a LoRA a lower `--rank`: single images are then remembered less.",
    )


def test_it_advises_nothing_that_the_run_did_already():
    run = {"stop_when": "auto", "dedup": "near", "skip_rule": "guard", "use_lora": True, "rank": 4, "passes": 36}
    leaks = {"f_mem": share(0, 1000, 0.0), "mia_auc": even(0.7, 0.03, 0.5)}
    assert verdict(bare(metrics=leaks, training=run)).advice == (
        "Train for fewer passes: `--stop_when auto` kept the model as it was after 36; `--num_train_epochs 18` ends "
        "sooner.",
        "Add training images, or try a `--rank` below 4: single images are then remembered less.",
    )
    copied = " ".join(verdict(sample_audit(training=run)).advice)
    assert not any(flag in copied for flag in ("--dedup", "--holdout_fraction", "--skip_rule", "private_photos"))
    whole = verdict(bare(metrics=leaks, training=run | {"use_lora": False, "stop_when": "end"})).advice
    assert whole[0].startswith("Train for fewer passes than 36: `--holdout_fraction 0.1 --stop_when auto` stops")
    assert "--rank" not in whole[1]


def test_where_it_cannot_tell_it_says_what_would():
    few = verdict(bare(metrics={"f_mem": share(0, 20, 0.0)})).advice
    assert few == ("Draw more images, `--num_images 73`: if none of them is a copy, fewer than one in twenty are.",)
    alone = verdict(bare(metrics={"f_mem": share(0, 1000, 0.0)}, data={"generated_images": 1000})).advice
    assert len(alone) == 1
    assert alone[0].startswith("Hold images out")
    vague = verdict(bare(metrics={"f_mem": share(0, 1000, 0.0), "mia_auc": even(0.5, 0.15, 0.5)})).advice
    assert len(vague) == 1
    assert vague[0].startswith("Compare with more than 300 held-out images, so that the attack by losses can be told")


def test_where_nothing_was_found_there_is_nothing_to_do():
    assert verdict(bare(metrics={"f_mem": share(0, 1000, 0.0), "mia_auc": even(0.51, 0.03, 0.5)})).advice == ()


def test_so_many_images_without_a_copy_are_enough_and_one_fewer_is_not():
    from iet_finetune.audit.measures.metrics import rate

    enough = enough_without_copy()
    assert rate(0, enough).high <= RARE < rate(0, enough - 1).high


def test_advice_is_on_the_page_and_in_the_terminal_and_names_only_flags_that_exist(tmp_path):
    from iet_finetune.audit.report.report import report_page
    from iet_finetune.audit.report.summary import as_text
    from iet_finetune.config.config import flag_names

    text = as_text(sample_audit(not_measured={"mq_0.4": "too few", "mq_0.5": "too few", "kid_x": "none."}), tmp_path)
    assert "\nNot measured: mq_0.4, mq_0.5 (too few).\nNot measured: kid_x (none).\n" in text
    assert "\nWhat now:\n- Repeated images are memorized first" in text
    assert "<h2>What now</h2>" in report_page(sample_audit())
    assert "What now" not in report_page(AuditRecord())
    audits = (sample_audit(), bare(metrics={"f_mem": share(0, 20, 0.0)}, data={}))
    for name in re.findall(r"`--(\w+)", " ".join(line for audit in audits for line in verdict(audit).advice)):
        assert name in {*flag_names(), "config"}, name
