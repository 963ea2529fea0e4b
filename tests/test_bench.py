"""idc bench: operation counts, peers that compute the same, turns and failures, and what its JSON holds."""

from __future__ import annotations

import gzip
import json
import math
import random
import signal
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from idc.bench import context, data, generate, grpo, train
from idc.bench.cases import Case, Clock, Group, Outcome, nothing_shared, reason, run, stepwise
from idc.bench.cli import main
from idc.bench.context import Bench, default_speed
from idc.bench.device import known_device, larger_ceiling, matrix_ceiling
from idc.bench.lengths import drawn, widest
from idc.bench.models import (
    RandomSpec,
    cast_as_diffusers,
    fill_randomly,
    plain_wan,
    random_encoders,
    random_sample,
)
from idc.bench.profiling import profile_groups, top_kernels
from idc.bench.results import Report, Spread, at_least, at_most, below, ratios, rows_of
from idc.bench.setup import from_recipes, named
from idc.bench.tables import print_report
from idc.errors import UserError
from idc.models.attention import Choice
from idc.models.cost import StepFlops, step_flops
from idc.models.rounding import round_matrices
from idc.models.speed import Speed
from idc.models.transformer import IDCrafterTransformer
from idc.plan.devices import DEVICES
from idc.stages.rollouts import Rollouts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Bench:
    """Of a size at which a forward takes a millisecond."""
    setup = named("tiny")
    sampling = replace(setup.sampling, steps=2)
    setup = replace(setup, frames=5, sampling=sampling, text_length=6, text_tokens=3, vlm_tokens=5, subjects=2)
    return Bench(setup, CPU, torch.float32, Speed(), rounds=1, repeats=1, warm_up=0, options={"attention": ()})


def of_name(cases, name):
    return next(case for case in cases if case.name == name)


def counted(case: Case) -> int:
    """Operations of one repeat as torch counts them."""
    # The fused CPU kernel of attention is not counted by torch; its plain form is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        case.turn(0, 1)
    return counter.get_total_flops()


# What is counted ------------------------------------------------------------------------------------------------------


