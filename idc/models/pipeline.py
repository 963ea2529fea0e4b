"""The whole model as a diffusers pipeline: prompt and reference pictures in, a video out; saved as one folder.

It samples through `idc.models.sampling`, as the stages do, so a video is the same, bit for bit, from either. The
scheduler is kept as the record of the shift and as diffusers' word for it; our Euler gives its bits in float32.
Departure from diffusers: codec and conditioners are this kit's own objects, because they load late and move by
themselves; `pipe.encoders` has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from idc.errors import UserError, nearest
from idc.flow.editing import check_strength
from idc.models.checkpoints import Which
from idc.models.conditioning import Encoders
from idc.models.frozen import HUB_ID, dtype_name, first_line, torch_dtype
from idc.models.hub import offline_without_a_network
from idc.models.sampling import Sampler, Sampling, Source, to_uint8
from idc.models.saved import MODEL_INDEX, read_pipeline_folder, save_encoders
from idc.models.shipped import resolve_shipped, shipped_names
from idc.models.system import open_system
from idc.models.transformer import IDCrafterTransformer
from idc.pictures import REFERENCE_AREA, clip_pixels, fit_reference, reference_pixels
from idc.types import SPATIAL_MULTIPLE, Bucket, Sample, Subject

OUTPUTS = ("np", "pt", "pil", "uint8", "latent")
SIZE = {"frames": 81, "height": 480, "width": 832}  # of a video, unless a call or a source says otherwise


class IDCrafterPipelineOutput(BaseOutput):
    """`frames`: the videos, one a prompt, in the form that `output_type` names."""

    frames: Any


class IDCrafterPipeline(DiffusionPipeline):
    """Generate and edit videos of several subjects.

    Args:
        transformer: the video transformer.
        scheduler: of the rectified flow; its shift is that of `sampling`.
        encoders: codec, text conditioner and, where the transformer reads one, VLM conditioner.
        sampling: how it samples unless a call says otherwise.
        compute_dtype: "bfloat16" runs the transformer under autocast.
    """

    model_cpu_offload_seq = "transformer"  # type: ignore[assignment]  # the base has None

    def __init__(
        self,
        transformer: IDCrafterTransformer,
        scheduler: FlowMatchEulerDiscreteScheduler,
        encoders: Any = None,
        sampling: Any = None,
        compute_dtype: str = "float32",
    ) -> None:
        super().__init__()
        if not isinstance(encoders, Encoders):
            raise UserError("encoders: give idc.models.conditioning.Encoders, or load a folder by from_pretrained")
        torch_dtype(compute_dtype)
        settings = sampling if isinstance(sampling, Sampling) else Sampling(**(sampling or {}))
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(sampling=asdict(settings), compute_dtype=compute_dtype)
        self._encoders = encoders

    # Loading and saving ---------------------------------------------------------------------------------------------

    @classmethod
    def from_run(
        cls, path: str | Path, weights: Which = "ema", dtype: str | torch.dtype = "float32"
    ) -> IDCrafterPipeline:
        """The pipeline of a run of `idc fit`: of its newest checkpoint, or of the one named.

        Args:
            path: as in `idc.models.checkpoints.find_checkpoint`.
            weights: "ema" or "raw".
            dtype: "bfloat16" computes in it and keeps the matrices in it, half the memory, as `idc generate` does for
                a run with `compute_dtype: bfloat16`, whose videos stay the same to the bit.

        Raises:
            UserError: no such checkpoint, an incomplete one, or one without its run's config.yaml.
        """
        kept = torch_dtype(dtype)
        system = open_system(path, which=weights)
        return cls(
            system.build_transformer(computes_in=kept).eval(),
            FlowMatchEulerDiscreteScheduler(shift=system.sampling.shift),
            system.encoders,
            system.sampling,
            system.compute_dtype if kept is torch.float32 else dtype_name(kept),
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote: a folder, a hub id, or "toy", which comes with the package.

        Further arguments are as in diffusers.

        Raises:
            UserError: for a folder that is missing, incomplete or of another pipeline.
        """
        folder = resolve_shipped(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = _download(str(pretrained_model_name_or_path), kwargs)
        if not (folder / MODEL_INDEX).is_file():
            raise UserError(f"{folder}: no {MODEL_INDEX}; it should be a folder saved by save_pretrained")
        encoders, _ = read_pipeline_folder(folder)
        kwargs.setdefault("encoders", encoders)
        return super().from_pretrained(folder, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]  # more general
        """Write the pipeline as one folder: weights as safetensors, everything else as JSON."""
        super().save_pretrained(save_directory, **kwargs)
        save_encoders(self._encoders, Path(save_directory))

    # Running --------------------------------------------------------------------------------------------------------

    @property
    def encoders(self) -> Encoders:
        """Codec and conditioners."""
        return self._encoders

    @property
    def sampling(self) -> Sampling:
        """How a call samples by default."""
        return Sampling(**dict(self.config["sampling"]))

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; codec and conditioners follow to the device, each at its next use, and keep their dtype."""
        moved: Any = super().to(*args, **kwargs)
        moved._encoders.place(moved.device)
        return moved

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        references: Sequence[Any] = (),
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        image_guidance: float | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "np",
        source: Any = None,
        strength: float | None = None,
        mask: Tensor | None = None,
        sampling: Sampling | None = None,
        reference_area: int = REFERENCE_AREA,
        return_dict: bool = True,
    ) -> Any:
        """Sample one video a prompt.

        Args:
            prompt: one, or several; each is sampled by itself, so none depends on the others.
            references: a list of 0 to 4 pictures in the prompt's order; with several prompts, one list each. Paths, PIL
                images, arrays or tensors, as in `idc.pictures.reference_pixels`. A prompt may be "" where there is one.
            frames, height, width: 4n + 1 frames, sides in multiples of 16 pixels; None is 81, 480 and 832. An edit
                takes its source's.
            steps, guidance, image_guidance: of the sampler; None is the pipeline's own.
            seed: of the noise, one for all or one a prompt; None draws from `generator`, or takes 0 without one. That
                of a video of `idc generate`, a hash of its recipe's seed and its id, is in `records/<id>.json`.
            output_type: "np" float `[T, H, W, 3]` in [0, 1]; "uint8" the same as bytes; "pt" float `[3, T, H, W]` in
                [-1, 1]; "pil" lists of images; "latent" latents `[16, T, H, W]`.
            source: a clip to edit, as in `idc.pictures.clip_pixels`.
            strength: of the edit, in [0, 1]; None is 0.8.
            mask: bool `[T, H, W]`, True where the source may change.
            sampling: all the sampler's settings at once, in place of the pipeline's.
            reference_area: cap of a reference's area in pixels, as in training. Sides are rounded to multiples of 16.

        Returns:
            `IDCrafterPipelineOutput`, or a tuple with its frames.

        Raises:
            UserError: for a value that breaks its rule, settings of an edit without its source, and a prompt that is
                empty without a reference or source to show.
        """
        if output_type not in OUTPUTS:
            raise UserError(f"output_type={output_type!r}{nearest(output_type, OUTPUTS)}")
        asked = _asked(prompt, references)
        chosen = self._chosen(sampling or self.sampling, steps, guidance, image_guidance)
        seeds = _seeds(seed, generator, len(asked))
        given = {"frames": frames, "height": height, "width": width}
        start, size = _source(source, strength, mask, given)
        if reference_area < SPATIAL_MULTIPLE**2:
            raise UserError(f"reference_area={reference_area}: must be {SPATIAL_MULTIPLE**2} or more")
        for text, pictures in asked:
            if start is None and not pictures and not text.strip():
                raise UserError(f"prompt={text!r} and no reference: nothing says what to show; give one of the two")
        sampler, videos = self.sampler, []
        run = sampler.sampled_latents if output_type == "latent" else sampler.videos
        for (text, pictures), number in zip(asked, seeds, strict=True):
            subjects = tuple(Subject(fit_reference(reference_pixels(picture), reference_area)) for picture in pictures)
            bucket = Bucket(*size, len(subjects)).check()
            sample = Sample("", text, None, subjects, fps=16.0)
            videos.append(run([sample], bucket, torch.tensor([number]), chosen, start)[0])
        self.maybe_free_model_hooks()
        output = [_as(video, output_type) for video in videos]
        shown = output[0] if isinstance(prompt, str) else output
        return IDCrafterPipelineOutput(frames=shown) if return_dict else (shown,)

    @property
    def sampler(self) -> Sampler:
        """The sampler that stages share, over this pipeline's parts."""
        dtype = torch_dtype(self.config["compute_dtype"])
        if self.transformer.dtype is torch.bfloat16:  # loaded so: float32 inputs need the autocast
            dtype = torch.bfloat16
        return Sampler(self.transformer, self._encoders, self._execution_device, dtype)

    @staticmethod
    def _chosen(base: Sampling, steps: int | None, guidance: float | None, image_guidance: float | None) -> Sampling:
        changes: dict[str, Any] = {"steps": steps, "scale": guidance, "image_scale": image_guidance}
        return replace(base, **{name: value for name, value in changes.items() if value is not None})


def _download(name: str, settings: Mapping[str, Any]) -> Path:
    """The local copy of a pipeline on the hub. Names without an owner, as the shipped ones are, ask no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if not HUB_ID.fullmatch(name):
        choices = nearest(name, shipped_names())
        raise UserError(f"{name}: no such folder, nor a model that comes with the package{choices}")
    known = ("cache_dir", "force_download", "local_files_only", "revision", "token")
    try:
        with offline_without_a_network(name):
            return Path(snapshot_download(name, **{key: settings[key] for key in known if key in settings}))
    except (OSError, HFValidationError) as error:
        raise UserError(f"{name}: no such folder, and the hub does not give it ({first_line(error)})") from None


def _seeds(seed: int | Sequence[int] | None, generator: torch.Generator | None, count: int) -> list[int]:
    if seed is None:
        if generator is None:
            return [0] * count
        return torch.randint(2**62, (count,), generator=generator, device=generator.device).tolist()
    seeds = [seed] * count if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise UserError(f"{len(seeds)} seeds for {count} prompts; give one, or one each")
    return seeds


def _asked(prompt: str | Sequence[str], references: Any) -> list[tuple[str, list[Any]]]:
    """Each prompt with its own pictures."""
    if isinstance(prompt, str):
        return [(prompt, _references(references))]
    prompts = list(prompt) if isinstance(prompt, Iterable) else [prompt]
    if not all(isinstance(text, str) for text in prompts):
        raise UserError(f"prompt={prompt!r}: must be text, or a list of texts")
    pictures = _references(references) or [()] * len(prompts)
    if len(pictures) != len(prompts):
        raise UserError(f"{len(pictures)} lists of references for {len(prompts)} prompts; give one each")
    return [(text, _references(own)) for text, own in zip(prompts, pictures, strict=True)]


def _references(references: Any) -> list[Any]:
    """The pictures of one prompt."""
    if references is None:
        return []
    single = (
        isinstance(references, (str, Path)) or hasattr(references, "convert") or getattr(references, "ndim", 0) == 3
    )
    if single or not isinstance(references, Iterable):
        form = "one picture" if single else f"of type {type(references).__name__}"
        raise UserError(f"references: {form}; give a list of pictures, such as references=[picture]")
    return list(references)


def _source(
    clip: Any, strength: float | None, mask: Any, given: Mapping[str, int | None]
) -> tuple[Source | None, tuple[int, int, int]]:
    """What an edit starts from, if anything, and the size of the video; `given` has its `frames`, `height`, `width`."""
    if clip is None:
        for name, value in (("strength", strength), ("mask", mask)):
            if value is not None:
                raise UserError(f"{name} is of an edit, and there is no source: give source, or leave {name} out")
        frames, height, width = (SIZE[name] if value is None else value for name, value in given.items())
        return None, (frames, height, width)
    strength = 0.8 if strength is None else strength
    check_strength(strength)
    video_CTHW = clip_pixels(clip)
    frames, height, width = video_CTHW.shape[1:]
    for (name, value), own in zip(given.items(), (frames, height, width), strict=True):
        if value is not None and value != own:
            raise UserError(f"{name}={value}: the source has {own}, and an edit keeps that; leave {name} out")
    mask_BTHW = None if mask is None else torch.as_tensor(mask)[None]
    return Source(video_CTHW[None], strength, mask_BTHW), (frames, height, width)


def _as(video: Tensor, output_type: str) -> Any:
    if output_type in ("pt", "latent"):
        return video
    if output_type == "np":
        return ((video.float().cpu() + 1) / 2).movedim(0, -1).numpy()
    frames = to_uint8(video)
    if output_type == "uint8":
        return frames
    from PIL import Image

    return [Image.fromarray(frame) for frame in frames]
