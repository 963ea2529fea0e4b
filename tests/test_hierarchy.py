"""The three stages against a naive loop over samples and subjects; padding, permutation, ablations, and the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from _tiny_wan import VLM_DIM, WAN, condition, inputs, run, tiny_model, tiny_wan
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from idc.errors import UserError
from idc.models.hierarchy import HierarchyBlock, SubjectLayout, VLMProjector
from idc.models.subjects import grid_rotary
from idc.types import Condition

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32, other summation order
GRIDS = ((2, 2), (1, 3), (3, 2))
HEADS, SIZE = 2, 12
DIM = HEADS * SIZE


# An independent implementation, one token at a time ------------------------------------------------------------------


def naive_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def naive_attention(attn, q_in: Tensor, kv_in: Tensor, q_turn: Tensor | None = None, k_turn=None) -> Tensor:
    """`[L, D]` and `[M, D]`; turns are unit complex numbers `[L, E / 2]`."""

    def heads(linear, x, norm=None, turn=None):
        y = x @ linear.weight.T + linear.bias
        if norm is not None:
            y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        y = y.reshape(len(x), HEADS, SIZE)
        if turn is not None:
            pairs = torch.view_as_complex(y.reshape(len(x), HEADS, SIZE // 2, 2).contiguous())
            y = torch.view_as_real(pairs * turn[:, None]).reshape(len(x), HEADS, SIZE)
        return y

    q, k = heads(attn.to_q, q_in, attn.norm_q, q_turn), heads(attn.to_k, kv_in, attn.norm_k, k_turn)
    weights = torch.einsum("lae,mae->alm", q, k).div(SIZE**0.5).softmax(-1)
    out = torch.einsum("alm,mae->lae", weights, heads(attn.to_v, kv_in)).reshape(len(q_in), DIM)
    return out @ attn.to_out[0].weight.T + attn.to_out[0].bias


def naive_turns(rows: int, columns: int) -> Tensor:
    """Angles of Wan's RoPE at t = 0: of 12 channels, 4 for t, 4 for rows, 4 for columns."""
    axis = 10000.0 ** -(torch.arange(0, 4, 2) / 4)
    angles = [
        torch.cat([torch.zeros(2), row * axis, column * axis]) for row in range(rows) for column in range(columns)
    ]
    return torch.polar(torch.ones(rows * columns, SIZE // 2), torch.stack(angles))


def naive_block(block: HierarchyBlock, video: Tensor, subjects: list[Tensor], grids, vlm: Tensor):
    """S.9 to S.11 for one sample: `video [L, D]`, one `[L_k, D]` a subject, `vlm [M, D]`."""
    first = []
    for f, grid in zip(subjects, grids, strict=True):
        x, turns = naive_norm(block.intra_norm, f), naive_turns(*grid)
        first.append(f + naive_attention(block.intra_attn, x, x, turns, turns))
    second = []
    normed = [naive_norm(block.inter_norm, f) for f in first]
    for i, f in enumerate(first):
        others = torch.cat([x for j, x in enumerate(normed) if j != i])
        gate = 1 / (1 + (-(normed[i] @ block.inter_gate.weight.T + block.inter_gate.bias)).exp())
        second.append(f + gate * naive_attention(block.inter_attn, normed[i], others))
    keys = torch.cat([*(naive_norm(block.cross_subject_norm, f) for f in second), vlm])
    return video + naive_attention(block.cross_attn, naive_norm(block.cross_video_norm, video), keys), second


def layout_of(grids, mask_BS: Tensor | None = None) -> SubjectLayout:
    rope = tiny_wan().rope
    tables = [grid_rotary(rope, 0, *grid) for grid in grids]
    rotary = (torch.cat([cos for cos, _ in tables], dim=1), torch.cat([sin for _, sin in tables], dim=1))
    return SubjectLayout(tuple(h * w for h, w in grids), tuple(grids), rotary, mask_BS)


def random_block(**stages: bool) -> HierarchyBlock:
    torch.manual_seed(0)
    block = HierarchyBlock(DIM, HEADS, **stages)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    return block


def test_the_stages_equal_a_naive_loop_over_samples_and_subjects():
    block, layout = random_block(), layout_of(GRIDS)
    video, subjects, vlm = torch.randn(2, 5, DIM), torch.randn(2, sum(layout.lengths), DIM), torch.randn(2, 3, DIM)
    with torch.no_grad():
        video_out, subjects_out, _ = block(video, subjects, layout, vlm)
        for b in range(2):
            expected, each = naive_block(block, video[b], list(subjects[b].split(layout.lengths)), GRIDS, vlm[b])
            torch.testing.assert_close(video_out[b], expected, **CLOSE)
            torch.testing.assert_close(subjects_out[b], torch.cat(each), **CLOSE)


def test_the_vlm_projector_is_norm_linear_gelu_linear():
    torch.manual_seed(0)
    projector, x = VLMProjector(VLM_DIM, DIM), torch.randn(2, 3, VLM_DIM)
    hidden = naive_norm(projector.input_norm, x) @ projector.linear_in.weight.T + projector.linear_in.bias
    expected = F.gelu(hidden, approximate="tanh") @ projector.linear_out.weight.T + projector.linear_out.bias
    torch.testing.assert_close(projector(x), expected, **CLOSE)


def test_blocks_follow_the_first_layers_and_hand_the_subjects_on():
    """The model against Wan's own layers with the naive block between them."""
    model, given = tiny_model(), condition(sizes=((4, 4), (2, 6)))
    grids = [(2, 2), (1, 3)]
    latents, timestep, text = inputs()
    with torch.no_grad():
        subjects = [
            [model.patch_embedding(r[b : b + 1, :, None]).flatten(2)[0].T + model.id_subject_embedding[k]
             for k, r in enumerate(given.references)]
            for b in range(2)
        ]  # fmt: skip
        vlm = model.id_vlm_projector(given.vlm_BLD)
        layers = []

        def between(module, arguments, video):
            layers.append(module)
            index = len(layers) - 1
            if index < 2:
                each = [naive_block(model.id_blocks[index], video[b], subjects[b], grids, vlm[b]) for b in range(2)]
                subjects[:] = [part for _, part in each]
                return torch.stack([part for part, _ in each])
            return video

        wan = tiny_wan()
        for block in wan.blocks:
            block.register_forward_hook(between)
        expected = wan(latents, timestep, text).sample
        assert len(layers) == WAN["num_layers"]
        torch.testing.assert_close(run(model, given), expected, **CLOSE)


# Invariances ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
def test_swapping_subjects_with_their_index_embeddings_does_not_change_the_video(joint):
    settings = {"id_joint_references": joint, "id_intra_subject": not joint}
    model, given = tiny_model(**settings), condition(sizes=((4, 4), (2, 6), (4, 2)))
    order = [2, 0, 1]
    swapped = replace(given, references=tuple(given.references[i] for i in order))
    with torch.no_grad():
        before, mixed = run(model, given), run(model, swapped)
        model.id_subject_embedding[:3] = model.id_subject_embedding[order]
        after = run(model, swapped)
    assert not torch.allclose(mixed, before, **CLOSE), "without their embeddings the subjects are told apart"
    if not joint:  # jointly, a subject's frame position tells it apart as well
        torch.testing.assert_close(after, before, **CLOSE)


def padded_batch() -> tuple[Condition, list[Condition]]:
    """Three samples of different numbers and sizes of subjects, and of VLM tokens: together, and one by one."""
    sizes = [[(4, 4), (2, 6)], [(6, 2)], []]
    vlm_lengths = [3, 5, 0]
    g = torch.Generator().manual_seed(5)
    singles, sizes_BN2 = [], torch.zeros(3, 3, 2, dtype=torch.long)
    references = [torch.zeros(3, 4, 6, 6) for _ in range(3)]
    vlm, vlm_mask = torch.randn(3, 5, VLM_DIM, generator=g), torch.zeros(3, 5, dtype=torch.bool)
    for b, shapes in enumerate(sizes):
        own = tuple(torch.randn(1, 4, h, w, generator=g) for h, w in shapes)
        for k, (h, w) in enumerate(shapes):
            references[k][b, :, :h, :w] = own[k]
            sizes_BN2[b, k] = torch.tensor([h, w])
        length = vlm_lengths[b]
        vlm_mask[b, :length] = True
        singles.append(Condition(torch.zeros(1, 5, 16), vlm[b : b + 1, :length] if length else None, None, own))
    return Condition(torch.zeros(3, 5, 16), vlm, vlm_mask, tuple(references), sizes_BN2), singles


PADDING_MODELS = {
    "full": {},
    "joint": {"id_joint_references": True},
    "joint without stage 3": {"id_joint_references": True, "id_cross_modal": False},
    "phantom": {"id_joint_references": True, "id_layers": 0},
}


@pytest.mark.parametrize("settings", PADDING_MODELS.values(), ids=PADDING_MODELS)
def test_a_padded_batch_equals_its_samples_one_by_one_forward_and_backward(settings):
    together, singles = padded_batch()
    latents, timestep, text = inputs(batch=3)
    batched, single = tiny_model(**settings), tiny_model(**settings)
    output = batched(latents, timestep, text, condition=together).sample
    output.square().sum().backward()
    for b, own in enumerate(singles):
        expected = single(latents[b : b + 1], timestep[b : b + 1], text[b : b + 1], condition=own).sample
        torch.testing.assert_close(output[b : b + 1], expected, **CLOSE)
        expected.square().sum().backward()
    for (name, parameter), other in zip(batched.named_parameters(), single.parameters(), strict=True):
        expected = torch.zeros_like(other) if other.grad is None else other.grad
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert grad.isfinite().all(), name
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4 * (1 + expected.abs().max().item()), msg=name)


@pytest.mark.parametrize("settings", PADDING_MODELS.values(), ids=PADDING_MODELS)
def test_what_stands_in_the_padding_has_no_effect_bit_for_bit(settings):
    together, _ = padded_batch()
    garbage = []
    for k, reference in enumerate(together.references):
        filled = torch.full_like(reference, 7.0)
        for b in range(3):
            h, w = together.reference_sizes_BN2[b, k].tolist()
            filled[b, :, :h, :w] = reference[b, :, :h, :w]
        garbage.append(filled)
    vlm = together.vlm_BLD.masked_fill(~together.vlm_mask_BL[..., None], -9.0)
    model = tiny_model(**settings)
    with torch.no_grad():
        expected = run(model, together, batch=3)
        assert torch.equal(run(model, replace(together, references=tuple(garbage), vlm_BLD=vlm), batch=3), expected)


def test_a_sample_with_nothing_to_attend_to_is_wans_within_a_padded_batch():
    together, _ = padded_batch()
    with torch.no_grad():
        output, wan = run(tiny_model(), together, batch=3), run(tiny_wan(), batch=3)
    assert torch.equal(output[2], wan[2])
    assert not torch.equal(output[0], wan[0])


class RefuseMasks(TorchFunctionMode):
    """Attention that raises on a mask, as the flash backends do."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and kwargs.get("attn_mask") is not None:
            raise ValueError("no masks here")
        return function(*args, **kwargs)


@pytest.mark.parametrize("joint", [False, True])
def test_without_padding_every_attention_runs_on_a_backend_that_refuses_masks(joint):
    model, (together, singles) = tiny_model(id_joint_references=joint), padded_batch()
    with torch.no_grad(), RefuseMasks():
        run(model, condition())
        for single in singles:
            run(model, single, batch=1)
        with pytest.raises(ValueError, match="no masks"):
            run(model, together, batch=3)


# Ablations -----------------------------------------------------------------------------------------------------------

STAGES = {
    "intra": {"id_intra_subject": False},
    "inter": {"id_inter_subject": False},
    "vlm": {"id_use_vlm": False},
    "cross": {"id_cross_modal": False, "id_joint_references": True},
}
PREFIXES = {"intra": ("intra_",), "inter": ("inter_",), "vlm": ("id_vlm_projector",), "cross": ("cross_", "id_vlm")}


@pytest.mark.parametrize("stage", STAGES)
def test_an_ablation_removes_its_parameters_and_no_others(stage):
    full = {name for name, _ in tiny_model().named_parameters()}
    ablated = {name for name, _ in tiny_model(**STAGES[stage]).named_parameters()}
    removed = {n for n in full if any(part.startswith(PREFIXES[stage]) for part in n.split("."))}
    assert removed
    assert ablated == full - removed


def reach(model, given: Condition) -> dict[str, bool]:
    """Does the video's output depend on references and VLM tokens; and a subject's tokens on another's?"""
    given = replace(
        given,
        references=tuple(reference.requires_grad_() for reference in given.references),
        vlm_BLD=given.vlm_BLD.requires_grad_(),
    )
    leaves = [*given.references, given.vlm_BLD]
    grads = torch.autograd.grad(run(model, given).square().sum(), leaves, allow_unused=True)
    reached = [grad is not None and bool(grad.abs().sum() > 0) for grad in grads]
    return {"references": all(reached[:-1]), "vlm": reached[-1]}


@pytest.mark.parametrize("stage", [*STAGES, "none"])
def test_gradients_show_that_an_ablation_closes_exactly_its_path(stage):
    model = tiny_model(**STAGES.get(stage, {}))
    assert reach(model, condition()) == {"references": True, "vlm": stage not in ("vlm", "cross")}
    block, layout = model.id_blocks[0], layout_of(GRIDS)
    subjects = torch.randn(1, sum(layout.lengths), DIM, requires_grad=True)
    _, after, _ = block(torch.randn(1, 4, DIM), subjects, layout)
    (grad,) = torch.autograd.grad(after[0, 0].square().sum(), subjects)
    itself, own, others = (grad[0, part].abs().sum() > 0 for part in (slice(0, 1), slice(1, 4), slice(4, None)))
    assert itself
    assert others == (stage != "inter"), "stage 2 alone connects subjects"
    # With stage 1 on, a subject's tokens see each other; so they do not through stage 2, which leaves the own out.
    assert own == (stage != "intra")


def test_phantom_conditioning_reaches_the_video_through_the_backbones_self_attention():
    model, wan = tiny_model(id_layers=0, id_joint_references=True), tiny_wan()
    assert len(model.id_blocks) == 0
    with torch.no_grad():
        assert torch.equal(run(model), run(wan))
        assert not torch.equal(run(model, condition()), run(wan))


def test_a_joint_reference_is_a_further_frame_of_the_backbone():
    """One reference of the video's own size: Wan on T + 1 frames, its last one cut off, with untouched blocks."""
    model, wan = tiny_model(disturb=False, id_layers=0, id_joint_references=True), tiny_wan()
    given = condition(sizes=((4, 6),), vlm_tokens=0)
    latents, timestep, text = inputs()
    with torch.no_grad():
        longer = torch.cat([latents, given.references[0][:, :, None]], dim=2)
        expected = wan(longer, timestep, text).sample[:, :, :-1]
        torch.testing.assert_close(model(latents, timestep, text, condition=given).sample, expected, **CLOSE)


@pytest.mark.parametrize("settings", [{}, STAGES["cross"], {"id_joint_references": True, "id_layers": 0}])
@pytest.mark.parametrize("sizes", [(), ((4, 4),), ((4, 4), (2, 6))])
def test_every_trained_parameter_gets_a_gradient_whatever_a_rank_draws(settings, sizes):
    """Ranks that dropped references or VLM tokens must take part in the same gradient reductions."""
    for vlm_tokens in (0, 7):
        model = tiny_model(**{"id_layers": 3, **settings}).train()
        expected = run(model.eval(), condition(sizes=sizes, vlm_tokens=vlm_tokens)).detach()
        output = run(model.train(), condition(sizes=sizes, vlm_tokens=vlm_tokens))
        assert torch.equal(output, expected), "and the values do not notice"
        output.square().sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# The cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["plain", "padded", "empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_exact_bit_for_bit(which, dtype):
    model = tiny_model().to(dtype)
    given = {"plain": condition(batch=3), "padded": padded_batch()[0], "empty": condition((), 3, 0)}[which]
    with torch.no_grad():
        cache = model.build_subject_cache(given)
        assert torch.equal(run(model, subject_cache=cache, batch=3), run(model, given, batch=3))


def test_one_cached_condition_serves_a_group_without_a_copy():
    model, single = tiny_model(), condition(batch=1)
    repeated = replace(
        single,
        references=tuple(r.expand(3, -1, -1, -1) for r in single.references),
        vlm_BLD=single.vlm_BLD.expand(3, -1, -1),
    )
    with torch.no_grad():
        cache = model.build_subject_cache(single)
        group = cache.expand(3)
        torch.testing.assert_close(run(model, subject_cache=group, batch=3), run(model, repeated, batch=3), **CLOSE)
    assert group.layers[0][0].data_ptr() == cache.layers[0][0].data_ptr()
    keys = 4 + 3 + 7
    assert group.bytes() == cache.bytes() == 2 * 2 * keys * DIM * 4, "2 layers, keys and values, float32"


def test_expanding_several_conditions_repeats_each_for_consecutive_videos():
    model = tiny_model()
    built = model.build_subject_cache(padded_batch()[0])
    assert built.expand(built.batch) is built, "in every step of batched guidance"
    cache = built.expand(6)
    assert torch.equal(cache.layers[0][0][0], cache.layers[0][0][1])
    assert torch.equal(cache.mask_BM[2], cache.mask_BM[3])
    with pytest.raises(UserError, match=r"batch=7.*nearest valid choice is 6"):
        model.build_subject_cache(padded_batch()[0]).expand(7)


def test_a_cache_is_refused_where_it_would_be_wrong():
    with pytest.raises(UserError, match="nothing of them can be cached"):
        tiny_model(id_joint_references=True).build_subject_cache(condition())
    model = tiny_model().train()
    with torch.no_grad():
        frozen = model.build_subject_cache(condition())
    with pytest.raises(UserError, match="without gradients"):
        run(model, subject_cache=frozen)
    run(model, subject_cache=model.build_subject_cache(condition())).square().sum().backward()
    assert model.id_blocks[0].intra_attn.to_q.weight.grad.abs().sum() > 0