def missing_gradients(config, setup, references: int) -> int:
    """Operations that three forwards count and a backward pass leaves out: gradients of inputs that need none."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    patches = 4 * config["in_channels"]
    video = (setup.frames // 4 + 1) * (setup.height // 16) * (setup.width // 16)
    total = 2 * dim * patches * (video + references * setup.subject_tokens)
    total += 2 * config["freq_dim"] * dim + 2 * setup.text_length * config["text_dim"] * dim
    return total


@pytest.mark.parametrize(("group", "name", "subjects"), [(0, train.OURS, 0), (0, train.PLAIN, 0), (1, train.OURS, 2)])
def test_operations_of_a_training_step_are_those_that_torch_counts(bench, group, name, subjects):
    with train.groups(bench)[group].open() as cases:
        case = of_name(cases, name)
        spec = replace(bench.setup.spec, id_blocks=replace(bench.setup.spec.id_blocks, layers=2 if group else 0))
        config = RandomSpec.like(spec, CPU, torch.float32, 0).build(64, 64, "meta").config
        if name == train.PLAIN:  # without its recomputation, which is not counted as work
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                case.turn(0, 1)
            once = case.flops // 3
            assert 4 * 0.95 * once < counter.get_total_flops() < 4 * once
        else:
            # MATH's backward pass computes no product twice, so that a backward pass is two forwards.
            assert counted(case) + missing_gradients(config, bench.setup, subjects) == case.flops


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (0, generate.OURS),
        (0, generate.PIPELINE),
        (1, generate.BARE),
        (1, "0 subjects"),
        (1, "2 subjects"),
        (1, "2 subjects, no cache"),
    ],
)
def test_operations_of_generation_are_those_that_torch_counts(bench, group, name):
    with generate.groups(bench)[group].open() as cases:
        case = of_name(cases, name)
        total = counted(case)
    subjects = int(name[0]) if name[0].isdigit() else 0
    codec = 0
    if subjects:  # the VAE's own operations are not those of the transformer
        encoders = random_encoders(bench.setup, CPU)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encoders.features([random_sample(bench.setup, subjects)], None, ("references",))
        codec = counter.get_total_flops()
    assert total - codec == case.flops


@pytest.mark.parametrize("cache", [True, False])
def test_operations_of_an_iteration_follow_from_what_ran(bench, cache):
    light, whole = StepFlops(7, 9, 100), StepFlops(10, 13, 100)  # stand-ins: forwards with a cache, and without
    plan = grpo.Plan(4, 2, {"scale": 2.5})
    counts = {"trained": 8, "sampled": 20, "caches trained": 4, "caches sampled": 6}
    fake = replace(bench)
    object.__setattr__(fake, "step_flops", lambda model, n, trainable, cached: light if cached else whole)
    expected = 8 * (7 + 9) + 20 * 7 + 4 * (3 + 4) + 6 * 3
    if not cache:
        counts |= {"caches trained": 0, "caches sampled": 0}
        expected = 8 * (10 + 13) + 20 * 10
    assert grpo.iteration_flops(fake, plan, cache, counts) == expected


def test_a_backward_pass_through_frozen_weights_is_not_counted_as_two_forwards(bench):
    real = replace(bench, setup=replace(named("1.3b"), **grpo.REAL_SIZE))
    assert (grpo.trainable(real), grpo.trainable(bench)) == ("lora", "full")
    for of, least, most in ((real, 2.1, 2.4), (bench, 2.9, 3.0)):
        trained, sampled = (
            grpo.iteration_flops(of, grpo.Plan(4, 2, {"scale": 1}), True, {kind: 1}) for kind in ("trained", "sampled")
        )
        assert least < trained / sampled < most


def test_lengths_that_vary_leave_the_count_of_operations_as_it_is():
    setup, generator = named("1.3b"), random.Random(0)
    config = setup.spec.build(setup.text_dim, setup.vlm_dim, "meta").config

    def operations(subject_tokens, vlm_tokens):
        return step_flops(config, 81, 480, 832, setup.text_length, subject_tokens, vlm_tokens).useful

    counted = operations((setup.subject_tokens,) * 3, setup.vlm_tokens)
    every = [drawn(setup, generator) for _ in range(200)]
    tokens = [(tuple(rows * columns for rows, columns in one.grids), one.vlm) for one in every]
    each = [operations(*one) / counted for one in tokens]
    assert 0.998 < min(each) < max(each) < 1.002
    assert sum(each) / 200 == pytest.approx(1, abs=5e-4)
    assert len({(sum(of_subjects) + of_vlm) for of_subjects, of_vlm in tokens}) > 80  # keys of stage 3
    assert max(side for one in every for grid in one.grids for side in grid) == widest(setup).reference // 16


def test_every_step_of_a_real_size_has_other_references_in_all_modes_alike(bench, monkeypatch):
    monkeypatch.setattr("idc.bench.context.WIDE", 64)  # the tiny model counts as a real one
    real = replace(bench, setup=replace(bench.setup, reference=128, batch=2, vlm_tokens=30))
    met, run_forward = [], IDCrafterTransformer.forward

    def forward(self, *args, **named):
        condition = named["condition"]
        met.append(([tuple(r.shape) for r in condition.references], condition.vlm_BLD.shape, condition))
        return run_forward(self, *args, **named)

    monkeypatch.setattr(IDCrafterTransformer, "forward", forward)
    with train.groups(real)[1].open() as cases:
        for name in (train.OURS, "checkpointing full", "features encoded in every step"):
            of_name(cases, name).turn(0, 4)
    assert len(met) == 12
    shapes = [(tuple(references), vlm) for references, vlm, _ in met]
    assert len(set(shapes)) > 9
    for references, _, condition in met:
        assert all(batch == 2 and 0.8 < height * width / 256 < 1.2 for batch, _, height, width in references)
        assert condition.reference_sizes_BN2 is condition.vlm_mask_BL is None  # nothing is padded
    assert len({vlm[1] for _, vlm in shapes[:8]}) > 3


# Peers ----------------------------------------------------------------------------------------------------------------


def test_both_peers_compute_what_ours_does_with_the_blocks_off(bench):
    bench.checks.clear()
    with train.groups(bench)[0].open(), generate.groups(bench)[0].open():
        pass
    assert len(bench.checks) == 2
    assert max(bench.checks.values()) == 0.0  # bit for bit in float32 on the CPU


def test_in_bfloat16_each_has_the_weights_that_it_would_be_run_with(bench):
    """Ours as `idc generate`, the pipeline as diffusers loads it: its norms are rounded, and so are their outputs."""
    half = replace(bench, dtype=torch.bfloat16, checks={})
    with generate.groups(half)[0].open():
        (difference,) = half.checks.values()
    assert 0 < difference < 0.02
    model = generate.build(half, blocks=True)
    wan = plain_wan(model)
    cast_as_diffusers(wan, torch.bfloat16)
    ours, theirs = dict(model.named_parameters()), dict(wan.named_parameters())
    assert ours["blocks.0.attn1.to_q.weight"].data_ptr() == theirs["blocks.0.attn1.to_q.weight"].data_ptr()
    assert {name: (ours[name].dtype, p.dtype) for name, p in theirs.items() if ours[name].dtype is not p.dtype} == {
        name: (torch.float32, torch.bfloat16)
        for name in theirs
        if "norm_" in name or name.split(".")[0] in ("patch_embedding", "proj_out")
    }


def test_the_check_sees_a_peer_of_other_weights(bench):
    with generate.groups(bench)[0].open():
        same = dict(bench.checks)
    model = generate.build(bench, blocks=False)
    encoders = random_encoders(bench.setup, CPU)
    wan = plain_wan(model)
    text = generate._texts(bench, encoders, random_sample(bench.setup, 0))
    other = generate.build(replace(bench, setup=replace(bench.setup, seed=1)), blocks=False)
    pipeline = generate.wan_pipeline(bench, wan, None)
    assert generate._difference(bench, model, encoders, pipeline, text) in same.values()
    assert generate._difference(bench, other, encoders, pipeline, text) > 0.01


def test_a_peer_shares_its_weights_and_gradients_with_ours(bench):
    model = generate.build(bench, blocks=True)
    wan = plain_wan(model)
    ours, theirs = dict(model.named_parameters()), dict(wan.named_parameters())
    assert set(theirs) == {name for name in ours if not name.startswith("id_")}
    assert all(theirs[name] is ours[name] for name in theirs)


def test_weights_are_the_same_for_a_seed_nowhere_zero_and_islands_stay_float32(bench):
    spec = partial(RandomSpec.like, bench.setup.spec, CPU, torch.bfloat16)
    a, b, other = (spec(seed).build(64, 64) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.blocks[0].attn1.to_q.weight, other.blocks[0].attn1.to_q.weight)
    assert all(parameter.count_nonzero() > 0 for parameter in a.parameters())
    dtypes = {name: parameter.dtype for name, parameter in a.named_parameters()}
    assert dtypes["blocks.0.attn1.to_q.weight"] is torch.bfloat16
    assert dtypes["scale_shift_table"] is dtypes["blocks.0.norm2.weight"] is torch.float32
    whole = RandomSpec.like(bench.setup.spec, CPU, torch.float32, 0).build(64, 64)
    round_matrices(whole)  # as generation does
    assert all(map(torch.equal, whole.state_dict().values(), a.state_dict().values()))
    linear = torch.nn.Linear(400, 300)
    fill_randomly(linear, 3)
    assert linear.weight.std().item() == pytest.approx(1 / math.sqrt(400), rel=0.02)


# Turns ----------------------------------------------------------------------------------------------------------------


def counting(log, name, fail=None, seconds=1.0):
    """A case that writes down its turns, and fails in the turn of that number."""

    def turn(warm_up, repeats):
        log.append((name, warm_up))
        if fail is not None and sum(own == name for own, _ in log) == fail[0]:
            raise fail[1]
        return [{"whole": seconds, "part": seconds / 2}] * repeats

    return Case(name, turn, flops=10**12, settings={"attention": "native"})


def test_rounds_take_turns_back_and_forth_and_warm_up_fully_once():
    log, outcomes = [], []
    cases = [counting(log, "a"), counting(log, "b")]
    run([Group("g", partial(nothing_shared, *cases))], CPU, 3, 2, 5, outcomes)
    assert log == [("a", 5), ("b", 5), ("b", 1), ("a", 1), ("a", 1), ("b", 1)]
    assert [len(outcome.rounds) for outcome in outcomes] == [3, 3]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory"),
        (MemoryError(), "out of memory"),
        (UserError("speed.attention='flash': no kernel"), "failed: speed.attention='flash': no kernel"),
        (ValueError("odd"), "failed: ValueError: odd"),
    ],
)
def test_a_mode_that_does_not_fit_is_a_row_and_the_others_go_on(error, status):
    log, outcomes = [], []
    cases = [counting(log, "ours"), replace(counting(log, "greedy", (1, error)), against="ours"), counting(log, "last")]
    run([Group("g", partial(nothing_shared, *cases))], CPU, 2, 1, 0, outcomes)
    ours, greedy, last = rows_of(outcomes, 10.0)
    assert (ours.status, greedy.status, last.status) == ("ok", status, "ok")
    assert greedy.seconds is None
    assert greedy.ratio is None
    assert [name for name, _ in log].count("greedy") == 1  # it is not tried again
    assert [name for name, _ in log].count("last") == 2


def test_a_case_that_fails_later_keeps_its_first_rounds():
    log, outcomes = [], []
    late = replace(counting(log, "late", (2, MemoryError()), seconds=3.0), against="ours")
    run([Group("g", partial(nothing_shared, counting(log, "ours"), late))], CPU, 3, 1, 0, outcomes)
    row = rows_of(outcomes, None)[1]
    assert (row.status, row.seconds.n, row.ratio.rounds) == ("out of memory", 1, (3.0,))


def test_weights_that_do_not_fit_are_a_row_and_the_next_group_runs():
    @contextmanager
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    log, outcomes = [], []
    run([Group("big", too_large), Group("small", partial(nothing_shared, counting(log, "a")))], CPU, 1, 1, 0, outcomes)
    assert [(o.group, o.status) for o in outcomes] == [("big", "out of memory"), ("small", "ok")]


def test_an_interrupt_keeps_what_was_measured():
    log, outcomes = [], []
    cases = [counting(log, "a"), counting(log, "b", (2, KeyboardInterrupt()))]
    with pytest.raises(KeyboardInterrupt):
        run([Group("g", partial(nothing_shared, *cases))], CPU, 3, 2, 0, outcomes)
    a, b = rows_of(outcomes, None)
    assert (a.status, a.seconds.n) == ("interrupted", 2)
    assert (b.status, b.seconds.n) == ("interrupted", 2)


def test_an_interrupt_leaves_on_record_what_failed_before_it():
    log, outcomes = [], []
    cases = [
        counting(log, "big", (1, MemoryError())), counting(log, "odd", (1, ValueError("x"))), counting(log, "whole"),
        counting(log, "stopped", (1, KeyboardInterrupt())),
    ]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run([Group("g", partial(nothing_shared, *cases))], CPU, 1, 1, 0, outcomes)
    assert [outcome.status for outcome in outcomes] == ["out of memory", "failed: ValueError: x", "ok", "interrupted"]


def test_an_interrupt_of_a_trainer_is_one_here(bench, monkeypatch):
    before = signal.getsignal(signal.SIGINT)

    class Interrupted(grpo.Meter):
        def on_train_batch_start(self, *args):
            raise KeyboardInterrupt

    monkeypatch.setattr(grpo, "Meter", Interrupted)
    (case, *_) = grpo.groups(bench)[0].open().__enter__()
    with pytest.raises(KeyboardInterrupt):
        case.turn(0, 1)
    assert signal.getsignal(signal.SIGINT) is before


def test_steps_that_warm_up_are_not_counted_and_what_they_hold_is_released():
    log = []

    @contextmanager
    def open_step():
        def step(clock: Clock):
            log.append("step")
            clock.end("one")
            clock.end("two")
            clock.end("one")

        yield step
        log.append("closed")

    repeats = stepwise(open_step, CPU)(2, 3)
    assert log == ["step"] * 5 + ["closed"]
    assert len(repeats) == 3
    assert all(set(r) == {"whole", "one", "two"} and r["one"] + r["two"] <= r["whole"] for r in repeats)


def test_what_encloses_the_repeats_that_count_leaves_out_the_warm_up_and_the_closing():
    log = []

    @contextmanager
    def open_step():
        yield lambda clock: log.append("step")
        log.append("closed")

    @contextmanager
    def around():
        log.append("(")
        yield
        log.append(")")

    repeats = stepwise(open_step, CPU)(2, 3, around())
    assert log == ["step"] * 2 + ["(", *["step"] * 3, ")", "closed"]
    assert len(repeats) == 3
    log.clear()

    class Loader:
        def __iter__(self):
            log.append("pass")
            return iter([1, 2])

    assert len(data._passes(Loader(), int, 1, 2, around())) == 2
    assert log == ["pass", "(", "pass", "pass", ")"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_encloses_an_iteration_of_alignment_leaves_out_the_warm_up_and_is_always_left(bench, monkeypatch, fails):
    log = []

    class Telling(grpo.Meter):
        def on_train_batch_start(self, *args):
            super().on_train_batch_start(*args)
            log.append("iteration")

        def on_train_end(self, trainer, pl_module):
            log.append("end")

        def on_before_optimizer_step(self, *args):
            if fails and len(self.passes) == 2:
                raise MemoryError

    @contextmanager
    def around():
        log.append("(")
        try:
            yield
        finally:
            log.append(")")

    monkeypatch.setattr(grpo, "Meter", Telling)
    (case, *_) = grpo.groups(bench)[0].open().__enter__()
    if fails:
        with pytest.raises(MemoryError):
            case.turn(1, 1, around())
        assert log == ["iteration", "(", "iteration", ")"]
    else:
        assert len(case.turn(1, 1, around())) == 1
        assert log == ["iteration", "(", "iteration", ")", "end"]


# Profiles -------------------------------------------------------------------------------------------------------------


def event(number, name, device, start, end, annotation=False):
    """As torch makes it of what its tracer saw, in microseconds."""
    settings = {"use_device": "cuda", "stack": [], "is_user_annotation": annotation}
    return FunctionEvent(number, name, 0, start, end, device_type=device, **settings)


def test_kernels_are_what_ran_on_the_device_without_annotations_and_operators():
    cuda, host = DeviceType.CUDA, DeviceType.CPU
    step = "Optimizer.step#AdamW.step"
    events = EventList(
        [
            event(0, "aten::mm", host, 0, 500),
            event(1, "gemm", cuda, 0, 300),
            event(2, "gemm", cuda, 300, 600),
            event(3, step, host, 600, 700, annotation=True),
            event(4, step, cuda, 600, 1000, annotation=True),
            event(5, "multi_tensor_apply_kernel", cuda, 600, 1000),
        ],
        use_device="cuda",
    )
    events._build_tree()  # as a profiler does at its end
    averages = events.key_averages()
    assert sum(e.key == step for e in averages) == 2  # the class groups as it does for a GPU
    found = top_kernels(averages, "a case", torch.device("cuda"))
    assert [(k["name"], k["calls"]) for k in found] == [("gemm", 2), ("multi_tensor_apply_kernel", 1)]
    assert [k["share"] for k in found] == pytest.approx([0.6, 0.4])
    assert sum(k["seconds"] for k in found) == pytest.approx(1e-3)
    assert [k["name"] for k in top_kernels(averages, "a case", torch.device("cuda"), count=1)] == ["gemm"]
    assert top_kernels([], "a case", torch.device("cuda")) == []


def test_a_profiled_training_step_is_not_the_first_and_its_failures_are_told(bench, tmp_path):
    group = train.groups(bench)[0]

    @contextmanager
    def one():
        with group.open() as cases:
            yield [of_name(cases, train.OURS), counting([], "greedy", (1, MemoryError()))]

    @contextmanager
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    told = []
    kernels = profile_groups([Group("big", too_large), Group("g", one)], CPU, tmp_path, told.append)
    assert {kernel["case"] for kernel in kernels} == {"g: ours"}
    assert told[0] == "no profile of big: out of memory"
    assert told[-1].startswith("no profile of g: greedy: ")
    assert [path.name for path in tmp_path.iterdir()] == ["g-ours.json.gz"]
    names = [
        e.get("name") for e in json.loads(gzip.decompress((tmp_path / "g-ours.json.gz").read_bytes()))["traceEvents"]
    ]
    assert names.count("Optimizer.step#AdamW.step") == 1
    assert names.count("aten::zeros_like") < 10  # AdamW's first step makes two states of every parameter


@pytest.mark.parametrize(
    ("kind", "title"), [("cpu", "top operators by CPU time"), ("cuda", "top kernels by device time")]
)
def test_the_table_of_a_profile_says_whose_time_it_is(capsys, kind, title):
    kernel = {"case": "a", "name": "gemm", "seconds": 1e-3, "share": 1.0, "calls": 2}
    print_report(Report("train", {}, {"device": {"type": kind}}, kernels=[kernel]))
    assert title in capsys.readouterr().out


# Figures --------------------------------------------------------------------------------------------------------------


def outcome(name, rounds, against="", flops=0):
    case = Case(name, lambda w, r: [], against, flops)
    return Outcome("g", case, [[{"whole": s} for s in each] for each in rounds])


def test_figures_are_medians_quartiles_shares_and_ratios_by_round():
    ours = outcome("ours", [[1.0, 2.0, 3.0], [4.0, 4.0]], flops=30 * 10**12)
    peer = outcome("peer", [[4.0], [2.0]], against="ours")
    row, other = rows_of([ours, peer], ceiling_tflops=20.0)
    assert row.seconds == Spread(5, 3.0, 2.0, 4.0)
    assert (row.tflops, row.share) == (10.0, 0.5)
    assert other.ratio.rounds == (2.0, 0.5)
    assert (other.ratio.median, other.ratio.lowest, other.ratio.highest) == (1.25, 0.5, 2.0)
    assert ratios([[{"a": 1.0, "b": 3.0, "whole": 9.0}]], [[{"a": 2.0, "whole": 1.0}]], ("a", "b")) == [2.0]
    assert Spread.of([]) is None
    assert Spread.of([2.0]) == Spread(1, 2.0, 2.0, 2.0)


def test_the_planners_share_counts_recomputation_over_forward_and_backward_and_the_stated_peak(bench):
    ours = outcome("ours", [[5.0]])
    ours.rounds = [[{"whole": 5.0, "forward": 1.0, "backward": 2.0, "optimiser": 2.0}]]
    object.__setattr__(ours.case, "work", 12 * 10**12)
    (row,) = rows_of([ours], ceiling_tflops=20.0, stated_tflops=8.0)
    assert row.planner_share == 12 / 3 / 8
    assert rows_of([ours], 20.0)[0].planner_share is None
    with train.groups(bench)[1].open() as cases:
        none, full = of_name(cases, train.OURS), of_name(cases, "checkpointing full")
        assert full.flops == none.flops
        assert full.work > 1.25 * none.work > 1.2 * none.flops


def test_ours_has_the_attention_backends_that_a_stage_would_set(bench, monkeypatch):
    monkeypatch.setattr(context, "_choice", lambda *_: Choice("_native_math", "_native_flash"))
    model = generate.build(bench, blocks=True)
    said = context.apply_speed(bench, model, replace(bench.speed, checkpointing="full"), training=True)
    assert said == {
        "attention": "_native_math",
        "attention_of_subjects": "_native_flash",
        "checkpointing": "full",
        "compile": "off",
    }
    assert model.blocks[0].attn1.processor._attention_backend.value == "_native_math"
    assert model.id_blocks[0].cross_attn.processor._attention_backend.value == "_native_flash"


def test_a_backend_that_cannot_run_is_told_before_anything_has_run(capsys):
    with pytest.raises(UserError, match=r"^speed\.attention='_flash_3': .*; auto and native run everywhere"):
        main(["train", "--size", "tiny", "--device", "cpu", "--attention", "_flash_3"])
    assert not capsys.readouterr().err


def test_the_speed_is_the_recipes_and_flags_win():
    recipe = SimpleNamespace(stage=SimpleNamespace(speed=Speed("native", "full", True, False, "high")))
    unsaid = SimpleNamespace(attention=[], checkpointing=None, compile="auto")
    assert default_speed(CPU, recipe, unsaid) == recipe.stage.speed
    assert default_speed(CPU, None, unsaid) == Speed()
    said = SimpleNamespace(attention=["auto"], checkpointing="none", compile="off")
    assert default_speed(CPU, recipe, said) == Speed("auto", "none", False, False, "high")


def test_without_subjects_there_is_no_aim_for_their_extra_time(bench):
    report = Report("generate", {}, {})
    assert len(generate.aims(report, bench)) == 3
    without = replace(bench, setup=replace(bench.setup, subjects=0))
    assert not any("extra" in aim.what for aim in generate.aims(report, without))


def test_aims_of_denoising_leave_out_what_conditions_take(bench):
    def row(group, name, condition, denoise):
        case = Case(name, None, flops=6 * 10**12)
        rounds = [[{"whole": condition + denoise, "condition": condition, "denoise": denoise}]] * 2
        return Outcome(group, case, rounds)

    outcomes = [
        row(generate.BACKBONE, generate.OURS, 5.0, 2.0), row(generate.BACKBONE, generate.PIPELINE, 0.0, 4.0),
        row(generate.SUBJECTS, generate.BARE, 1.0, 2.0), row(generate.SUBJECTS, "2 subjects", 9.0, 3.0),
    ]  # fmt: skip
    report = Report("generate", {}, {}, rows=rows_of(outcomes, ceiling_tflops=8.0))
    assert [aim.measured for aim in generate.aims(report, bench)] == [6 / 3 / 8, 4 / 2, 3 / 2 - 1]
    outcomes[1].rounds, outcomes[3].rounds = [], []  # the pipeline's decoding has a row of its name, too
    outcomes.append(Outcome(generate.DECODE, replace(outcomes[1].case), [[{"whole": 1.0, "decode": 1.0}]]))
    report.rows = rows_of(outcomes, 8.0)
    assert [aim.measured for aim in generate.aims(report, bench)] == [None] * 3


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 3060", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_card_is_known_by_its_whole_name_or_not_at_all(name, known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = known_device(torch.device("cuda"))
    assert found == ({} if known is None else {"planner_device": known, "stated_tflops": DEVICES[known].bf16})


def test_aims_are_met_missed_or_not_measured():
    assert [at_least("x", value, 1.3, "times").met for value in (1.3, 1.29, None)] == [True, False, None]
    assert [below("x", value, 0.08, "share").met for value in (0.079, 0.08)] == [True, False]
    assert [at_most("x", value, 0.02, "points").met for value in (-0.4, 0.02, 0.021)] == [True, True, False]


def test_the_blocks_time_is_held_against_their_operations():
    on = outcome("ours", [[1.0]], flops=100)
    off = outcome(train.BARE, [[1.0]], flops=80)
    on.rounds = [[{"whole": 9.0, "forward": 4.0, "backward": 6.0}]]
    off.rounds = [[{"whole": 9.0, "forward": 3.0, "backward": 4.0}]]
    report = Report("train", {}, {}, rows=rows_of([on, off], None))
    assert train.excess_of_blocks(report, "g") == pytest.approx(0.3 - 0.2)
    report.rows = report.rows[:1]
    assert train.excess_of_blocks(report, "g") is None


def test_the_ceiling_is_the_best_of_its_sweep():
    found = matrix_ceiling(CPU, sides=(32, 64), repeats=1)
    assert set(found["sweep"]) == {32, 64}
    assert found["tflops"] == max(found["sweep"].values()) > 0
    assert found["dtype"] == "float32"


def test_a_ceiling_is_of_full_float32_whatever_the_cases_have_set(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "idc.bench.device._tflops", lambda *args: seen.append(torch.get_float32_matmul_precision()) or 1
    )
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        matrix_ceiling(CPU, sides=(32,))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]


@pytest.mark.parametrize(
    ("end", "larger", "said"),
    [
        (8.0, 8.0, "4 at the start and 8 at the end, shares are of the larger. They are 2.00 times apart"),
        (3.9, 4.0, "4 at the start and 3.9 at the end, shares are of the larger\n"),
        (None, 4.0, "from the start alone"),
    ],
)
def test_both_ceilings_of_a_run_are_told_and_shares_are_of_the_larger(capsys, end, larger, said):
    def measured(tflops, side):
        return {"tflops": tflops, "dtype": "float32", "side": side, "sweep": {side: tflops}}

    ceiling = larger_ceiling(measured(4.0, 32), end and measured(end, 64))
    assert (ceiling["tflops"], ceiling["tflops_start"], ceiling["tflops_end"]) == (larger, 4.0, end)
    assert ceiling["sweep"] == {ceiling["side"]: larger}
    print_report(Report("train", {}, {}, ceiling=ceiling), Console(width=300))
    assert said in capsys.readouterr().out


def test_data_measures_streams_and_stages_over_the_same_clips(bench):
    told = replace(bench, options={"workers": [0], "clips": 16})
    outcomes = []
    run(data.groups(told), CPU, 1, 1, 0, outcomes)
    rows = {row.name: row for row in rows_of(outcomes, None)}
    assert [row.status for row in rows.values()] == ["ok"] * 5
    assert {rows[name].ratio.to for name in (data.CACHED, data.PLAIN)} == {data.OURS}
    assert set(rows["decoded"].parts) == {"bytes", "clip", "references", "to float"}
    assert set(rows["cached features"].parts) == {"features"}
    with pytest.raises(UserError, match="--clips 24"):
        data._batch(replace(told, setup=replace(bench.setup, batch=12)))


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_all_that_a_figure_must_be_told_with(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("idc.bench.device.SIDES", {"cpu": (32,)})
    monkeypatch.setattr("idc.bench.device.SECONDS", 0.01)
    file = tmp_path / "grpo.json"
    options = ["--size", "tiny", "--device", "cpu", "--frames", "5", "--rounds", "1", "--repeats", "1"]
    options += ["--warm-up", "0", "--steps", "4", "--group", "2", "--rollouts", "2", "--json", str(file)]
    assert main(["grpo", *options]) == 0
    report = json.loads(file.read_text())
    assert report["command"] == "grpo"
    assert report["environment"]["command"].startswith("idc bench grpo --size tiny")
    assert {"torch", "diffusers", "cuda", "python"} <= set(report["environment"]["versions"])
    assert {"device", "driver", "commit", "threads"} <= set(report["environment"])
    ceiling = report["ceiling"]
    assert ceiling["tflops"] == max(ceiling["tflops_start"], ceiling["tflops_end"]) > 0
    assert all(row["share"] == pytest.approx(row["tflops"] / ceiling["tflops"]) for row in report["rows"])
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == 4
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["seconds"]["n"] == 1
        assert {"median", "low", "high"} <= set(row["seconds"])
        assert {"encode", "rollout", "reward", "train"} == set(row["parts"])
        assert row["flops"] > 0
    every, one = rows["all steps, cache on"], rows["one step, cache on"]
    assert every["ratio"]["to"] == one["name"]
    # Of four steps two can be stochastic; a policy gradient has one forward in training for each, and its reference's.
    assert every["counts"]["trained"] == 2 * one["counts"]["trained"] == 4
    assert rows["all steps, cache off"]["counts"]["caches trained"] == 0 < every["counts"]["caches trained"]
    (aim,) = report["aims"]
    assert aim["measured"] == every["ratio"]["median"]
    shown = capsys.readouterr().out
    assert "at least 4.00 times" in shown
    assert "not the aims' size" in shown


def test_a_device_that_a_case_has_broken_costs_no_row(tmp_path, capsys, monkeypatch):
    calls = []

    def ceiling(device):
        calls.append(device)
        if len(calls) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"tflops": 2.0, "dtype": "float32", "side": 32, "sweep": {32: 2.0}}

    monkeypatch.setattr("idc.bench.device.matrix_ceiling", ceiling)
    monkeypatch.setattr(train, "groups", lambda bench: [Group("g", partial(nothing_shared, counting([], "a")))])
    file = tmp_path / "train.json"
    assert main(["train", "--size", "tiny", "--device", "cpu", "--rounds", "1", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [(row["name"], row["share"]) for row in report["rows"]] == [("a", 0.5)]
    assert (report["ceiling"]["tflops_start"], report["ceiling"]["tflops_end"]) == (2.0, None)
    assert "no ceiling at the end: failed: RuntimeError" in capsys.readouterr().err


def test_a_wrong_backend_is_told_the_names_once():
    with pytest.raises(UserError, match=r"speed\.attention='zzz': must be one of auto, native") as error:
        main(["train", "--device", "cpu", "--attention", "native", "--attention", "zzz"])
    assert str(error.value).count("xformers") == 1


def test_a_table_shows_rows_without_figures_and_that_it_was_interrupted(capsys):
    rows = rows_of(
        [outcome("ours", [[1.0]]), Outcome("g", Case("big [x]", lambda w, r: []), status="out of memory")], 1
    )
    print_report(Report("train", {}, {}, rows=rows, interrupted=True, aims=[at_least("x", None, 0.5, "share")]))
    shown = capsys.readouterr().out
    assert "out of memory" in shown
    assert "big [x]" in shown
    assert "not measured" in shown
    assert "interrupted" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "--size", "1.3"], "did you mean '1.3b'"),
        (["train", "--frames", "8", "--device", "cpu"], "frames=8"),
        (["train", "--subjects", "9", "--device", "cpu"], "takes 0 to 4"),
        (["train", "--rounds", "0"], "--rounds 0: must be 1 or more"),
        (["train", "--round", "2"], "did you mean '--rounds'"),
        (["train", "--device", "tpu"], "must be auto, cpu or cuda"),
        (["train", "--config", "recipes/sft.yaml", "--size", "toy"], "a recipe has its own sizes"),
        (["train", "--json", "nowhere/at/all.json"], "is no folder"),
        (["train", "--profile", "README.md/traces"], "is a file"),
        (["train", "--attention", "flsh"], "did you mean 'flash'"),
        (["train", "--compile", "maybe"], "invalid choice"),
        (["grpo", "--device", "cpu", "--group", "4", "--rollouts", "6"], "whole groups of 4; the nearest is 8"),
        (["data", "--config", "recipes/sft.yaml"], "leave it out"),
        (["data", "--device", "cpu", "--clips", "15"], "--clips 15: must be 16 or more"),
        (["data", "--device", "cpu", "--workers", "0", "-3"], "--workers -3: must be 0 or more"),
    ],
)
def test_what_a_user_gets_wrong_is_named_before_anything_runs(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_sizes_come_from_a_recipe_without_its_weights():
    setup, _ = from_recipes(["--config", "recipes/sft.yaml", "--config", "recipes/scale/wan1.3b.yaml"])
    assert (setup.spec.num_layers, setup.spec.pretrained, setup.text_dim, setup.vlm_dim) == (30, None, 4096, 3584)
    assert (setup.frames, setup.height, setup.width, setup.sampling.steps) == (81, 480, 832, 50)
    assert setup.is_papers


def test_a_recipe_of_alignment_says_how_its_rollouts_are_sampled(bench):
    stage = SimpleNamespace(rollouts=Rollouts(steps=7, batch=2))
    told = replace(bench, recipe=SimpleNamespace(stage=stage, data=SimpleNamespace(group_size=4, batch_size=16)))
    plan = grpo.plan_of(told)
    assert (plan.rollouts, plan.group, plan.settings["steps"], plan.settings["batch"]) == (16, 4, 7, 2)
    shorter = grpo.plan_of(replace(told, options={"steps": 3, "group": 2, "rollouts": 6}))
    assert (shorter.rollouts, shorter.group, shorter.settings["steps"]) == (6, 2, 3)


def test_a_reason_is_one_line():
    assert reason(ValueError("a\n  b")) == "failed: ValueError: a b"
