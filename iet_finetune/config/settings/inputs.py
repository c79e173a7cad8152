"""What goes into a run: the pipeline and the images."""

from dataclasses import dataclass

from ..flags import fixed, free, other
from ..sizes import named_sizes
from .checks import at_least_one, not_negative, probability, require

# Networks that `--model_config` knows by name.
PRESETS = ("afhq_dog", "cifar10", "cifar100", "fashion_mnist")
UNUSED = "Makes no difference here."


@dataclass(frozen=True)
class ModelConfig:
    """The pipeline that is fine-tuned."""

    pretrained_model_name_or_path: str | None = other(
        None,
        "Hub id or folder of the diffusers pipeline to fine-tune, or a checkpoint file such as model.safetensors.",
        scope="named",
        names=("pipeline",),
        brief="Hub id, folder or .safetensors file of the pipeline to fine-tune.",
        audit="run",
        audit_help="Hub id, folder or checkpoint file of the pipeline that a LoRA file is for.",
    )
    base_config: str | None = other(
        None,
        "For a checkpoint file: Hub id or folder of a diffusers pipeline of its kind, whose configuration and "
        "tokenizers are used. By default diffusers recognizes the kind and downloads them.",
        scope="named",
        names=("pipeline",),
        audit="given",
    )
    model_config: str | None = other(
        None,
        "Instead, train from scratch: a JSON or YAML file with the configuration of a UNet2DModel and, if wanted, "
        "of a DDPMScheduler as `scheduler`, or one of " + ", ".join(PRESETS) + ".",
        scope="named",
        known=PRESETS,
        names=("pipeline",),
        instead_of="pretrained_model_name_or_path",
    )
    revision: str | None = other(
        None,
        "Revision of the pipeline on the Hub: branch, tag or commit.",
        scope="public",
        names=("pipeline",),
        audit="given",
    )
    variant: str | None = other(
        None,
        "Variant of the weight files to load, such as fp16.",
        scope="public",
        names=("pipeline",),
        audit="given",
    )
    cache_dir: str | None = other(
        None, "Where downloaded models, datasets and encoded images are kept.", scope="local", audit="run"
    )
    prediction_type: str | None = fixed(
        None,
        "What the denoiser predicts; overrides the scheduler's own setting.",
        choices=("epsilon", "v_prediction"),
        needs="noise schedule",
        audit="run",
    )
    save_dtype: str | None = other(
        None,
        "Precision of the saved denoiser; the one it was loaded in if not given.",
        choices=("float32", "float16", "bfloat16"),
    )

    def __post_init__(self) -> None:
        if self.model_config is None:
            return
        for name in ("pretrained_model_name_or_path", "base_config", "revision", "variant"):
            value = getattr(self, name)
            require(
                value is None, f"`--model_config` starts from scratch, without `--{name} {value}`: give one of them."
            )


