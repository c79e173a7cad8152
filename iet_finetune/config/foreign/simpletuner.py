"""The common flags of SimpleTuner."""

from .answers import Trainer, renamed, same, unneeded, unsupported

_ROUNDS = "counts rounds, at whose ends the clones are merged"
_STEPS = "counts the steps of all clones, and every merge writes a checkpoint too"
_SIZES = unsupported("sort out images by their size before, as a run warns of small ones and uses them")
_FROZEN = unsupported("with `--use_lora`, `--mixed_precision bf16` stores the frozen weights in bf16")
_LAUNCHER = unneeded("give it to `accelerate launch`")
_TEXT_ENCODER = unsupported("only the denoiser is trained, text encoders stay as they are")
_CAPTIONS = unsupported("`--default_caption` is for images without a caption of their own")
_VAE = unneeded("images are encoded once, before training, and the VAE then leaves the GPU")
_SHIFT = unsupported("noise levels are those of the pipeline's scheduler, drawn as `--weighting_scheme` says")
_SHARDED = unsupported("each GPU trains a clone of its own, or several share one")
_OPTIMIZER = unsupported("AdamW is the only optimizer, and `--use_8bit_adam` keeps its state in 8 bits")

SIMPLETUNER = Trainer(
    "SimpleTuner",
    "SimpleTuner 4.8.0, the common flags",
    {
        # The model.
        "pretrained_model_name_or_path": same("a pipeline in diffusers' format, or a .safetensors file"),
        "model_type": renamed("use_lora", "takes no value, and without it the whole denoiser is trained"),
        "model_family": unneeded("the pipeline says what it is"),
        "model_flavour": unneeded("`--pretrained_model_name_or_path` says it"),
        "revision": same(),
        "variant": same(),
        "pretrained_vae_model_name_or_path": unsupported(
            "load the pipeline with that VAE, save it with `save_pretrained`, and give its folder"
        ),
        "pretrained_transformer_model_name_or_path": unsupported(
            "load the pipeline with that transformer, save it with `save_pretrained`, and give its folder"
        ),
        "prediction_type": same(),
        "base_model_precision": renamed("quantize_base", "nf4 or int8, together with `--use_lora`"),
        "base_model_default_dtype": _FROZEN,
        "quantize_via": unneeded("weights are quantised where they are trained on, one at a time"),
        "trust_remote_code": unsupported("code from a model's repository is never run"),
        "controlnet": unsupported("the denoiser of the pipeline is trained"),
        # LoRA.
        "lora_rank": renamed("rank", "together with `--use_lora`, 4 if not given, and not 16"),
        "lora_alpha": same("together with `--use_lora`"),
        "lora_dropout": same("together with `--use_lora`"),
        "lora_type": unsupported("adapters are LoRA as in peft, not LyCORIS"),
        "lycoris_config": unsupported("adapters are LoRA as in peft, not LyCORIS"),
        "lora_format": same("takes `kohya` in place of `comfyui`, and if not given, names that most tools match"),
        "lora_init_type": unsupported("A begins random and B at 0, as in peft"),
        "init_lora": same("together with `--use_lora` and the `--rank` of the file, or a higher one"),
        "flux_lora_target": renamed("lora_layers", "takes the names of the layers"),
        "peft_lora_target_modules": renamed("lora_layers", "takes the names of the layers, separated by commas"),
        "use_dora": same("refused, as clones could not be merged exactly"),
        # The images.
        "data_backend_config": unsupported("give one folder as `--train_data_dir`, or `--dataset_name`"),
        "caption_strategy": unneeded(
            "captions are read from tables and text files, and `--caption_from folder` takes the folder's name"
        ),
        "instance_prompt": same("for images without a caption of their own"),
        "only_instance_prompt": _CAPTIONS,
        "prepend_instance_prompt": _CAPTIONS,
        "parquet_caption_column": renamed("caption_column"),
        "caption_dropout_probability": renamed("caption_dropout", "0 if not given, and not 0.1"),
        "resolution": same("always the side in pixels, 512 if not given, and not 1024"),
        "resolution_type": unneeded("`--resolution` is in pixels, the side of a square"),
        "aspect_bucket_rounding": unneeded(
            "`--aspect_ratio_buckets` takes for each image the size of the nearest shape"
        ),
        "aspect_bucket_alignment": renamed(
            "aspect_ratio_buckets", "auto takes multiples of 64 pixels, or list your own sizes"
        ),
        "minimum_image_size": _SIZES,
        "maximum_image_size": _SIZES,
        "target_downsample_size": unneeded("images are scaled to `--resolution` before they are cropped"),
        "delete_problematic_images": renamed("skip_bad_images", "leaves them out and deletes nothing"),
        "cache_dir": same(),
        "cache_dir_vae": renamed("cache_dir"),
        "cache_dir_text": renamed("cache_dir"),
        "vae_cache_ondemand": renamed("no_cache_latents", "encodes images and captions in every step"),
        "vae_cache_disable": renamed("no_cache_latents", "encodes images and captions in every step"),
        "vae_batch_size": unneeded("images are encoded in chunks of up to 8"),
        "vae_dtype": unneeded("the VAE always computes in fp32"),
        "keep_vae_loaded": _VAE,
        "max_workers": renamed("dataloader_num_workers"),
        "eval_dataset_id": renamed("holdout_data_dir", "a folder of images, or give `--holdout_fraction`"),
        # How long, and how much at a time.
        "train_batch_size": same("images of a clone, however many GPUs there are, 16 if not given"),
        "gradient_accumulation_steps": same(),
        "num_train_epochs": same("100 if not given"),
        "max_train_steps": same(
            "the steps of each clone, so give your number as `--total_train_steps` instead, and leave out 0"
        ),
        "output_dir": same(),
        "seed": same("0 if not given"),
        "mixed_precision": same(),
        "gradient_checkpointing": same(),
        "gradient_checkpointing_interval": unsupported("`--gradient_checkpointing` is for all blocks"),
        "attention_mechanism": unneeded("torch's own attention is used, which is SimpleTuner's default too"),
        "disable_tf32": unneeded("TF32 is off unless `--allow_tf32` is given"),
        "set_grads_to_none": unneeded("gradients are always set to none"),
        "dynamo_backend": renamed("compile", "takes no value"),
        "num_processes": _LAUNCHER,
        "num_machines": _LAUNCHER,
        "machine_rank": _LAUNCHER,
        "main_process_ip": _LAUNCHER,
        "local_rank": unneeded("the launcher says it in the environment"),
        "deepspeed_config": _SHARDED,
        "fsdp_enable": _SHARDED,
        # The loss.
        "snr_gamma": same("leave it out rather than give 0"),
        "noise_offset": same("0 if not given, and not 0.1"),
        "offset_noise": renamed("noise_offset 0.1"),
        "input_perturbation": unsupported("`--noise_offset` changes the noise in another way"),
        "loss_type": unsupported("the loss is the squared error"),
        "masked_loss_probability": unsupported("all parts of an image count alike"),
        "rescale_betas_zero_snr": unsupported("save the pipeline with such a scheduler, and give its folder"),
        "flow_schedule_shift": _SHIFT,
        "flow_schedule_auto_shift": _SHIFT,
        "flow_sigmoid_scale": renamed("logit_std", "together with `--weighting_scheme logit_normal`"),
        "flow_use_uniform_schedule": renamed("weighting_scheme none"),
        "flux_guidance_value": renamed("guidance_scale"),
        "tokenizer_max_length": renamed("max_sequence_length", "for T5 alone"),
        # The optimizer.
        "optimizer": _OPTIMIZER,
        "optimizer_config": _OPTIMIZER,
        "optimizer_beta1": renamed("adam_beta1"),
        "optimizer_beta2": renamed("adam_beta2"),
        "adam_beta1": same(),
        "adam_beta2": same(),
        "adam_weight_decay": same(),
        "adam_epsilon": same(),
        "learning_rate": same("1e-4 if not given, and not 4e-7"),
        "lr_scheduler": same("over the steps of each clone, constant if not given, and without sine"),
        "lr_warmup_steps": same("steps of each clone, so divide your number by `--num_shards`"),
        "lr_num_cycles": unsupported("there is one cycle"),
        "lr_power": unsupported("the power is 1"),
        "lr_end": unsupported("`--lr_scheduler polynomial` ends at 1e-7"),
        "max_grad_norm": same(),
        "train_text_encoder": _TEXT_ENCODER,
        "text_encoder_lr": _TEXT_ENCODER,
        "use_ema": same(),
        "ema_decay": renamed("ema_max_decay"),
        "ema_device": unneeded("only the average of the clone in training is on the GPU"),
        "ema_cpu_only": unneeded("only the average of the clone in training is on the GPU"),
        # What a run keeps, shows and publishes.
        "checkpoint_step_interval": renamed("checkpointing_steps", _STEPS),
        "checkpoint_epoch_interval": renamed("checkpointing_steps", _STEPS),
        "checkpoints_total_limit": same(),
        "resume_from_checkpoint": same("reads the checkpoints of this program"),
        "validation_prompt": renamed("validation_prompts", "takes several"),
        "validation_prompt_library": unsupported("give `--validation_prompts`"),
        "user_prompt_library": renamed("validation_prompts", "takes the prompts themselves and not a file"),
        "validation_step_interval": renamed("validation_rounds", _ROUNDS),
        "validation_epoch_interval": renamed("validation_rounds", _ROUNDS),
        "num_validation_images": same("images of each prompt, 4 if not given"),
        "validation_guidance": renamed("validation_guidance_scale"),
        "validation_num_inference_steps": renamed("validation_inference_steps"),
        "validation_resolution": unsupported("validation images have the size of `--resolution`"),
        "validation_seed": unneeded("it follows from `--seed`"),
        "validation_negative_prompt": unsupported("validation images are drawn without one"),
        "validation_disable": unneeded("images are drawn only if `--validation_prompts` are given"),
        "logging_dir": same("a folder inside `--output_dir`"),
        "report_to": same("one tracker, or all"),
        "tracker_project_name": same(),
        "tracker_run_name": unsupported("the tracker names the run"),
        "push_to_hub": same(),
        "hub_model_id": same("the folder of the result is `--output_dir` itself"),
        "model_card_private": renamed("hub_private_repo", "off if not given"),
        "push_checkpoints_to_hub": unsupported("only the finished pipeline is uploaded"),
    },
)
