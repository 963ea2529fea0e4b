"""The video transformer: diffusers' Wan2.1 with the hierarchical identity-preserving attention beside its first layers.

A subclass, so that Wan's weights, `save_pretrained`, `WanPipeline`, LoRA, regional compilation and attention backends
work as they are. Untouched blocks (O3 = 0) leave the backbone's output as it is, bit for bit. Departures from the paper
are in `idc.models.hierarchy`; `id_joint_references` (reference tokens in the backbone's self-attention, as Phantom has
them) is an option here, since the paper does not say whether it does that.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - pipelines look for it beside the class to load
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from idc.errors import UserError
from idc.models.checkpointing import LayerRunner
from idc.models.frozen import aligned, check_complete
from idc.models.hierarchy import HierarchyBlock, VLMProjector, add_idle
from idc.models.id_settings import check_references, check_settings, complete_settings, reads_vlm
from idc.models.initialisation import OURS, draw_seed, initialise_backbone, initialise_id_blocks
from idc.models.layers import LayerInputs, run_all, run_subjects
from idc.models.sequence_parallel import SequenceParallel
from idc.models.speed import Checkpointing
from idc.models.step_reuse import StepReuse, modulated
from idc.models.subject_cache import JoinedCaches, SubjectCache, memories_of
from idc.models.subjects import SubjectSide, VideoAttnProcessor, embed_references, joint_rotary
from idc.types import Condition

WAN_SETTINGS = tuple(inspect.signature(WanTransformer3DModel.__init__).parameters)[1:]


class TimeEmbedding(TimestepEmbedding):
    """Wan's time MLP in the precision of its weights also under autocast, which would run it in bfloat16."""

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        with torch.autocast(sample.device.type, enabled=False):
            return super().forward(sample, condition)