@dataclass(frozen=True)
class DataConfig:
    """The images, their captions, and what is done to them before training."""

    train_data_dir: str | None = other(
        None,
        "Folder of images, with captions in metadata.jsonl or .csv, or in a text file beside each.",
        scope="local",
        names=("dataset",),
        brief="Folder of images, with captions in a table or in text files.",
        audit="run",
    )
    dataset_name: str | None = other(
        None,
        "Dataset on the Hub, or a folder in any format that `datasets` reads.",
        scope="named",
        names=("dataset",),
        instead_of="train_data_dir",
        brief="Instead, a dataset on the Hub, or a folder that `datasets` reads.",
        audit="run",
    )
    dataset_config_name: str | None = other(
        None,
        "Configuration of the dataset, if it has several.",
        scope="public",
        names=("dataset",),
        audit="run",
    )
    dataset_split: str = other(
        "train",
        "Split of the dataset to train on.",
        scope="public",
        names=("dataset",),
        audit_help="Split of the dataset that was trained on. (default: train)",
        audit="run",
    )
    image_column: str = other("image", "Column with the images.", scope="public", audit="run")
    caption_column: str = other(
        "text",
        "Column with the captions: a text, or a list of texts, one of which is drawn at each visit.",
        needs="captions",
        scope="public",
        audit="run",
    )
    default_caption: str | None = other(
        None,
        "Caption of images that have none.",
        needs="captions",
        scope="public",
        audit="run",
    )
    instance_prompt: str | None = other(
        None,
        "The same, as DreamBooth's scripts call it.",
        needs="captions",
        scope="public",
        instead_of="default_caption",
        audit="run",
    )
    caption_from: str = other(
        "files",
        "folder: an image without a caption gets its folder's name. A name such as `10_sks dog` also means that its "
        "images are visited ten times in each pass.",
        choices=("files", "folder"),
        needs="captions",
        audit="run",
    )
    skip_bad_images: bool = other(
        False, "Leave out images that cannot be read, and list them in a file, instead of ending.", audit="run"
    )
    class_column: str | None = other(
        None,
        "Column with the classes, for a model that takes them: numbers from 0, or texts, numbered in sorted order.",
        scope="public",
        audit="run",
    )
    max_train_samples: int | None = other(
        None,
        "Train on a random subset of this many images.",
        smoke=None,
        audit="recorded",
        audit_help="The training was on a random subset of this many images.",
    )
    holdout_fraction: float = other(
        0.0,
        "Share of the images held out of training, to tell when to stop and for the audit.",
        smoke=0.0,
        audit="recorded",
    )
    dedup: str = fixed(
        "none",
        "Leave out training images that are copies of earlier ones: with the same pixels (exact), or also shifted, "
        "scaled, compressed or brightened (near). Mirrored images are copies too.",
        choices=("none", "exact", "near"),
    )
    resolution: int = fixed(
        512,
        "Side of the square training images in pixels.",
        brief=True,
        audit="recorded",
        audit_help="Side of the square images in pixels; by default that of training, else that of the pipeline.",
    )
    aspect_ratio_buckets: str | None = fixed(
        None,
        "Instead of cropping every image to a square, crop each to the size nearest to its shape. auto: sizes with "
        "about as many pixels as the square of `--resolution` but no more, and no side over twice the other. Or a "
        "list of sizes, such as 1024x1024,832x1216, width first. A micro-batch holds images of one size; `--compile` "
        "compiles for each size.",
        scope="public",
        brief="Train on images of several shapes; auto, or WIDTHxHEIGHT,... in pixels.",
        audit="recorded",
        audit_help="The sizes that were trained on: losses are measured at them, everything else on squares.",
    )
    upscale: bool = fixed(
        True,
        "With `--aspect_ratio_buckets`, enlarge images that are smaller than the size of their shape; `--no_upscale` "
        "gives them a smaller size.",
        audit="recorded",
    )
    center_crop: bool = free(
        False, "Crop at the centre; otherwise at a place drawn once for each image.", audit="recorded"
    )
    random_flip: bool = free(
        False,
        "Mirror half of the images, drawn anew in every pass.",
        audit_help="Makes no difference here: mirrored copies are always looked for.",
        audit="run",
    )
    image_interpolation_mode: str = free(
        "lanczos",
        "Filter for resizing.",
        choices=("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"),
        audit="recorded",
    )
    max_image_pixels: int = free(
        178_956_970,
        "Largest image to decode, in pixels. A larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size unless it is "
        "progressive; other images are refused.",
        audit="run",
    )
    caption_dropout: float = free(
        0.0,
        "Probability that a caption is replaced by the empty one.",
        needs="captions",
        audit="run",
        audit_help=UNUSED,
    )
    cache_latents: bool = other(
        True,
        "Encode images and captions once, before training, and keep the result for this and later runs.",
        audit="run",
        audit_help=UNUSED,
    )
    dataloader_num_workers: int = other(
        0,
        "Processes that read images ahead; 0 reads in the main process.",
        per_machine=True,
        smoke=0,
        audit="run",
        audit_help=UNUSED,
    )

    def __post_init__(self) -> None:
        require(
            self.train_data_dir is None or self.dataset_name is None,
            "`--train_data_dir` and `--dataset_name` cannot both be given: choose one source of images.",
        )
        require(
            self.default_caption is None or self.instance_prompt is None,
            "`--default_caption` and `--instance_prompt` are the same and cannot both be given: choose one.",
        )
        require(self.resolution >= 8, f"`--resolution` must be at least 8 pixels, not {self.resolution}.")
        named_sizes(self.aspect_ratio_buckets)
        require(
            self.upscale or self.aspect_ratio_buckets is not None,
            "`--no_upscale` goes with `--aspect_ratio_buckets`: without it every image becomes a square of "
            "`--resolution`.",
        )
        at_least_one("max_train_samples", self.max_train_samples)
        at_least_one("max_image_pixels", self.max_image_pixels)
        probability("caption_dropout", self.caption_dropout)
        require(
            0 <= self.holdout_fraction < 1, f"`--holdout_fraction` must be in [0, 1), not {self.holdout_fraction}."
        )
        not_negative("dataloader_num_workers", self.dataloader_num_workers)

    @property
    def usual_caption(self) -> str | None:
        """The caption of images without another one, `--default_caption` or `--instance_prompt`; None if not given."""
        return self.default_caption if self.instance_prompt is None else self.instance_prompt
