"""A diffusers pipeline that generates images of given classes."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples from a class-conditional `UNet2DModel` with DDIM (Song et al., 2020, arXiv 2010.02502).

    diffusers has no such pipeline. It saves itself under the name DDIMPipeline, so that
    `DiffusionPipeline.from_pretrained` loads it anywhere. Its own `from_pretrained` loads that, and class-conditional
    DDPMPipelines.

    Args:
        unet: with `num_class_embeds` or `class_embed_type`.
        scheduler: any with the settings of a DDPM or DDIM scheduler; it becomes a `DDIMScheduler`.
    """

    unet: Any
    scheduler: Any
    model_cpu_offload_seq: Any = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=DDIMScheduler.from_config(scheduler.config))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates one image per label.

        Args:
            class_labels: numbers of classes.
            num_inference_steps: denoising steps.
            eta: 0: DDIM; 1: with the noise of DDPM.
            generator: one for all images, or one per image.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1].
            return_dict: whether to return an object with `images`, or a tuple of one.

        Raises:
            ValueError: the model has no such class, or there are not as many generators as labels.
        """
        labels = self._labels([class_labels] if isinstance(class_labels, int) else list(class_labels))
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(f"{len(generator)} generators for {len(labels)} class_labels: give one per label")
        size = self.unet.config.sample_size
        shape = (len(labels), self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        image = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self.unet(image, t, class_labels=labels).sample
            image = self.scheduler.step(output, t, image, eta=eta, generator=generator).prev_sample
        images = self._finished(image, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def to_json_string(self) -> str:
        """Returns diffusers' model_index.json with the name of a class that every diffusers has."""
        index = json.loads(super().to_json_string())
        return json.dumps(index | {"_class_name": "DDIMPipeline"}, indent=2, sort_keys=True) + "\n"

    def _labels(self, labels: list[int]) -> torch.Tensor:
        count = self.unet.config.num_class_embeds
        if wrong := [label for label in labels if label < 0 or (count is not None and label >= count)]:
            known = "" if count is None else f" to {count - 1}"
            raise ValueError(f"class_labels has {wrong[0]}, and the model's classes are 0{known}")
        return torch.tensor(labels, dtype=torch.int64, device=self._execution_device)

    def _finished(self, image: torch.Tensor, output_type: str) -> Any:
        image = (image / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return image
        array = image.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array
