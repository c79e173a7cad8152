"""Prompts that pull the noise far away from that without a prompt are found, in every pipeline that is guided."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from families.pixels import tiny_pixels
from tiny import RESOLUTION, tiny_sd
from tiny_families import tiny_pipeline

from iet_finetune.audit.measures.prompts import (
    guidance_fault,
    prompt_by_repeats,
    prompt_findings,
    prompt_norms,
)
from iet_finetune.audit.measures.separation import auc

PROMPTS = ["thing 0", "", "another, much longer thing", "thing 3", "thing 4"]
SEEDS = [10, 11, 12, 13, 14]
PIXART = {"max_sequence_length": 16, "clean_caption": False, "use_resolution_binning": False}
OPTIONS = {
    "sd": {},
    "sdxl": {},
    "sd3": {"max_sequence_length": 16},
    "pixart alpha": PIXART,
    "pixart sigma": PIXART,
}


def make_pipeline(name, **settings):
    pipeline = tiny_sd(**settings) if name == "sd" else tiny_pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoiser_of(pipeline):
    return getattr(pipeline, "unet", None) or pipeline.transformer


def norms_of(pipeline, prompts=PROMPTS, seeds=SEEDS, **changes):
    told = {"batch_size": 2, "size": RESOLUTION, "steps": 4, "guidance": 5.0, "options": {}, **changes}
    return prompt_norms(pipeline, denoiser_of(pipeline), prompts, seeds, **told)


def clip_states(pipeline, text):
    tokens = pipeline.tokenizer([text], padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    return pipeline.text_encoder(tokens.input_ids)[0]


@torch.no_grad()
def slow_norm(pipeline, prompt, seed, steps, guidance):
    """The statistic from the formulas: one prompt, two calls a step, DDIM (Song et al., 2020, equation 12)."""
    alphas = pipeline.scheduler.alphas_cumprod.double()
    given, without = clip_states(pipeline, prompt), clip_states(pipeline, "")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    norms = []
    stride = 1000 // steps
    for t in [stride * i + 1 for i in reversed(range(steps))]:
        conditional, unconditional = (pipeline.unet(latents, t, states).sample for states in (given, without))
        difference = conditional - unconditional
        norms.append(float(difference.square().sum()) ** 0.5)
        noise = (unconditional + guidance * difference).double()
        now, then = alphas[t], alphas[t - stride] if t >= stride else pipeline.scheduler.final_alpha_cumprod
        clean = (latents - (1 - now) ** 0.5 * noise) / now**0.5
        latents = (then**0.5 * clean + (1 - then) ** 0.5 * noise).float()
    return sum(norms) / steps


def test_the_norm_of_a_prompt_is_the_mean_over_a_sampling_loop_written_by_hand():
    pipeline = make_pipeline("sd")
    norms = norms_of(pipeline)
    expected = [slow_norm(pipeline, prompt, seed, 4, 5.0) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert norms.dtype == np.float32
    assert norms.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    # The empty prompt pulls nowhere.
    assert norms[1] < 1e-4 < 0.01 < norms[[0, 2, 3, 4]].min()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_guided_pipeline_gives_what_its_guidance_adds_to_the_prediction(name, monkeypatch):
    pipeline = make_pipeline(name)
    if name.startswith("pixart"):
        # The others of diffusers do not draw in one step there.
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    norms = norms_of(pipeline, PROMPTS[:2], SEEDS[:2], steps=1, options=OPTIONS[name])
    # What the scheduler is given is u + g (c - u): two scales give the difference, without a look at the denoiser.
    seen = {}
    for guidance in (2.0, 7.0):
        step = type(pipeline.scheduler).step

        def spy(self, prediction, *rest, _guidance=guidance, _step=step, **named):
            seen[_guidance] = prediction
            return _step(self, prediction, *rest, **named)

        monkeypatch.setattr(type(pipeline.scheduler), "step", spy)
        pipeline(
            PROMPTS[:2],
            height=RESOLUTION,
            width=RESOLUTION,
            num_inference_steps=1,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS[:2]],
            output_type="latent",
            **OPTIONS[name],
        )
        monkeypatch.setattr(type(pipeline.scheduler), "step", step)
    expected = ((seen[7.0] - seen[2.0]) / 5).flatten(1).norm(dim=1)
    assert seen[2.0].shape == (2, 4, 8, 8)
    assert norms.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-5)
    assert norms[0] > 1e-4


def test_a_prompt_has_the_same_bits_however_many_there_are():
    pipeline = make_pipeline("sd")
    norms = norms_of(pipeline)
    assert np.array_equal(norms_of(pipeline, PROMPTS[:3], SEEDS[:3]), norms[:3])
    assert np.array_equal(norms_of(pipeline, PROMPTS[4:], SEEDS[4:]), norms[4:])
    assert np.allclose(norms_of(pipeline, batch_size=5), norms, rtol=1e-4, atol=1e-5)
    assert norms_of(pipeline, [], []).shape == (0,)


def test_norms_follow_from_the_seeds_and_leave_torch_alone():
    pipeline = make_pipeline("sd")
    before = torch.get_rng_state()
    norms = norms_of(pipeline)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert np.array_equal(norms_of(pipeline), norms)
    other = norms_of(pipeline, seeds=[seed + 1 for seed in SEEDS])
    assert (other[[0, 2, 3, 4]] != norms[[0, 2, 3, 4]]).all()


def test_schedulers_that_call_the_denoiser_more_often_are_averaged_over_their_calls():
    pipeline = make_pipeline("sd")
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    calls = []
    pipeline.unet.register_forward_hook(lambda _, __, output: calls.append(output[0].detach().clone()))
    norms = norms_of(pipeline, PROMPTS[2:4], SEEDS[2:4])
    assert len(calls) > 4
    expected = torch.stack([(call[2:] - call[:2]).flatten(1).norm(dim=1) for call in calls]).mean(dim=0)
    assert norms.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_without_a_scale_the_pipelines_own_is_used():
    pipeline = make_pipeline("sd")
    assert np.array_equal(norms_of(pipeline, guidance=None), norms_of(pipeline, guidance=7.5))
    assert not np.array_equal(norms_of(pipeline, guidance=None), norms_of(pipeline, guidance=5.0))


def test_the_denoiser_is_left_as_it_was_also_after_an_error():
    pipeline = make_pipeline("sd", dropout=0.5)
    pipeline.unet.train()
    norms = norms_of(pipeline)
    assert pipeline.unet.training
    assert not pipeline.unet._forward_hooks

    def interrupted(*step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        norms_of(pipeline, options={"callback_on_step_end": interrupted})
    assert pipeline.unet.training
    assert not pipeline.unet._forward_hooks
    pipeline.unet.eval()
    assert np.array_equal(norms_of(pipeline), norms)


def test_a_denoiser_that_listens_to_its_prompts_more_has_longer_norms():
    pipeline = make_pipeline("sd")
    stronger = copy.deepcopy(pipeline)
    for name, parameter in stronger.unet.named_parameters():
        if "attn2.to_out" in name:
            parameter.data.mul_(4)
    chosen = [0, 2, 3, 4]
    assert (norms_of(stronger)[chosen] > 2 * norms_of(pipeline)[chosen]).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_guided_pipelines_are_known_and_need_a_scale_above_one(name):
    pipeline = make_pipeline(name)
    assert guidance_fault(pipeline, None) is None
    assert guidance_fault(pipeline, 1.5) is None
    assert guidance_fault(pipeline, 0.0) is not None
    assert guidance_fault(pipeline, 1.0) == "drawn with guidance 1: it takes more than 1"


def test_what_is_not_guided_says_why():
    assert "FluxPipeline does not predict" in guidance_fault(tiny_pipeline("flux dev"), None)
    assert guidance_fault(tiny_pixels(), None) == "a DDPMPipeline draws without prompts"
    distilled = make_pipeline("sd")
    distilled.unet.register_to_config(time_cond_proj_dim=8)
    assert "takes its guidance as an input" in guidance_fault(distilled, 7.5)
    with pytest.raises(ValueError, match="takes more than 1"):
        norms_of(make_pipeline("sd"), guidance=1.0)


def test_training_captions_stand_beside_held_out_ones():
    rng = np.random.default_rng(0)
    training, heldout = rng.normal(12, 1, 60).astype(np.float32), rng.normal(11, 1, 40).astype(np.float32)
    findings = prompt_findings(training, heldout)
    average, area = findings.metrics["prompt_memorization"], findings.metrics["prompt_memorization_auc"]
    assert average.value == pytest.approx(sum(training.tolist()) / 60)
    assert average.baseline == pytest.approx(sum(heldout.tolist()) / 40)
    assert average.low < average.value < average.high
    assert (area.value, area.baseline) == (auc(training, heldout), 0.5)
    assert findings.not_measured == {}
    assert findings.warnings == []
    drawn = findings.histograms["prompt"].series
    assert (sum(drawn["training"]), sum(drawn["heldout"])) == (60, 40)


@pytest.mark.parametrize("heldout", [None, np.zeros(0, dtype=np.float32)])
def test_without_held_out_captions_only_the_mean_is_measured(heldout):
    findings = prompt_findings(np.arange(1, 41, dtype=np.float32), heldout)
    assert findings.metrics.keys() == {"prompt_memorization"}
    assert findings.metrics["prompt_memorization"].baseline is None
    assert findings.not_measured == {"prompt_memorization_auc": "needs captions of held-out images"}
    assert findings.histograms["prompt"].series.keys() == {"training"}


def test_norms_that_are_not_finite_or_not_there_are_not_measured_and_few_are_warned_of():
    norms = np.arange(1, 41, dtype=np.float32)
    broken = np.array([1.0, np.nan], dtype=np.float32)
    both = {"prompt_memorization", "prompt_memorization_auc"}
    assert prompt_findings(norms, broken).not_measured == dict.fromkeys(both, "1 of the 42 norms are not finite")
    assert prompt_findings(norms[:0], norms).not_measured == dict.fromkeys(both, "there are no captions")
    warnings = prompt_findings(norms[:29], norms[:3]).warnings
    assert ["only 29 training" in warnings[0], "only 3 held-out" in warnings[1]] == [True, True]


def test_captions_of_repeated_images_are_averaged_class_by_class():
    norms = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=np.float32)
    found = prompt_by_repeats(norms, np.array([1, 1, 2, 4, 15, 10]))
    assert {label: metric.value for label, metric in found.items()} == {"1": 1.5, "2-4": 6.0, "10 or more": 24.0}
    assert (found["1"].low, found["1"].high) == (1.0, 2.0)
    assert prompt_by_repeats(norms * np.nan, np.ones(6)) == {}
