"""On a GPU nothing mixes devices, waits for it needlessly or computes otherwise; shown where there is none."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _dpo_worker import DPOFit, overlay
from _generate import EDIT, GENERATE, held_out, here
from _grpo_worker import data, fit, save_start, stage
from _metric_examples import EXAMPLES, save_models
from _pretended_gpu import GPU, pretended_gpu
from _sft_worker import Fit, callbacks, fit_here, merge, tiny_overlay
from _tiny_real import save_qwen, save_wan
from torch import Tensor

import idc.metrics
from idc.bench.cli import main as bench
from idc.data.corruptions import TurnedColours
from idc.data.sources import ShardSource
from idc.models import attention
from idc.models.codecs import WanVAECodec
from idc.models.conditioners import UMT5Conditioner
from idc.models.vlm import QwenVLConditioner
from idc.stages.pairs import CorruptedPairs
from idc.stages.updates import Contrast, PolicyGradient


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda net, x: net(x), "same device: linear"),
        (lambda net, x: x + net.weight[0], "same device: add"),
        (lambda net, x: torch.cat([x, net.weight]), "same device: cat"),
        (lambda net, x: net.weight.detach().numpy(), "numpy"),
        (lambda net, x: x[torch.tensor([0], device="cuda")], "indices on the GPU"),
        (lambda net, x: torch.randn(3, device="cuda", generator=torch.Generator()), "randn: a generator"),
        (lambda net, x: torch.randn(3, generator=torch.Generator("cuda")), "randn: a generator"),
        (lambda net, x: net(x.to("cuda")) + x.copy_(net(x.cuda())), "same device: add"),
    ],
)
def test_the_pretence_refuses_what_cuda_refuses(wrong: Any, message: str) -> None:
    with pretended_gpu(), torch.no_grad():
        net = torch.nn.Linear(3, 3).to("cuda")
        with pytest.raises((RuntimeError, TypeError), match=message):
            wrong(net, torch.zeros(2, 3))


def test_the_pretence_allows_what_cuda_allows_and_computes_on_the_host() -> None:
    torch.manual_seed(0)
    x, plain = torch.randn(2, 3), torch.nn.Linear(3, 3)
    plain(x).sum().backward()
    with pretended_gpu() as pretence:
        net = torch.nn.Linear(3, 3)
        net.load_state_dict(plain.state_dict())
        net.to(GPU)
        out = net(x.cuda())
        out[torch.tensor([True, False])].sum().mul(torch.tensor(1.0)).backward()
        made = torch.randn(3, device="cuda", generator=torch.Generator("cuda"))
        assert {t.device for t in (net.weight, net.weight.grad, out, out[0].T, made, *net.state_dict().values())} == {
            GPU
        }
        assert out.cpu().device == torch.zeros(1).device == torch.device("cpu")
        assert pretence.looks == {(): 1}
    assert out.device == torch.device("cpu")
    torch.testing.assert_close(out, plain(x), rtol=0, atol=0)


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention at a GPU's sizes takes a CPU half a minute."""
    monkeypatch.setattr(attention, "_time", lambda *_: 1.0)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_training_on_a_gpu_is_that_on_the_cpu(compute_dtype: str, tmp_path: Path, toy_data: Path) -> None:
    """Features, steps, averages, held-out losses, previews and background saves; and a run that goes on."""
    runs = {}
    for accelerator in ("cpu", "gpu"):
        own = {"trainer": {"accelerator": accelerator}, "model": {"init_args": {"compute_dtype": compute_dtype}}}
        (folder := tmp_path / accelerator).mkdir()
        runs[accelerator] = Fit(folder, merge(tiny_overlay(toy_data, folder / "runs"), callbacks(), own))
    more = ["--trainer.max_steps=10", "--ckpt_path"]
    assert fit_here(runs["cpu"]) == fit_here(runs["cpu"], [*more, str(runs["cpu"].run)]) == 0
    with pretended_gpu() as pretence:
        assert fit_here(runs["gpu"]) == fit_here(runs["gpu"], [*more, str(runs["gpu"].run)]) == 0
    on_cpu, on_gpu = (runs[name].steps() for name in ("cpu", "gpu"))
    assert [*on_gpu] == [*range(1, 11)]
    rel = 1e-6 if compute_dtype == "float32" else 1e-4  # of an optimiser that is fused there
    for step, expected in on_cpu.items():
        assert on_gpu[step].pop("loss") == pytest.approx(expected.pop("loss"), rel=rel)
        assert on_gpu[step] == expected
    for step, expected in runs["cpu"].validation().items():
        assert runs["gpu"].validation()[step] == pytest.approx(expected, rel=rel)
    looks = {who: count for who, count in pretence.looks.items() if "training_step" in who}
    assert not looks  # a step queues all its work; its gradient's norm alone is waited for
    assert sum(count for who, count in pretence.looks.items() if who[0] == "clip_to_norm") == 10


