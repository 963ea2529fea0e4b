"""Recorded attention is what the blocks computed, and recording changes nothing."""

from __future__ import annotations

import torch
from _tiny_wan import condition, run, tiny_model

from idc.models.attention_maps import attention_weights, record_attention, subject_shares


def test_recording_changes_no_bit_and_stops_at_the_end():
    model, given = tiny_model(), condition()
    with torch.no_grad():
        plain = run(model, given)
        with record_attention(model) as maps:
            recorded = run(model, given)
        assert torch.equal(plain, recorded)
        count = len(maps)
        run(model, given)
    assert len(maps) == count


def test_every_stage_of_every_block_is_recorded_once_a_subject_or_once():
    model = tiny_model()
    with torch.no_grad(), record_attention(model) as maps:
        run(model, condition(sizes=((4, 4), (2, 6)), vlm_tokens=7))
    found = [(m.block, m.stage, tuple(m.weights_BALM.shape)) for m in maps]
    # 2x2 patches: subjects of 4 and 3 tokens; latents of 3 frames of 4x6 give 18 video tokens.
    each = [("intra", 4, 4), ("intra", 3, 3), ("inter", 4, 3), ("inter", 3, 4), ("cross", 18, 14)]
    assert found == [(block, stage, (2, 2, queries, keys)) for block in (0, 1) for stage, queries, keys in each]


def test_weights_times_values_are_what_the_attention_returns():
    model = tiny_model()
    attention = model.id_blocks[0].cross_attn
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, length, 2, 12, generator=g) for length in (5, 6, 6))
    mask = torch.rand(2, 6, generator=g) < 0.5
    mask[1] = False
    with torch.no_grad():
        weights = attention_weights(query, key, mask)
        mixed = torch.einsum("balm,bmae->blae", weights, value).flatten(2)
        expected = attention.to_out[0](mixed).masked_fill(~mask.any(1)[:, None, None], 0.0)
        torch.testing.assert_close(attention.attend(query, key, value, mask), expected)


def test_shares_of_the_subjects_and_the_vlm_sum_to_one():
    model = tiny_model()
    with torch.no_grad(), record_attention(model) as maps:
        run(model, condition(sizes=((4, 4), (2, 6)), vlm_tokens=7))
    cross = next(m.weights_BALM for m in maps if m.stage == "cross")
    shares = subject_shares(cross, [4, 3])
    assert shares.shape == (2, 18, 3)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 18))
    torch.testing.assert_close(shares[..., 1], cross.mean(1)[..., 4:7].sum(-1))