class IDCrafterTransformer(WanTransformer3DModel):
    """Wan2.1's transformer conditioned on reference images and VLM tokens.

    Args:
        patch_size to pos_embed_seq_len: as in `WanTransformer3DModel`.
        id_layers: a block follows each of the first `id_layers` layers; 0 attaches none.
        id_intra_subject, id_inter_subject, id_cross_modal: stages 1, 2 and 3; a stage switched off has no parameters.
        id_joint_references: reference tokens also join the backbone's self-attention, each as a further frame; stages 1
            and 2 then act on them there. With `id_layers=0` this is Phantom's conditioning.
        id_max_subjects: size of the subject-index embedding, which starts at zero.
        id_gate_bias: stage 2's gate starts at sigmoid(id_gate_bias).
        id_use_vlm: False drops the VLM tokens that a condition carries.
        vlm_dim: width of the VLM's tokens; None without a VLM.

    Raises:
        UserError: where the settings contradict each other.
    """

    _no_split_modules = ["WanTransformerBlock", "HierarchyBlock"]  # noqa: RUF012 - as in diffusers
    _repeated_blocks = ["WanTransformerBlock", "HierarchyBlock"]  # noqa: RUF012 - as in diffusers

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        id_layers: int = 20,
        id_intra_subject: bool = True,
        id_inter_subject: bool = True,
        id_cross_modal: bool = True,
        id_joint_references: bool = False,
        id_max_subjects: int = 4,
        id_gate_bias: float = -2.0,
        id_use_vlm: bool = True,
        vlm_dim: int | None = None,
    ) -> None:
        check_settings(num_layers, patch_size, id_layers, id_cross_modal, id_joint_references, id_max_subjects)
        arguments = locals()
        super().__init__(**{name: arguments[name] for name in WAN_SETTINGS})
        dim = num_attention_heads * attention_head_dim
        self.condition_embedder.time_embedder = TimeEmbedding(freq_dim, dim)
        self.sequence_parallel: SequenceParallel | None = None
        stages = (id_intra_subject, id_inter_subject, id_cross_modal)
        self.id_blocks = nn.ModuleList(
            HierarchyBlock(dim, num_attention_heads, eps, *stages) for _ in range(id_layers if any(stages) else 0)
        )
        has_path = id_joint_references or len(self.id_blocks) > 0
        self.id_subject_embedding = nn.Parameter(torch.zeros(id_max_subjects, dim)) if has_path else None
        self.id_vlm_projector: VLMProjector | None = None
        if vlm_dim is not None and id_use_vlm and id_cross_modal and id_layers > 0:
            self.id_vlm_projector = VLMProjector(vlm_dim, dim, eps)
        for block in self.blocks:
            for attention in (block.attn1, block.attn2):
                attention.set_processor(VideoAttnProcessor())  # type: ignore[union-attr, operator]  # of a ModuleList
        self.run_layers()
        if not self.proj_out.weight.is_meta:
            initialise_id_blocks(self, draw_seed(None), id_gate_bias)

    # Building -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_wan(cls, wan: WanTransformer3DModel, **id_block_settings: Any) -> IDCrafterTransformer:
        """Wan's configuration and a copy of its weights, dtypes and device, with initialised blocks attached.

        Args:
            wan: a plain diffusers transformer.
            id_block_settings: the arguments of this class that Wan lacks. `id_layers` is by default 20 (the paper's),
                or all layers of a shallower backbone.

        Raises:
            UserError: for an unknown setting, or settings that contradict each other.
        """
        return cls._around(wan, copy.deepcopy(dict(wan.state_dict())), id_block_settings)

    @classmethod
    def from_wan_pretrained(
        cls, path: str, subfolder: str | None = None, torch_dtype: torch.dtype | None = None, **id_block_settings: Any
    ) -> IDCrafterTransformer:
        """Load a folder or hub name: plain Wan through `from_wan`, an `IDCrafterTransformer` as it was saved.

        A saved `IDCrafterTransformer` keeps its own settings. Under `torch.device("meta")` only the structure is made.

        Args:
            path, subfolder, torch_dtype: as in diffusers' `from_pretrained`.
            id_block_settings: as in `from_wan`.

        Raises:
            UserError: for a config.json of something else, and where tensors are missing.
            OSError, ValueError: as diffusers, for files that are missing or broken.
        """
        where: dict[str, Any] = {} if subfolder is None else {"subfolder": subfolder}
        config: Any = cls.load_config(path, **where)
        if "num_layers" not in config:
            raise UserError(f"{path}: its config.json has no num_layers; it is not that of a Wan transformer")
        ours = config.get("_class_name") == cls.__name__
        if torch.get_default_device().type == "meta":
            settings = {} if ours else complete_settings(id_block_settings, ID_SETTINGS, config["num_layers"])
            structure: Any = cls.from_config(config, **settings)
            return structure
        more = {**where, "use_safetensors": True} | ({} if torch_dtype is None else {"torch_dtype": torch_dtype})
        if ours:
            return cls.from_pretrained(path, **more)
        wan = WanTransformer3DModel.from_pretrained(path, **more)
        check_complete(wan, path, "it should contain a Wan transformer's weights")
        aligned(wan)
        return cls._around(wan, wan.state_dict(), id_block_settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers, for what `save_pretrained` wrote. Raises `UserError` where the folder lacks our blocks."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        hint = "load plain Wan weights with IDCrafterTransformer.from_wan_pretrained"
        check_complete(model, pretrained_model_name_or_path, hint)
        aligned(model)
        return loaded

    @classmethod
    def _around(
        cls, wan: WanTransformer3DModel, weights: dict[str, Tensor], id_block_settings: dict[str, Any]
    ) -> IDCrafterTransformer:
        """The model that takes over `weights` (not copied) and Wan's rotary tables."""
        config = dict(wan.config)
        settings = complete_settings(id_block_settings, ID_SETTINGS, config["num_layers"])
        with torch.device("meta"):
            model = cls(**{name: config[name] for name in WAN_SETTINGS if name in config}, **settings)
        keys = model.load_state_dict(weights, strict=False, assign=True)
        wrong = [*keys.unexpected_keys, *(name for name in keys.missing_keys if not name.startswith(OURS))]
        if wrong:
            raise UserError(f"{wrong[0]} and {len(wrong) - 1} other parameters are not as in a plain Wan transformer")
        like = wan.get_parameter("blocks.0.attn1.to_q.weight")
        for name, child in model.named_children():
            if name.startswith(OURS):
                child.to_empty(device=like.device).to(like.dtype)
        if model.id_subject_embedding is not None:
            shape = model.id_subject_embedding.shape
            model.id_subject_embedding = nn.Parameter(torch.zeros(shape, device=like.device, dtype=like.dtype))
        model.rope = copy.deepcopy(wan.rope)
        model.init_id_blocks()
        return model.train(wan.training)

    def init_id_blocks(self, seed: int | None = None) -> None:
        """(Re)initialise our blocks from the backbone's weights, e.g. after `to_empty` and loading plain Wan weights.

        Args:
            seed: of the few random parts; None draws one from torch's global generator.
        """
        self.refresh_rotary_tables()
        initialise_id_blocks(self, draw_seed(seed), self.config["id_gate_bias"])

    def init_weights(self, seed: int | None = None) -> None:
        """Initialise everything for training from scratch (`initialise_backbone`, then `init_id_blocks`)."""
        seed = draw_seed(seed)
        initialise_backbone(self, seed)
        self.init_id_blocks(seed)

    def refresh_rotary_tables(self) -> None:
        """They are in no state dict, and `to_empty` leaves garbage in them."""
        with torch.device("cpu"):
            fresh = type(self.rope)(self.rope.attention_head_dim, self.rope.patch_size, self.rope.max_seq_len)
        for table, value in zip(self.rope.buffers(), fresh.buffers(), strict=True):
            if not table.is_meta:
                table.copy_(value)

    # Running --------------------------------------------------------------------------------------------------------

    def run_layers(
        self, checkpointing: Checkpointing = "none", compiled: bool = False, apart: bool | None = None
    ) -> None:
        """How the repeated layers run from now on (`idc.models.checkpointing`); where they are sharded, after that."""
        self.gradient_checkpointing = checkpointing != "none"
        self.layers = LayerRunner([*self.blocks, *self.id_blocks], checkpointing, compiled, apart)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = None) -> None:
        """Behind diffusers' `enable_gradient_checkpointing`, which has no choice between kinds."""
        self.run_layers("full" if enable else "none")

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor | None,
        timestep: Tensor | None,
        encoder_hidden_states: Tensor | None,
        condition: Condition | None = None,
        subject_cache: SubjectCache | JoinedCaches | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        build_cache: bool = False,
        reuse: StepReuse | None = None,
    ) -> Any:
        """The velocity. Without references and VLM tokens it is Wan's, bit for bit.

        Args:
            hidden_states: latents `[B, C, T, H, W]`.
            timestep: `[B]` in [0, 1000] (1000 is noise).
            encoder_hidden_states: text tokens `[B, L, text_dim]`; the text of `condition` is not read.
            condition: references and VLM tokens.
            subject_cache: from `build_subject_cache`, instead of `condition`; several joined are each for as many
                consecutive rows of the batch.
            return_dict, attention_kwargs, encoder_hidden_states_image: as in `WanTransformer3DModel`.
            build_cache: return a `SubjectCache` for `condition` and read nothing else. It is a mode of `forward`
                because FSDP gathers the root's parameters around `forward` alone.
            reuse: of the steps of one video; decides whether the layers run. Without gradients, and not sharded.

        Returns:
            `Transformer2DModelOutput` with latents `[B, out_channels, T, H, W]`, or a tuple of them.

        Raises:
            UserError: for a condition or a cache that does not fit the model or the batch.
        """
        side = self._subject_side(condition if subject_cache is None else None)
        if build_cache:
            return self._cache(side)
        assert hidden_states is not None
        assert timestep is not None
        caches = subject_cache.parts if isinstance(subject_cache, JoinedCaches) else (subject_cache,)
        rows = hidden_states.shape[0] // len(caches)
        side.check_batch(rows)
        memories = [memories_of(cache, self.id_blocks, rows, self.training) for cache in caches]
        masks = tuple(side.mask_BM if cache is None else cache.mask_BM for cache in caches)
        embedded = self._embed(timestep, encoder_hidden_states, encoder_hidden_states_image)
        video, temb, given = self._enter(hidden_states, timestep, embedded, side, masks)
        residual = (
            None if reuse is None else reuse.residual(modulated(self.blocks[0], video, given.modulation), timestep)
        )
        if residual is not None:
            video = video + residual
        else:
            entered = video
            video = run_all(self.layers, self.blocks, self.id_blocks, video, side.tokens_BSD, given, memories)
            if reuse is not None:
                reuse.keep(video - entered)
        output = self._unpatchify(video, temb, hidden_states.shape[2:])
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _enter(
        self,
        latents: Tensor,
        timestep: Tensor,
        embedded: tuple[Tensor, Tensor, Tensor],
        side: SubjectSide,
        masks: tuple[Tensor | None, ...],
    ) -> tuple[Tensor, Tensor, LayerInputs]:
        """Video tokens, time embedding, and what all layers read; in a sequence that is spread, this rank's."""
        temb, modulation, text = embedded
        rotary = self.rope(latents)
        video = self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
        if self.training and torch.is_grad_enabled():
            video = self._add_idle(video, side)
        joined = side.layout if self.config["id_joint_references"] else None
        if joined is not None:
            rotary = joint_rotary(self.rope, rotary, video, joined, timestep, latents.shape[2])
        if self.sequence_parallel is not None:
            video, rotary = self.sequence_parallel.enter(video, rotary)
            if timestep.ndim == 2:
                temb, modulation = self.sequence_parallel.split(temb), self.sequence_parallel.split(modulation)
        return video, temb, LayerInputs(text, modulation, rotary, joined is not None, side.layout, side.vlm_BMD, masks)

    def build_subject_cache(self, condition: Condition) -> SubjectCache:
        """What the blocks read of `condition` in every denoising step; `forward(subject_cache=...)` is exact.

        Raises:
            UserError: with `id_joint_references`, where the subject tokens follow the video.
        """
        if self.config["id_joint_references"]:
            raise UserError(
                "id_joint_references=True: the reference tokens attend to the video, so nothing of them can be cached; "
                "call forward with the condition"
            )
        return self(None, None, None, condition=condition, build_cache=True)

    def _subject_side(self, condition: Condition | None) -> SubjectSide:
        """What the blocks read of a condition."""
        if condition is None:
            return SubjectSide()
        tokens, layout, vlm = None, None, None
        if condition.references:
            check_references(self.config, len(condition.references))
            assert self.id_subject_embedding is not None
            tokens, layout = embed_references(self.patch_embedding, self.id_subject_embedding, self.rope, condition)
        if condition.vlm_BLD is not None and reads_vlm(self.config, condition.vlm_BLD.shape[-1]):
            assert self.id_vlm_projector is not None
            vlm = self.id_vlm_projector(condition.vlm_BLD)
        return SubjectSide.build(tokens, layout, vlm, condition.vlm_mask_BL)

    def _cache(self, side: SubjectSide) -> SubjectCache:
        if side.batch is None:
            return SubjectCache(layers=(), mask_BM=None, batch=1)
        layers: list[Any] = []
        subjects = side.tokens_BSD
        for block in self.id_blocks:
            subjects, memory = self.layers(run_subjects, block, subjects, side.layout, side.vlm_BMD)
            layers.append(memory)
        return SubjectCache(layers=tuple(layers), mask_BM=side.mask_BM, batch=side.batch)

    def _embed(self, timestep: Tensor, text: Tensor | None, image: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Time embedding, its six modulations, and text (after image) tokens; a time `[B]`, or `[B, L]` per token."""
        tokens = timestep.shape[1] if timestep.ndim == 2 else None
        temb, modulation, text, image = self.condition_embedder(
            timestep.flatten(), text, image, timestep_seq_len=tokens
        )
        assert text is not None
        return temb, modulation.unflatten(-1, (6, -1)), text if image is None else torch.cat([image, text], dim=1)

    def _unpatchify(self, video: Tensor, temb: Tensor, sizes: Sequence[int]) -> Tensor:
        """Modulated output projection, and tokens back to latents."""
        shift, scale = (self.scale_shift_table.to(temb.device) + temb.unsqueeze(-2)).to(video.device).unbind(-2)
        if temb.ndim == 2:
            shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
        video = self.proj_out((self.norm_out(video.float()) * (1 + scale) + shift).type_as(video))
        patch = self.config["patch_size"]
        grid = [size // p for size, p in zip(sizes, patch, strict=True)]
        if self.sequence_parallel is not None:
            video = self.sequence_parallel.gather(video, grid[0] * grid[1] * grid[2])
        video = video.unflatten(1, grid).unflatten(-1, (*patch, -1)).permute(0, 7, 1, 4, 2, 5, 3, 6)
        # One reshape, which copies: FSDP puts a hook on the output and warns where that is a view.
        return video.reshape(*video.shape[:2], *(g * p for g, p in zip(grid, patch, strict=True)))

    def _add_idle(self, video: Tensor, side: SubjectSide) -> Tensor:
        """Zero gradients for the parameters outside the blocks that this batch does not use (see `add_idle`)."""
        idle: list[nn.Parameter] = []
        if side.tokens_BSD is None and self.id_subject_embedding is not None:
            idle.append(self.id_subject_embedding)
        if side.vlm_BMD is None and self.id_vlm_projector is not None:
            idle.extend(self.id_vlm_projector.parameters())
        return add_idle(video, idle)


ID_SETTINGS = tuple(inspect.signature(IDCrafterTransformer.__init__).parameters)[len(WAN_SETTINGS) + 1 :]