def test_videos_and_edits_of_a_gpu_are_those_of_the_cpu(tmp_path: Path, toy_data: Path, trained: Any) -> None:
    for recipe in (GENERATE, EDIT):
        on_cpu, on_gpu = tmp_path / f"{recipe.stem}-cpu", tmp_path / f"{recipe.stem}-gpu"
        assert here(on_cpu, trained(), *held_out(toy_data), recipe=recipe) == 0
        with pretended_gpu():
            assert here(on_gpu, trained(), *held_out(toy_data), "--trainer.accelerator=gpu", recipe=recipe) == 0
        videos = [{path.name: path.read_bytes() for path in folder.glob("*.mp4")} for folder in (on_cpu, on_gpu)]
        assert videos[0] == videos[1]
        assert videos[0]


@pytest.mark.parametrize("objective", [partial(PolicyGradient, kl=0.1), Contrast], ids=["grpo", "nft"])
def test_alignment_on_a_gpu_is_that_on_the_cpu(objective: Any, tmp_path: Path, toy_data: Path) -> None:
    start = save_start(tmp_path / "start")
    expected = fit(stage(start, objective=objective()), data(toy_data), steps=2, limit_val_batches=1)
    with pretended_gpu():
        found = fit(
            stage(start, objective=objective()), data(toy_data), steps=2, limit_val_batches=1, accelerator="gpu"
        )
    for found_values, values in zip(found.metrics, expected.metrics, strict=True):
        assert found_values == pytest.approx(values, rel=1e-5)
    for name, weight in expected.weights[-1].items():
        torch.testing.assert_close(found.weights[-1][name].cpu(), weight)


def test_preferences_on_a_gpu_are_those_on_the_cpu(tmp_path: Path, toy_data: Path) -> None:
    start, runs = save_start(tmp_path / "start"), {}
    for name, clips in (("train", "train"), ("held_out", "held_out"), ("again", "held_out")):
        source = ShardSource(str(toy_data / clips))
        CorruptedPairs(str(tmp_path / name), source, TurnedColours(), 4, seed=int(name == "again")).prepare()
    for accelerator in ("cpu", "gpu"):
        (folder := tmp_path / accelerator).mkdir()
        content = overlay(tmp_path, start, folder / "runs", steps=2)
        runs[accelerator] = DPOFit(folder, merge(content, {"trainer": {"accelerator": accelerator}}))
    assert fit_here(runs["cpu"]) == 0
    with pretended_gpu():
        assert fit_here(runs["gpu"]) == 0
    assert runs["gpu"].losses() == pytest.approx(runs["cpu"].losses(), rel=1e-5)
    assert len(runs["gpu"].losses()) == 2


@pytest.mark.parametrize("command", ["train", "generate", "grpo"])
def test_the_benchmark_takes_all_its_cases_to_a_gpu(command: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("idc.bench.device.SIDES", {"cuda": (32,)})
    monkeypatch.setattr("idc.bench.device.SECONDS", 0.01)
    options = ["--size", "tiny", "--device", "cuda", "--compile", "off", "--json", str(tmp_path / "json")]
    options += ["--frames", "5", "--steps", "4", "--rounds", "1", "--repeats", "1", "--warm-up", "0"]
    options += ["--group", "2", "--rollouts", "2"] if command == "grpo" else []
    with pretended_gpu():
        bench([command, *options])
    report = json.loads((tmp_path / "json").read_text())
    failed = {row["name"] for row in report["rows"] if row["status"] != "ok"}
    assert failed <= {"compile on"}  # which the pretence cannot
    assert len(report["rows"]) >= 4
    assert report["environment"]["device"]["type"] == "cuda"


def test_encoders_on_a_gpu_are_those_on_the_cpu(tmp_path: Path) -> None:
    """Wan's VAE, also in tiles, UMT5 and Qwen2.5-VL."""
    save_wan(tmp_path)
    save_qwen(tmp_path)
    video = torch.rand(1, 3, 5, 64, 96) * 2 - 1
    captions, references = ["a red ball meets the cat", ""], [[torch.rand(3, 60, 90)], []]

    def encoded(device: str) -> list[Tensor]:
        codec = WanVAECodec(str(tmp_path), dtype="float32", tiling=True).load(device)
        text = UMT5Conditioner(str(tmp_path), max_length=16, dtype="float32").load(device)
        vlm = QwenVLConditioner(str(tmp_path), max_pixels=16 * 28 * 28, dtype="float32").load(device)
        latents = codec.encode(video)
        out = [latents, codec.decode(latents), text.encode(captions), *vlm.encode(captions, references)]
        assert {x.device.type for x in out} == {device}
        return [x.cpu() for x in out]

    expected = encoded("cpu")
    with pretended_gpu():
        found = encoded("cuda")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", idc.metrics.__all__)
def test_scores_of_networks_on_a_gpu_are_those_of_the_cpu(name: str, models: Path) -> None:
    example = EXAMPLES[name]
    metric, clips = example.make(models), example.clips()
    expected = [metric.score(clip) for clip in clips]
    with pretended_gpu():
        metric = example.make(models)
        metric.load("cuda")
        found = [metric.score(clip) for clip in clips]
    assert [x.value for x in found] == pytest.approx([x.value for x in expected], rel=1e-6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))
