"""A local editing pipeline of diffusers: Flux Kontext, Qwen-Image-Edit, Flux 2, InstructPix2Pix, and their like."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from idc.curate.candidate import Pixels
from idc.curate.synthetic.editors import EditError, ImageEditor, check_request
from idc.data.plan import stable_hash
from idc.errors import UserError, nearest
from idc.models.frozen import (
    check_complete,
    dtype_name,
    first_line,
    load_model,
    load_weights,
    model_name,
    resolve,
    torch_dtype,
)
from idc.models.judges import picture_processor
from idc.models.weight_hashes import content_hash
from idc.pictures import reference_size

_STEP = 16  # pixels: sides are multiples of it (8x codec, 2x2 patches)


class Editing(NamedTuple):
    """How a class of pipelines wants to be called.

    Attributes:
        pictures: how many it takes, as a list; 1 for those that take one picture.
        guidance: which argument the guidance scale is.
        more: arguments besides.
        negative: a prompt of what should not be seen is needed for guidance to have an effect.
        sized: it takes height and width; others answer in the size of their picture.
        area: height and width are taken for an aspect ratio unless it gets their product as `max_area`.
    """

    pictures: int = 1
    guidance: str = "guidance_scale"
    more: tuple[tuple[str, Any], ...] = ()
    negative: bool = False
    sized: bool = True
    area: bool = False


_QWEN = Editing(guidance="true_cfg_scale", negative=True)
EDITINGS = {
    # Kontext scales all it is given to about a megapixel, whatever size is wanted, unless told not to.
    "FluxKontextPipeline": Editing(more=(("_auto_resize", False),), area=True),
    "Flux2Pipeline": Editing(pictures=8),
    "Flux2KleinPipeline": Editing(pictures=4),
    "QwenImageEditPipeline": _QWEN,
    "QwenImageEditPlusPipeline": _QWEN._replace(pictures=3),
    "StableDiffusionInstructPix2PixPipeline": Editing(sized=False),
    "StableDiffusionXLInstructPix2PixPipeline": Editing(),
}


class DiffusersEditor(ImageEditor):
    """An editing pipeline in this process, deterministic by seed: the noise is drawn on the CPU.

    Which class it is stands in the folder's model_index.json. Other classes than those of `EDITINGS` will do if they
    can be called with `image` and `prompt`: they get one picture.

    Args:
        path: a folder saved with save_pretrained, or a hub id.
        dtype: of weights and activations.
        steps: of denoising; None for the pipeline's own number.
        guidance: guidance scale (for the Qwen class that of true guidance); None for the pipeline's own.
        offload: on a GPU keep only the part that works there (accelerate's model offload): slower, and fits.

    Raises:
        UserError: for settings out of range, or a local folder without a pipeline that edits.
    """

    backend: ClassVar[str] = "diffusers"
    weights = "an image-editing pipeline of diffusers: model_index.json and a folder for each part"

    def __init__(
        self,
        path: str = "black-forest-labs/FLUX.1-Kontext-dev",
        dtype: str | torch.dtype = "bfloat16",
        steps: int | None = None,
        guidance: float | None = None,
        offload: bool = False,
    ) -> None:
        if steps is not None and steps < 1:
            raise UserError(f"steps={steps}: must be at least 1, or None for the pipeline's own number")
        if guidance is not None and guidance < 0:
            raise UserError(f"guidance={guidance}: must be 0 or more, or None for the pipeline's own")
        self.path, self.dtype, self.steps, self.guidance = path, torch_dtype(dtype), steps, guidance
        self.offload = offload
        self._pipeline: Any = None
        self._index: dict[str, Any] = {}  # model_index.json

    @property
    def name(self) -> str:
        return model_name(self.path)

    @property
    def version(self) -> str:
        """Of a local folder a hash over names and contents of weights and settings; of a hub id nothing is known."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            return ""
        files = sorted(file for end in ("*.safetensors", "*.json") for file in folder.rglob(end))
        return stable_hash([[file.relative_to(folder).as_posix(), content_hash(file)] for file in files])

    @property
    def max_pictures(self) -> int:  # type: ignore[override]
        return self._editing.pictures

    def describe(self) -> dict[str, Any]:
        """Where the weights lie is no part of it."""
        settings = {"steps": self.steps, "guidance": self.guidance, "dtype": dtype_name(self.dtype)}
        model = {"name": self.name, "version": self.version}
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **model, **settings}

    def load(self, device: torch.device | str = "cpu") -> None:
        if self._pipeline is None:
            self._pipeline = self._build()
        if self.offload and torch.device(device).type == "cuda":
            self._pipeline.enable_model_cpu_offload(device=device)
        else:
            self._pipeline.to(device)

    def unload(self) -> None:
        self._pipeline = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pipeline": None}

    def edit(self, pictures: Sequence[Pixels], prompt: str, seed: int, size: tuple[int, int]) -> Pixels:
        """As `ImageEditor.edit`; sides are rounded to multiples of 16 pixels, and larger pictures shrunk to the area.

        Raises:
            UserError: also where the device's memory does not do.
        """
        check_request(self, pictures, prompt, size)
        if self._pipeline is None:
            self.load()
        height, width = (max(_STEP, round(side / _STEP) * _STEP) for side in size)
        given = [_fitted(picture, height * width) for picture in pictures]
        arguments = self._arguments(prompt, height, width)
        arguments["image"] = given if self._editing.pictures > 1 else given[0]
        # The CPU's generator gives the same noise whatever the device.
        arguments["generator"] = torch.Generator().manual_seed(seed)
        try:
            with torch.no_grad(), torch.autocast(self._pipeline.device.type, enabled=False):
                answer = self._pipeline(**arguments, output_type="np")
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"size={size}: {self.name} needs more memory than there is ({first_line(error)}); "
                "set offload: true, a smaller size, or a smaller pipeline"
            ) from None
        if any(getattr(answer, "nsfw_content_detected", None) or ()):
            raise EditError("refused", "the pipeline's safety checker turned the picture down")
        return _pixels(answer.images[0])

    @property
    def _editing(self) -> Editing:
        return EDITINGS.get(self._pipeline_class, Editing())

    @property
    def _pipeline_class(self) -> str:
        """The class that model_index.json names: the hub is asked for it once."""
        if not self._index:
            folder = resolve(self.path, "", self.weights, marker="model_index.json")
            self._index = json.loads((folder / "model_index.json").read_text()) if folder else self._hub_index()
        return str(self._index.get("_class_name"))

    def _hub_index(self) -> dict[str, Any]:
        from diffusers import DiffusionPipeline

        return load_weights(self.path, self.weights, lambda: DiffusionPipeline.load_config(self.path))

    def _build(self) -> Any:
        import diffusers

        named = self._pipeline_class
        cls = getattr(diffusers, named, None)
        if cls is None or not {"image", "prompt"} <= set(inspect.signature(cls.__call__).parameters):
            rule = "diffusers has no such class" if cls is None else "it does not edit a picture by a prompt"
            raise UserError(f"path={self.path!r}: is a {named}, and {rule}{nearest(named, EDITINGS)}")
        parts = self._parts()
        settings = {"torch_dtype": self.dtype, "use_safetensors": True, **parts}
        pipeline = load_weights(self.path, self.weights, lambda: cls.from_pretrained(self.path, **settings))
        for part, module in pipeline.components.items():
            if isinstance(module, torch.nn.Module):
                check_complete(module, f"path={self.path!r}: {part}", f"it should contain {self.weights}")
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _parts(self) -> dict[str, Any]:
        """What diffusers would load otherwise: models of transformers, whose missing tensors it would let be drawn, and
        processors, whose part for videos wants torchvision."""
        import transformers

        parts = {}
        for part, named in self._index.items():
            if not isinstance(named, list) or named[0] != "transformers":
                continue
            cls = getattr(transformers, str(named[1]), None)
            if cls is None or not inspect.isclass(cls):
                continue
            if issubclass(cls, transformers.PreTrainedModel):
                parts[part] = load_model(cls, self.path, self.weights, self.dtype, subfolder=part)
            elif issubclass(cls, transformers.ProcessorMixin):
                where = {"subfolder": part}
                parts[part] = load_weights(self.path, self.weights, partial(picture_processor, cls, self.path, **where))
        return parts

    def _arguments(self, prompt: str, height: int, width: int) -> dict[str, Any]:
        editing = self._editing
        arguments: dict[str, Any] = {"prompt": prompt, **dict(editing.more)}
        if editing.sized:
            arguments |= {"height": height, "width": width}
        if editing.area:
            arguments["max_area"] = height * width
        if self.steps is not None:
            arguments["num_inference_steps"] = self.steps
        if self.guidance is not None:
            arguments[editing.guidance] = self.guidance
        if editing.negative and (self.guidance is None or self.guidance > 1):
            arguments["negative_prompt"] = " "
        return arguments


def _fitted(picture_HWC: Pixels, area: int) -> Any:
    """As a PIL image of sides in multiples of 16 and at most `area` pixels."""
    from PIL import Image

    height, width = reference_size(picture_HWC.shape[0], picture_HWC.shape[1], area)
    return Image.fromarray(picture_HWC).resize((width, height), Image.Resampling.LANCZOS)


def _pixels(image_HWC: Any) -> Pixels:
    values = np.asarray(image_HWC, np.float32)
    if not np.isfinite(values).all():
        raise EditError("not finite", "the pipeline's picture holds values that are no numbers")
    return (values.clip(0, 1) * 255).round().astype(np.uint8)
