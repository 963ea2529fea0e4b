"""Sequence parallelism: the video's tokens spread over the ranks of a group, which together compute one sample.

Every token-wise part of the transformer (norms, projections, feed-forward, cross-attention, stage 3 of the
hierarchical attention) runs on a rank's own video tokens; the text's, the VLM's and the subjects' tokens are on every
rank. Self-attention alone needs all video tokens: its ranks exchange them for heads and back (DeepSpeed-Ulysses,
arXiv:2309.14509), so that each attends over the whole sequence with its share of the heads.

Gradients: each rank's backward pass counts what its own tokens contribute, times the group's size. The mean over all
ranks, which FSDP takes, is then the gradient of the mean loss: over the group's ranks it adds up their tokens, and over
the groups it averages. The loss is computed on the whole output, on every rank of the group alike.

Departure from diffusers' context parallelism, which splits the inputs of the model by a plan: it would shard the
subjects' tokens as well, cannot pad, and knows no reference tokens in the self-attention.

R counts the ranks of the group; the rest as in `idc.models.hierarchy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from idc.errors import UserError
from idc.models.attention import attend
from idc.models.hierarchy import rotate

if TYPE_CHECKING:
    from idc.models.transformer import IDCrafterTransformer


class SpreadRotary(NamedTuple):
    """What the self-attention of a rank needs besides its tokens: the rotary tables of these, `[1, L, 1, E]`, the
    number of video tokens on all ranks without padding, and the key mask of all tokens or None."""

    cos: Tensor
    sin: Tensor
    video_tokens: int
    mask: Tensor | None = None


# An operator rather than an `autograd.Function`: torch.compile traces into the latter, and that of torch 2.11 returns
# zeros for the gradient of one that writes into a tensor, as collectives do.
@torch.library.custom_op("idc::exchange", mutates_args=())
def exchange(x: Tensor, group: str) -> Tensor:
    """All-to-all over the first dimension, which has one entry a rank: entry r goes to rank r. Its own transpose.

    Args:
        group: the name of the process group.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=_resolve_process_group(cast(Any, group)))  # torch 2.13: of a type of its own
    return out


@exchange.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _remember_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _exchange_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return exchange(gradient, ctx.group), None


exchange.register_autograd(_exchange_back, setup_context=_remember_group)


