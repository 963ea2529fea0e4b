"""What samples: the parts of a trained model, from a checkpoint of a run or from a pipeline's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idc.errors import UserError
from idc.models.checkpoints import Checkpoint, Which, find_checkpoint, load_weights, read_rewards, read_weights
from idc.models.codecs import Codec
from idc.models.conditioners import TextConditioner
from idc.models.conditioning import Encoders
from idc.models.frozen import weights_config, weights_identity
from idc.models.rounding import round_matrices
from idc.models.sampling import Sampling, SamplingChanges
from idc.models.saved import MODEL_INDEX, RECORD, read_pipeline_folder
from idc.models.shipped import resolve_shipped
from idc.models.spec import IDBlocks, Lora, Trainable, TransformerSpec
from idc.models.speed import Speed
from idc.models.vlm import VLMConditioner


@dataclass
class Parts:
    """The settings of a model, as a recipe's `model.init_args` holds them; None where nobody has said."""

    transformer: TransformerSpec | None = None
    codec: Codec | None = None
    text: TextConditioner | None = None
    vlm: VLMConditioner | None = None
    trainable: Trainable = "full"
    lora: Lora | None = None
    compute_dtype: str = "float32"
    sampling: Sampling | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class System:
    """A model that can be built.

    Attributes:
        spec: of the transformer. encoders: codec, text and VLM.
        compute_dtype: "float32" or "bfloat16", as it was trained.
        sampling: as its run sampled.
        checkpoint: where its weights are; None where `spec.pretrained` has them.
        which: "ema" or "raw".
        alpha: of the run's LoRA, None without.
        rewards: networks that it was rewarded by in training: a metric on the same is flagged.
        speed: how it ran.
    """

    spec: TransformerSpec
    encoders: Encoders
    compute_dtype: str
    sampling: Sampling
    checkpoint: Checkpoint | None
    which: Which = "ema"
    alpha: float | None = None
    rewards: tuple[str, ...] = ()
    speed: Speed = field(default_factory=Speed)

    @property
    def identity(self) -> dict[str, Any]:
        """What a video depends on through the model, as plain JSON."""
        encoders = {"codec": self.encoders.codec, "text": self.encoders.text, "vlm": self.encoders.vlm}
        weights: Any = self.checkpoint.fingerprint if self.checkpoint else None
        if weights is None and self.spec.pretrained is not None:
            weights = weights_identity(self.spec.pretrained, self.spec.subfolder)
        settings = {f.name: getattr(self.spec, f.name) for f in fields(self.spec) if f.name not in _ELSEWHERE}
        if self.spec.pretrained is not None:  # what it was saved with wins over the spec's sizes
            own = weights_config(self.spec.pretrained, self.spec.subfolder) or {}
            settings = {name: value for name, value in settings.items() if name not in _SIZES}
            settings |= {name: own[name] for name in _SIZES if name in own}
        return {
            "weights": weights,
            "which": self.which if self.checkpoint else None,
            "transformer": {**settings, "id_blocks": asdict(self.spec.id_blocks)},
            "encoders": {name: part.fingerprint for name, part in encoders.items() if part is not None},
        }

    def build_transformer(self, device: torch.device | str = "cpu", computes_in: torch.dtype = torch.float32) -> Any:
        """The `IDCrafterTransformer` with its weights in float32; "meta" gives the structure alone.

        Args:
            computes_in: bfloat16 rounds what autocast in it would round in every pass (`idc.models.rounding`): for
                sampling alone, which then takes about half the memory and gives the same bits.

        Raises:
            UserError: where the checkpoint does not fit, or cannot be read.
        """
        text_dim, vlm = self.encoders.text.dim, self.encoders.vlm
        vlm_dim = None if vlm is None else vlm.dim
        loads = self.checkpoint is not None and torch.device(device).type != "meta"
        model = self.spec.build(text_dim, vlm_dim, "meta" if loads else device)
        round_matrices(model, computes_in)
        if not loads:
            return model
        assert self.checkpoint is not None
        weights: dict[str, Tensor] = read_weights(self.checkpoint, self.which, self.alpha)
        model.to_empty(device=device)
        model.refresh_rotary_tables()  # in no state dict, and `to_empty` left garbage in them
        load_weights(model, weights, self.checkpoint.config)
        return model


_ELSEWHERE = ("pretrained", "subfolder", "id_blocks", "init_seed")
_SIZES = (
    *("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim"),
    *("patch_size", "freq_dim", "in_channels"),
)


def open_system(value: str | Path | None, given: Parts | None = None, which: Which = "ema") -> System:
    """Find out all about a trained model without loading it.

    Args:
        value: a run, a checkpoint (`find_checkpoint`), the folder of an `IDCrafterPipeline`, or the name of one that
            comes with the package ("toy"); None takes the weights that `given.transformer.pretrained` names.
        given: settings that win over the run's own.
        which: of a run's weights.

    Raises:
        UserError: nothing at `value`, or settings that neither it nor `given` has.
    """
    given = given or Parts()
    if value is None and (given.transformer is None or given.transformer.pretrained is None):
        raise UserError("checkpoint=null: give a run of idc fit, a pipeline's folder, or transformer.pretrained")
    own, note, checkpoint = _described(value)
    return replace(_with(given, own, note, checkpoint, which), rewards=_rewards(value, checkpoint))


