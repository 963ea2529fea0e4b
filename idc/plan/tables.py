"""A plan as tables for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from idc.errors import counted
from idc.plan.devices import Device
from idc.plan.estimate import Plan
from idc.stages.grpo import GRPO
from idc.types import Bucket

GIB = 2**30
TERA = 1e12
_LAUNCHES = 0.1  # seconds that a pass takes for its thousands of kernels alone, about


def tables(plan: Plan, devices: Sequence[Device]) -> Iterator[Table | str]:
    """All that is printed, in order."""
    for table in (_parameters(plan), _memory(plan, devices), _operations(plan), _time(plan, devices), *_data(plan)):
        if isinstance(table, Table):  # a title of its own would be as narrow as the table
            yield f"\n{table.title}"
            table.title = None
        yield table
    for note in notes(plan):
        yield f"note: {note}"
    short = [device for device in devices if on_gpu(device) and plan.seconds(device).compute < _LAUNCHES * plan.passes]
    if short:
        yield f"note: {short[0].name}: passes this short wait for kernels to be launched, and take longer than is told"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    return table


def _parameters(plan: Plan) -> Table:
    parameters = plan.structure.parameters
    table = _table(f"Parameters (trainable: {plan.structure.trainable})", "part", "parameters", "trained", "frozen")
    for name, (count, trained) in parameters.parts.items():
        table.add_row(name, f"{count:,}", f"{trained:,}", f"{count - trained:,}")
    table.add_row("transformer", *(f"{n:,}" for n in (parameters.total, parameters.trained)), "", style="bold")
    resident = plan.resident
    for encoder in plan.encoders:
        where = "" if encoder in resident else " (not on the device while it trains)"
        known = "unknown" if encoder.parameters is None else f"{encoder.parameters:,}"
        table.add_row(f"{encoder.part}: {encoder.name}{where}", known, "0", known)
    return table


def _memory(plan: Plan, devices: Sequence[Device]) -> Table:
    work = plan.work
    layout = plan.layout
    spread = f", weights over {layout.shards}" if layout.shards > 1 else ""
    title = (
        f"Memory of a rank, of {layout.ranks} ({layout.strategy}{spread}): {counted(work.clips, 'clip')} of "
        f"{shape(work.bucket)} at once, checkpointing {plan.structure.checkpointing}"
    )
    table = _table(title, "part", "GiB")
    found = plan.memory(on_gpu=any(on_gpu(device) for device in devices))
    for name, size in found.parts.items():
        table.add_row(name, gib(size))
    if found.optimiser_step > sum(found.parts.values()):
        table.add_row("more at the optimiser's step", gib(found.optimiser_step - sum(found.parts.values())))
    if found.margin:
        table.add_row(f"margin ({found.margin_note}), assumed", gib(found.margin))
    table.add_row("peak", gib(found.total), style="bold")
    for name, size in found.host.items():
        table.add_row(f"in host memory: {name}", gib(size))
    for device in devices:
        if on_gpu(device):
            fits = found.total <= device.memory * GIB
            verdict = "fits" if fits else "DOES NOT FIT"
            table.add_row(f"{device.name}: {verdict}", f"{device.memory:.1f}", style="green" if fits else "bold red")
    return table


def _operations(plan: Plan) -> Table:
    sample = {"GRPO": "rollout", "DPO": "pair"}.get(type(plan.stage).__name__, "clip")
    table = _table(
        f"Operations, TFLOP a {sample} with all its conditions",
        "bucket, subjects", "share", "forward", "backward", "recomputed", "without gradient", "total",
    )  # fmt: skip
    for bucket, share in plan.buckets.items():
        each = plan.operations[bucket]
        frozen = ", ".join(f"{name} {tera(flops)}" for name, flops in each.frozen.items())
        table.add_row(shape(bucket), f"{share:.0%}", *map(tera, each.trained), frozen or "0", tera(each.total))
    step = plan.samples_a_step
    table.add_row(
        f"a step of {step:g} on {plan.layout.ranks}", "", *(tera(step * part) for part in plan.sample.trained),
        tera(step * sum(plan.sample.frozen.values())), tera(step * plan.sample.total), style="bold",
    )  # fmt: skip
    return table


def _time(plan: Plan, devices: Sequence[Device]) -> Table:
    spread = plan.layout.sequence > 1
    table = _table(
        "Time, with shares of the peak that are assumed",
        "device", "peak, TFLOP/s", "share", "compute", "ranks' exchange", *["tokens' exchange"] * spread, "optimiser",
        "s a step", "steps", "hours",
    )  # fmt: skip
    dtype = str(plan.stage.compute_dtype).removeprefix("torch.")
    for device in devices:
        took, steps = plan.seconds(device), plan.steps
        share = device.share if plan.share is None else plan.share
        peak = device.peak(dtype, plan.stage.speed.matmul_precision) / TERA
        figures = took.compute, took.communication, *[took.sequence] * spread, took.optimiser, took.total
        table.add_row(
            device.name, f"{peak:.3g} {dtype}", f"{share:.0%}",
            *(f"{value:.3g}" for value in figures),
            "?" if steps is None else f"{steps:,}", "?" if steps is None else f"{steps * took.total / 3600:.3g}",
        )  # fmt: skip
    return table


def _data(plan: Plan) -> Iterator[Table | str]:
    samples = plan.samples
    if samples.assignment is not None:
        table = samples.assignment.table(plan.recipe.data.batch_size)
        table.title = f"Training samples by bucket: {sum(samples.kept.values()):,} kept, {samples.dropped:,} dropped"
        yield table
    else:
        yield "Training samples: not known: " + "; ".join(samples.lacking)
    where = plan.recipe.data.features
    each = max(map(plan.cache_of, plan.buckets))
    if where is None:
        yield f"Features cache: none (data.init_args.features=null); it would take up to {each / 1e6:.1f} MB a sample"
    elif plan.cache is None:
        yield f"Features cache in {where}: up to {each / 1e6:.1f} MB a sample, {each / 1e3:.0f} GB for a million"
    else:
        yield f"Features cache in {where}: {plan.cache / 1e9:.2f} GB, up to {each / 1e6:.2f} MB a sample"


def notes(plan: Plan) -> list[str]:
    """What was taken for granted."""
    found = [*plan.recipe.notes]
    if plan.structure.from_recipe:
        found.append("sizes of the transformer are the recipe's; its weights are a hub's, which was not asked")
    if plan.samples.assignment is None:
        found.append(
            "without the shards' index: every bucket as often as the others, with as many subjects as may come "
            f"(data.init_args.max_subjects={plan.recipe.data.rule.max_subjects}) and captions of {plan.words:g} words"
        )
    if plan.samples.reference_side is None:
        found.append(f"references are taken to have {plan.reference_side**2} tokens, the cap of their area")
    if plan.stage.speed.compile:
        found.append("speed.compile keeps fewer activations than are counted here")
    found += _of_host_memory(plan)
    if plan.layout.sequence > 1:
        found.append("a sequence is spread over ranks: the subjects' tokens, which all of them hold, count as spread")
        found.append(
            "tokens' exchange: ranks that share a sample send each other its tokens around every self-attention, which "
            "waits for them: it adds to a step, while the exchange of weights and gradients runs beside the computing"
        )
    if plan.steps is not None:
        others = "rewards, " * isinstance(plan.stage, GRPO) + "encoding the features, validation, previews and saves"
        found.append(f"hours are the run's steps times the seconds of one: {others} are not in them")
    if isinstance(plan.stage, GRPO):
        found.append("rewards' networks on the device, and decoding rollouts, are not counted")
    elif plan.recipe.callback("Previews") is not None and any(e.bytes for e in plan.encoders):
        found.append("previews load the codec and decode beside the training state; their memory is not counted")
    return found


def _of_host_memory(plan: Plan) -> Iterator[str]:
    """What it takes of a node's, which no verdict on a device looks at."""
    ranks, host, copy = plan.layout.ranks // plan.layout.nodes, plan.memory().host, plan.snapshot_bytes
    if host:
        yield f"{', '.join(host)} take {gib(ranks * sum(host.values()))} GiB of a node's host memory"
    if copy:
        what = "weights, states" + (" and averages" if plan.averages != "none" else "")
        yield f"an asynchronous save's copy of {what} takes {gib(copy)} GiB of a node's host memory" + (
            " beside that" if host else ""
        )
    zero = plan.layout.zero
    if zero is not None and zero.stage == 3:
        whole = gib(4 * ranks * plan.structure.parameters.total)
        yield f"ZeRO-3's ranks first build whole models: {whole} GiB of a node's host memory at the start"
    if zero is not None and zero.is_offloaded:
        yield "what is offloaded is moved to and fro, and steps on the CPU: neither is in the time told here"


