"""The common flags of kohya's scripts."""

from .answers import Trainer, renamed, same, unneeded, unsupported

_ROUNDS = "counts rounds, at whose ends the clones are merged"
_STEPS = "counts the steps of all clones, and what it writes is for resuming"
_BUCKETS = renamed("aspect_ratio_buckets", "auto makes sizes up to twice as long as wide, or list your own")
_TAGS = unsupported("write several captions into a text file, a line each, and one is drawn at each visit")
_ATTENTION = unneeded("torch's own attention is used")
_TEXT_ENCODER = unsupported("only the denoiser is trained, text encoders stay as they are")
_FP32 = unsupported("weights are trained in fp32, and `--mixed_precision bf16` computes in bf16")
_FROZEN = unsupported("with `--use_lora`, `--mixed_precision bf16` stores the frozen weights in bf16")
_QUANTISED = renamed("quantize_base", "nf4 or int8, together with `--use_lora`")
_MEMORY = unneeded("weights are loaded where they are needed")
_LOSS = unsupported("the loss is the squared error")
_CACHED = renamed("cache_latents", "it is on unless switched off, and keeps images and captions on disk")

KOHYA = Trainer(
    "kohya's sd-scripts",
    "train_network.py of sd-scripts 0.10.1, the common flags",
    {
        # The model.
        "pretrained_model_name_or_path": same(
            "a pipeline in diffusers' format, or a .safetensors file, offline with `--base_config`"
        ),
        "v2": unneeded("the pipeline says what it is"),
        "v_parameterization": renamed(
            "prediction_type v_prediction", "only if the pipeline's scheduler says otherwise"
        ),
        "vae": unsupported("load the pipeline with that VAE, save it with `save_pretrained`, and give its folder"),
        "no_half_vae": unneeded("the VAE always computes in fp32"),
        "clip_skip": unsupported("captions are encoded as the pipeline encodes prompts"),
        "max_token_length": unsupported("longer captions are cut off, and the first lines of a run say how many"),
        "weighted_captions": unsupported("captions are encoded as they stand"),
        # LoRA.
        "network_module": renamed("use_lora", "takes no value, and LyCORIS is not supported"),
        "network_dim": renamed("rank", "together with `--use_lora`"),
        "network_alpha": renamed("lora_alpha", "together with `--use_lora`, the rank if not given, and not 1"),
        "network_dropout": renamed("lora_dropout", "together with `--use_lora`"),
        "network_args": unsupported("`--lora_layers` names the layers that get an adapter"),
        "network_weights": renamed(
            "init_lora", "together with `--use_lora` and the `--rank` of the file, or a higher one"
        ),
        "network_train_unet_only": unneeded("only the denoiser is ever trained"),
        "network_train_text_encoder_only": _TEXT_ENCODER,
        "scale_weight_norms": unsupported("`--adam_weight_decay` keeps weights small"),
        "save_precision": renamed("save_dtype", "float32, float16 or bfloat16"),
        "save_model_as": unneeded("weights are always saved as .safetensors"),
        "output_dir": same(),
        "output_name": unneeded("files in `--output_dir` have the names that diffusers loads them by"),
        # The images.
        "train_data_dir": same("with `--caption_from folder`, the number in a name such as `10_sks dog` counts"),
        "dataset_config": unsupported("give one folder as `--train_data_dir`"),
        "config_file": renamed("config", "a YAML file with the flags of this program"),
        "in_json": unneeded("a file metadata.json in `--train_data_dir` is read"),
        "dataset_repeats": unsupported("raise `--num_train_epochs`"),
        "reg_data_dir": renamed("class_data_dir", "together with `--class_prompt`, the caption of those without one"),
        "prior_loss_weight": same("together with `--class_prompt`"),
        "caption_extension": unneeded(".txt and .caption files beside the images are read"),
        "shuffle_caption": _TAGS,
        "keep_tokens": _TAGS,
        "caption_tag_dropout_rate": _TAGS,
        "caption_dropout_rate": renamed("caption_dropout"),
        "caption_dropout_every_n_epochs": unsupported("`--caption_dropout` drops captions in all passes"),
        "resolution": same("one number, the side of a square"),
        "enable_bucket": renamed("aspect_ratio_buckets auto", "sizes with about as many pixels as the square"),
        "min_bucket_reso": _BUCKETS,
        "max_bucket_reso": _BUCKETS,
        "bucket_reso_steps": _BUCKETS,
        "bucket_no_upscale": renamed("no_upscale", "together with `--aspect_ratio_buckets`"),
        "random_crop": unneeded("images are cropped at random unless `--center_crop` is given"),
        "flip_aug": renamed("random_flip"),
        "color_aug": unsupported("`--random_flip` is the only change to images"),
        "masked_loss": unsupported("all parts of an image count alike"),
        "alpha_mask": unsupported("all parts of an image count alike"),
        "validation_split": renamed("holdout_fraction"),
        "cache_latents": same("it is on unless switched off"),
        "cache_latents_to_disk": _CACHED,
        "cache_text_encoder_outputs": _CACHED,
        "cache_text_encoder_outputs_to_disk": _CACHED,
        "vae_batch_size": unneeded("images are encoded in chunks of up to 8"),
        "max_data_loader_n_workers": renamed("dataloader_num_workers"),
        "persistent_data_loader_workers": unneeded("the program decides when workers end"),
        # How long, and how much at a time.
        "train_batch_size": same("16 if not given, and not 1"),
        "gradient_accumulation_steps": same(),
        "max_train_epochs": renamed("num_train_epochs", "`--max_train_steps` overrides it"),
        "max_train_steps": same("the steps of each clone, so give your number as `--total_train_steps` instead"),
        "seed": same("0 if not given"),
        "gradient_checkpointing": same(),
        "mixed_precision": same(),
        "full_fp16": _FP32,
        "full_bf16": _FP32,
        "fp8_base": _QUANTISED,
        "fp8_base_unet": _QUANTISED,
        "blocks_to_swap": _FROZEN,
        "lowram": _MEMORY,
        "highvram": _MEMORY,
        "deepspeed": unsupported("each GPU trains a clone of its own, or several share one"),
        "ddp_timeout": same("in seconds, not in minutes"),
        "torch_compile": renamed("compile"),
        "xformers": _ATTENTION,
        "sdpa": _ATTENTION,
        "mem_eff_attn": _ATTENTION,
        # The loss.
        "min_snr_gamma": renamed("snr_gamma"),
        "debiased_estimation_loss": unsupported("`--snr_gamma` weighs noise levels, by another rule"),
        "noise_offset": same(),
        "multires_noise_iterations": unsupported("`--noise_offset` changes the noise in another way"),
        "multires_noise_discount": unsupported("`--noise_offset` changes the noise in another way"),
        "ip_noise_gamma": unsupported("`--noise_offset` changes the noise in another way"),
        "zero_terminal_snr": unsupported("save the pipeline with such a scheduler, and give its folder"),
        "loss_type": _LOSS,
        "huber_c": _LOSS,
        "weighting_scheme": same("the model's own if not given"),
        "logit_mean": same(),
        "logit_std": same(),
        "mode_scale": same(),
        # The optimizer.
        "optimizer_type": unsupported("AdamW is the only optimizer, and `--use_8bit_adam` is AdamW8bit"),
        "optimizer_args": unsupported("give `--adam_weight_decay`, `--adam_beta1` and the like"),
        "use_8bit_adam": same(),
        "learning_rate": same("1e-4 if not given"),
        "unet_lr": renamed("learning_rate"),
        "text_encoder_lr": _TEXT_ENCODER,
        "lr_scheduler": same("over the steps of each clone"),
        "lr_warmup_steps": same("500 if not given, a number of steps of each clone and no share"),
        "lr_scheduler_num_cycles": unsupported("there is one cycle"),
        "lr_scheduler_power": unsupported("the power is 1"),
        "max_grad_norm": same(),
        # What a run keeps and shows.
        "save_every_n_epochs": renamed("save_every_rounds", _ROUNDS),
        "save_every_n_steps": renamed("checkpointing_steps", _STEPS),
        "save_last_n_epochs": renamed("checkpoints_total_limit"),
        "save_last_n_steps": renamed("checkpoints_total_limit"),
        "save_state": unneeded("every checkpoint has all that resuming needs"),
        "save_state_on_train_end": unneeded("the last merge writes a checkpoint"),
        "resume": renamed("resume_from_checkpoint", "reads the checkpoints of this program"),
        "sample_prompts": renamed("validation_prompts", "takes the prompts themselves and not a file"),
        "sample_every_n_epochs": renamed("validation_rounds", _ROUNDS),
        "sample_every_n_steps": renamed("validation_rounds", _ROUNDS),
        "sample_at_first": unneeded("images of `--validation_prompts` are always drawn before training too"),
        "sample_sampler": unsupported("validation images are drawn with the pipeline's own scheduler"),
        "logging_dir": same("a folder inside `--output_dir`"),
        "log_with": renamed("report_to"),
        "log_tracker_name": renamed("tracker_project_name"),
        "wandb_api_key": unneeded("`wandb login` stores it"),
        "huggingface_repo_id": renamed("hub_model_id", "together with `--push_to_hub`"),
        "huggingface_token": renamed("hub_token"),
        "huggingface_repo_visibility": renamed("hub_private_repo", "takes no value"),
    },
)