@dataclass(frozen=True)
class SequenceParallel:
    """The ranks over which a sample's video tokens are spread, in order. All of them must call everything together.

    Attributes:
        group: a process group of two or more ranks.
    """

    group: dist.ProcessGroup

    @property
    def name(self) -> str:
        return self.group.group_name

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def split(self, x_BLx: Tensor) -> Tensor:
        """This rank's tokens, as many as any other's: `[B, ceil(L / R), ...]`, zeros after the last token."""
        share = -(-x_BLx.shape[1] // self.size)
        own = x_BLx[:, self.rank * share : (self.rank + 1) * share]
        # A copy, so that the tokens of the other ranks are freed; and always of `x`, so that a rank that has only
        # padding takes part in the backward pass as well.
        return _padded(own, share) if own.shape[1] < share else own.clone()

    def gather(self, x_BLx: Tensor, tokens: int) -> Tensor:
        """The first `tokens` tokens of all ranks, `[B, tokens, ...]`, on each; the inverse of `split`."""
        every_RBLx = exchange(x_BLx.expand(self.size, *x_BLx.shape), self.name)
        return every_RBLx.transpose(0, 1).flatten(1, 2)[:, :tokens]

    def rotary(self, rotary: tuple[Tensor, ...], video_tokens: int) -> SpreadRotary:
        """Of this rank's video tokens, and of the reference tokens that follow the video's in `rotary`, if any.

        Args:
            rotary: cosine and sine of all tokens, and optionally the key mask of all tokens.
        """
        cos, sin = (torch.cat([self.split(t[:, :video_tokens]), t[:, video_tokens:]], dim=1) for t in rotary[:2])
        return SpreadRotary(cos, sin, video_tokens, rotary[2] if len(rotary) == 3 else None)

    def enter(self, video_BLD: Tensor, rotary: tuple[Tensor, ...]) -> tuple[Tensor, SpreadRotary]:
        """The transformer's tokens and rotary tables as its blocks need them on this rank."""
        spread = self.rotary(rotary, video_BLD.shape[1])
        return self.split(video_BLD), spread

    def to_heads(self, parts_BLAE: Sequence[Tensor], video_tokens: int) -> list[Tensor]:
        """All tokens of this rank's heads `[B, video_tokens + S, A / R, E]`, of this rank's tokens with all heads.

        The last S tokens of each part, those after the video's, are on every rank already.

        Args:
            parts_BLAE: of one shape and dtype, such as queries, keys and values: one exchange serves them all.
        """
        share = -(-video_tokens // self.size)
        heads = [x[:, :share].unflatten(2, (self.size, -1)).movedim(2, 0) for x in parts_BLAE]
        every_RPBLAE = exchange(torch.stack(heads, dim=1), self.name)
        whole = [x.transpose(0, 1).flatten(1, 2)[:, :video_tokens] for x in every_RPBLAE.unbind(1)]
        others = [x[:, share:] for x in parts_BLAE]
        if not others[0].shape[1]:
            return whole
        own = (x.unflatten(2, (self.size, -1))[:, :, self.rank] for x in others)
        return [torch.cat(both, dim=1) for both in zip(whole, own, strict=True)]

    def to_tokens(self, x_BLAE: Tensor, video_tokens: int) -> Tensor:
        """The inverse of `to_heads`, of one part; padding comes back as zeros."""
        share = -(-video_tokens // self.size)
        video, others = x_BLAE[:, :video_tokens], x_BLAE[:, video_tokens:]
        tokens_RBLAE = _padded(video, share * self.size).unflatten(1, (self.size, share)).transpose(0, 1)
        own = exchange(tokens_RBLAE, self.name).movedim(0, 2).flatten(2, 3)
        if not others.shape[1]:
            return own
        heads_RBSAE = exchange(others.expand(self.size, *others.shape), self.name)
        return torch.cat([own, heads_RBSAE.movedim(0, 2).flatten(2, 3)], dim=1)


def _padded(x_BLx: Tensor, tokens: int) -> Tensor:
    missing = tokens - x_BLx.shape[1]
    if not missing:
        return x_BLx
    return torch.cat([x_BLx, x_BLx.new_zeros(x_BLx.shape[0], missing, *x_BLx.shape[2:])], dim=1)


class SequenceAttnProcessor(WanAttnProcessor):
    """Wan's self-attention over a sequence that is spread over ranks; also with reference tokens after the video's.

    Padding takes no part: it is cut off before the softmax, and its outputs and gradients are dropped.
    """

    def __init__(self, parallel: SequenceParallel) -> None:
        super().__init__()
        self.parallel = parallel

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        assert isinstance(rotary_emb, SpreadRotary)
        value = attn.to_v(hidden_states)
        projected = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        heads = [rotate(x.unflatten(2, (attn.heads, -1)), (rotary_emb.cos, rotary_emb.sin)) for x in projected]
        # Under autocast the norms return float32: half the traffic in what `attend` would convert them to anyway.
        parts = [x.type_as(value) for x in heads] + [value.unflatten(2, (attn.heads, -1))]
        query, key, value = self.parallel.to_heads(parts, rotary_emb.video_tokens)
        out = attend(query, key, value, rotary_emb.mask, self._attention_backend)
        out = self.parallel.to_tokens(out.type_as(value), rotary_emb.video_tokens)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))


def check_heads(heads: int, ranks: int, setting: str = "trainer.strategy.init_args.tensor_parallel_size") -> None:
    """Raises `UserError` where the heads of the self-attention cannot be shared out equally."""
    if heads % ranks == 0:
        return
    valid = [n for n in range(2, heads + 1) if heads % n == 0]
    below = max((n for n in valid if n < ranks), default=1)
    raise UserError(
        f"{setting}={ranks}: the ranks of a sequence share out the transformer's {heads} attention heads equally; "
        f"the nearest valid choice is {below} (of {', '.join(map(str, valid[:8]))}{', ...' * (len(valid) > 8)})"
    )


def spread_over(model: IDCrafterTransformer, group: dist.ProcessGroup) -> None:
    """Make `model` compute with its video tokens spread over `group`; parameters and outputs stay as they are.

    Raises:
        UserError: where the heads do not divide.
    """
    parallel = SequenceParallel(group)
    check_heads(model.config["num_attention_heads"], parallel.size)
    for block in model.blocks:
        attention: Any = block.attn1
        processor = SequenceAttnProcessor(parallel)
        processor._attention_backend = attention.processor._attention_backend
        attention.set_processor(processor)
    model.sequence_parallel = parallel