def on_gpu(device: Device) -> bool:
    return device.name.startswith("NVIDIA")


def shape(bucket: Bucket) -> str:
    return f"{bucket.frames}x{bucket.height}x{bucket.width}, {bucket.subjects}"


def gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= 0.1 * GIB else f"{size / GIB:.4f}"


def tera(flops: float) -> str:
    return f"{flops / TERA:,.4g}"


def as_json(plan: Plan, devices: Sequence[Device]) -> dict[str, Any]:
    """The same as plain JSON: bytes, operations and seconds."""
    parameters = plan.structure.parameters
    gpu = any(on_gpu(device) for device in devices)
    found = plan.memory(on_gpu=gpu)
    return {
        "parameters": {
            "parts": {name: {"all": a, "trained": b} for name, (a, b) in parameters.parts.items()},
            "encoders": {encoder.part: encoder.parameters for encoder in plan.encoders},
        },
        "layout": {**asdict(plan.layout), "gathered": str(plan.layout.gathered).removeprefix("torch.")},
        "pass": {
            "clips": plan.work.clips,
            "bucket": list(plan.work.bucket),
            "checkpointing": plan.structure.checkpointing,
        },
        "memory": {"parts": found.parts, "margin": found.margin, "peak": found.total, "allocated": found.allocated},
        "host_memory": found.host,
        "save_copy_of_a_node": plan.snapshot_bytes,
        "operations": {
            shape(bucket): {**each.trained._asdict(), **each.frozen, "total": each.total}
            for bucket, each in plan.operations.items()
        },
        "samples_a_step": plan.samples_a_step,
        "devices": {
            device.name: {
                "memory": round(device.memory * GIB),
                "fits": found.total <= device.memory * GIB if on_gpu(device) else None,
                "assumed_share": device.share if plan.share is None else plan.share,
                "seconds_a_step": plan.seconds(device).total,
                "seconds_by_part": asdict(plan.seconds(device)),
                "hours": None if plan.steps is None else plan.steps * plan.seconds(device).total / 3600,
            }
            for device in devices
        },
        "samples": {
            "kept": sum(plan.samples.kept.values()) if plan.samples.assignment else None,
            "dropped": plan.samples.dropped if plan.samples.assignment else None,
            "lacking": list(plan.samples.lacking),
        },
        "cache_bytes": plan.cache,
        "notes": notes(plan),
    }
