"""Steps that take over the layers' residual: nothing where it is off, exactly what is said where it is on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _generate import direct, toy_items
from _grpo_worker import save_start
from _tiny_wan import condition, inputs, tiny_model
from test_editing import make_sample, make_sampler
from torch import Tensor

from idc.errors import UserError
from idc.models.baselines import VACE
from idc.models.sampling import Sampler, Sampling, SamplingChanges
from idc.models.step_reuse import Reuse, StepReuse, Tally, error_of
from idc.models.toy_codec import CosineCodec
from idc.stages.generate import Generate
from idc.stages.sharding import FSDP2
from idc.types import Bucket

ALWAYS = 1e9
SAMPLING = Sampling(steps=5, scale=2.5)


def sampled(sampler: Sampler, sampling: Sampling) -> tuple[Tensor, Tally, int]:
    """A video, its passes, and how often the layers ran."""
    sample, _ = make_sample()
    sampler, ran = replace(sampler, tally=Tally()), [0]
    handle = sampler.transformer.blocks[0].register_forward_hook(lambda *_: ran.__setitem__(0, ran[0] + 1))
    video = sampler.videos([sample], Bucket(5, 32, 32, 2), torch.tensor([3]), sampling)
    handle.remove()
    return video, sampler.tally, ran[0]


# When -----------------------------------------------------------------------------------------------------------------


def test_changes_add_up_to_the_threshold_and_start_again() -> None:
    reuse = StepReuse(threshold=0.25, last=100.0)
    decisions = []
    for step in range(8):
        found = reuse.residual(torch.full((1, 2, 3), 1.1**step), torch.tensor([900.0 - 100 * step]))
        decisions.append(found is not None)
        if found is None:
            reuse.keep(torch.full((1, 2, 3), float(step)))
        else:
            assert found.unique().item() == max(i for i in range(step) if not decisions[i])
    # Each changes by a tenth: 0.1 and 0.2 are below 0.25, 0.3 is not.
    assert decisions == [False, True, True, False, True, True, False, True]
    assert reuse.tally == Tally(passes=8, reused=5)
    assert reuse.residual(torch.full((1, 2, 3), 1.1**8), torch.tensor([100.0])) is None, "the last step"


def test_a_batch_goes_by_its_largest_change_and_no_number_is_never_below() -> None:
    for change in (5.0, math.nan):
        reuse = StepReuse(threshold=1.0, last=0.0)
        x = torch.ones(2, 3, 4)
        assert reuse.residual(x, torch.ones(2)) is None
        reuse.keep(x)
        assert reuse.residual(x.clone(), torch.ones(2)) is not None
        x = x.clone()
        x[1] = change
        assert reuse.residual(x, torch.ones(2)) is None


@pytest.mark.parametrize("tokens", [False, True], ids=["a time a sample", "a time a token"])
def test_the_change_is_of_what_the_first_attention_reads(tokens: bool) -> None:
    model = tiny_model().eval()
    latents, timestep, text = inputs()
    if tokens:
        timestep = timestep[:, None].expand(-1, 3 * 2 * 3)
    read: list[Tensor] = []
    model.blocks[0].attn1.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    seen: list[Tensor] = []
    watch = SimpleNamespace(residual=lambda x, t: seen.append(x), keep=lambda x: None)
    with torch.no_grad():
        model(latents, timestep, text, condition(), reuse=watch)
    assert torch.equal(seen[0], read[0])


# What -----------------------------------------------------------------------------------------------------------------


def test_off_or_never_below_is_exact_to_the_bit() -> None:
    sampler = make_sampler(CosineCodec())
    exact, tally, ran = sampled(sampler, SAMPLING)
    assert (tally.passes, ran) == (0, 10)
    never, tally, ran = sampled(sampler, replace(SAMPLING, reuse=Reuse(threshold=1e-12)))
    assert torch.equal(never, exact)
    assert (tally.passes, tally.reused, ran) == (10, 0, 10)


@pytest.mark.parametrize(("solver", "last"), [("euler", 1), ("heun", 2)])
def test_each_forward_of_guidance_computes_its_first_and_last_step(solver: Any, last: int) -> None:
    """Also where the two would be one batch. What comes of it is another video."""
    sampler = make_sampler(CosineCodec())
    sampling = replace(SAMPLING, solver=solver)
    exact, _, ran = sampled(sampler, sampling)
    video, tally, computed = sampled(replace(sampler, batch_guidance=True), replace(sampling, reuse=Reuse(ALWAYS)))
    assert tally.passes == ran
    # Heun's evaluations of the last step but one come to its beginning as well.
    assert computed == 2 * (1 + last + (solver == "heun"))
    assert tally.reused == ran - computed
    assert not torch.equal(video, exact)
    assert video.isfinite().all()


def test_a_step_that_is_taken_over_adds_the_residual_in_place_of_the_layers() -> None:
    """At the same input that is the same output, to rounding."""
    model = tiny_model(id_joint_references=True).eval()
    reuse = StepReuse(threshold=ALWAYS, last=-1.0)
    with torch.no_grad():
        first, second = (model(*inputs(), condition(), reuse=reuse).sample for _ in range(2))
        assert torch.equal(first, model(*inputs(), condition()).sample)
    assert reuse.tally == Tally(2, 1)
    assert torch.allclose(first, second, atol=1e-5)


# Settings and records -------------------------------------------------------------------------------------------------


def test_settings_that_break_their_rule_are_refused(tmp_path: Path) -> None:
    for threshold in (-0.1, math.nan, math.inf):
        with pytest.raises(UserError, match=rf"reuse.threshold={threshold}: must be 0 \(exact\) or positive"):
            Reuse(threshold)
    with pytest.raises(UserError, match=r"report_error=true: .*set report_error=false, or a threshold"):
        Reuse(report_error=True)
    changes = SamplingChanges(reuse=Reuse(0.1))
    with pytest.raises(UserError, match=r"threshold=0.1 and a baseline.*set 0"):
        Generate(str(tmp_path), baseline=VACE("nowhere"), sampling=changes)
    stage = Generate(str(tmp_path), checkpoint="toy", sampling=changes)
    stage._trainer = SimpleNamespace(strategy=FSDP2())  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"threshold=0.1: ranks that share weights.*auto, ddp"):
        stage.configure_model()
    sampler = make_sampler(CosineCodec())
    sampler.transformer.proj_out.weight.ds_id = 0  # as DeepSpeed's third stage marks what it shards
    with pytest.raises(UserError, match="ranks that share weights"):
        sampled(sampler, replace(SAMPLING, reuse=Reuse(0.1)))


def test_settings_survive_json_and_are_part_of_a_video_only_where_they_change_it() -> None:
    on = replace(SAMPLING, reuse=Reuse(0.1, report_error=True))
    assert Sampling(**json.loads(json.dumps(asdict(on)))) == on
    assert "reuse" not in SAMPLING.identity
    assert on.identity == {**SAMPLING.identity, "reuse": {"threshold": 0.1}}


def test_records_say_the_share_and_the_error_against_the_exact_video(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = save_start(tmp_path / "model")
    items, out = toy_items(toy_data, limit=1), tmp_path / "videos"
    made: list[Tensor] = []
    make = Generate.make

    def watched(*given: Any) -> Tensor:
        made.append(make(*given))
        return made[-1]

    monkeypatch.setattr(Generate, "make", watched)

    def run_with(reuse: Reuse) -> dict[str, Any]:
        made.clear()
        sampling = SamplingChanges(steps=4, scale=2.5, reuse=reuse)
        direct(out, start, items, sampling=sampling)
        (record,) = (out / "records").iterdir()
        return json.loads(record.read_text())

    record = run_with(Reuse(ALWAYS, report_error=True))
    assert record["reused"] == 0.5  # of four steps the second and the third
    lossy, exact = ((x.clamp(-1, 1) + 1) * 127.5 for x in made)
    difference = (lossy.round() - exact.round()).abs()
    assert record["error"] == {"mean": pytest.approx(difference.mean().item()), "max": difference.max().item()}
    assert record["error"]["mean"] > 0
    assert run_with(Reuse(ALWAYS)) == record, "made already: to measure changes no video"
    assert not made
    with pytest.raises(UserError, match=r"made otherwise: sampling\.reuse"):
        run_with(Reuse())


def test_the_error_is_of_255() -> None:
    video, exact = np.array([0, 250, 9], np.uint8), np.array([255, 250, 12], np.uint8)
    assert error_of(video, exact) == {"mean": 86.0, "max": 255.0}