def _described(value: str | Path | None) -> tuple[Parts, str, Checkpoint | None]:
    """What lies at `value`: its parts, what to say of those that it lacks, and the run's checkpoint if it is one."""
    value = None if value is None else resolve_shipped(value)
    if value is not None and (Path(value) / MODEL_INDEX).is_file():
        return (*_from_pipeline(Path(value)), None)
    checkpoint = None if value is None else find_checkpoint(value)
    return (*_from_config(checkpoint.config if checkpoint is not None else None), checkpoint)


def _rewards(value: str | Path | None, checkpoint: Checkpoint | None) -> tuple[str, ...]:
    if checkpoint is not None or value is None:
        return checkpoint.rewards if checkpoint is not None else ()
    return read_rewards(Path(resolve_shipped(value)) / RECORD)


def _with(given: Parts, own: Parts, note: str, checkpoint: Checkpoint | None, which: Which) -> System:
    spec, codec, text = given.transformer or own.transformer, given.codec or own.codec, given.text or own.text
    for name, part in (("transformer", spec), ("codec", codec), ("text", text)):
        if part is None:
            raise UserError(f"{name}: {note}; set model.init_args.{name}")
    assert spec is not None
    assert codec is not None
    assert text is not None
    vlm = given.vlm or own.vlm
    lora = given.lora or own.lora
    return System(
        spec=spec,
        encoders=Encoders(codec, text, vlm if spec.id_blocks.use_vlm else None),
        compute_dtype=own.compute_dtype,
        sampling=own.sampling or Sampling(),
        checkpoint=checkpoint,
        which=which,
        alpha=None if lora is None else lora.alpha,
        speed=given.speed or own.speed or Speed(),
    )


def _from_config(config: Mapping[str, Any] | None) -> tuple[Parts, str]:
    """The parts that a run's config.yaml describes."""
    init_args = ((config or {}).get("model") or {}).get("init_args") or {}
    if not init_args:
        return Parts(), "no config.yaml of a run lies beside the checkpoint"
    if init_args.get("checkpoint") is None:
        return _parsed(init_args), _SILENT
    # An aligned run says what differs from the run that it started from.
    try:
        start, note, _ = _described(init_args["checkpoint"])
    except UserError as error:
        raise UserError(
            f"{error} (the run started from there and has its settings from it: bring it back, or set "
            "model.init_args.transformer, codec and text)"
        ) from None
    changes = {name: value for name, value in (init_args.get("sampling") or {}).items() if value is not None}
    parts = _parsed({name: value for name, value in init_args.items() if name != "sampling" and value is not None})
    for name in ("transformer", "codec", "text", "vlm", "speed"):
        setattr(parts, name, getattr(parts, name) or getattr(start, name))
    if init_args.get("compute_dtype") is None:
        parts.compute_dtype = start.compute_dtype
    parts.sampling = SamplingChanges(**changes).over(start.sampling or Sampling())
    return parts, note


_SILENT = "the run's config.yaml does not say"


def _parsed(init_args: Mapping[str, Any]) -> Parts:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Parts)
    known = {f.name for f in fields(Parts)}
    init_args = _renamed(init_args)
    try:
        parsed = parser.parse_object({name: value for name, value in init_args.items() if name in known})
        made = parser.instantiate_classes(parsed)
    except UserError:
        raise
    except Exception as error:  # of many kinds, for a config that this version does not understand
        raise UserError(f"the run's config.yaml: {' '.join(str(error).split())[:400]}") from None
    parts = Parts(**{name: made[name] for name in known if name in made})
    if parts.trainable.endswith("lora") and parts.lora is None:
        parts.lora = Lora()
    return parts


def _renamed(init_args: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are now, of a run whose `transformer` still held those of speed."""
    spec = dict(init_args.get("transformer") or {})
    old = {name: spec.pop(name) for name in ("gradient_checkpointing", "attention_backend") if name in spec}
    if not old:
        return dict(init_args)
    speed = {"checkpointing": "full" if old.get("gradient_checkpointing") else "none"}
    speed["attention"] = old.get("attention_backend") or "auto"
    return {**init_args, "transformer": spec, "speed": {**speed, **(init_args.get("speed") or {})}}


def _from_pipeline(folder: Path) -> tuple[Parts, str]:
    encoders, settings = read_pipeline_folder(folder)
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    blocks = {name: config[f"id_{name}"] for name in vars(IDBlocks()) if f"id_{name}" in config}
    blocks["use_vlm"] = config["vlm_dim"] is not None
    parts = Parts(
        transformer=TransformerSpec(pretrained=str(folder), subfolder="transformer", id_blocks=IDBlocks(**blocks)),
        codec=encoders.codec,
        text=encoders.text,
        vlm=encoders.vlm,
        compute_dtype=settings["compute_dtype"],
        sampling=Sampling(**settings["sampling"]),
    )
    return parts, f"{folder} does not say"
