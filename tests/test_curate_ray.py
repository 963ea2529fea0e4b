"""Curation on Ray Data: the same bytes as in one process, and the same answers to what goes wrong."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _curate import Cut, Dies, Fails, Heavy, HeavyCut, Numbers, Pid, Split, Unready, Weigh, curation, files

from idc.curate.command import parse
from idc.curate.plan import chunks
from idc.curate.ray import RayExecutor, grouped
from idc.errors import UserError

ROOT = Path(__file__).parent.parent
HERE = RayExecutor(gpus_per_actor=0, actors=1)


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    """One small cluster for all tests; the executor joins what is there."""
    ray = pytest.importorskip("ray")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def steps(log: Path | str = "", *more: Any) -> tuple[Any, ...]:
    """Pixels are cut before the network, so that they travel; light steps come before, between and behind."""
    return (Cut(encoded=False), Split(), Weigh(log=str(log)), Heavy(), Fails((20,)), *more)


@pytest.mark.usefixtures("_cluster")
def test_ray_gives_the_bytes_of_one_process_and_goes_on_where_another_stopped(tmp_path: Path) -> None:
    logs = {name: tmp_path / f"{name}.log" for name in ("local", "ray")}
    here = curation(tmp_path / "local", 40, steps=steps(logs["local"])).run()
    there = curation(tmp_path / "ray", 40, steps=steps(logs["ray"]), executor=HERE).run()
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert [count.came for count in there.counts] == [count.came for count in here.counts]
    assert all(count.seconds for count in there.counts if count.step in ("cut", "weigh", "encode"))
    batches, loads = {}, {}
    for name, log in logs.items():
        lines = log.read_text().splitlines()
        batches[name] = Counter(line for line in lines if line.startswith("batch"))
        loads[name] = [line for line in lines if line.startswith("load")]
    assert batches["ray"] == batches["local"]
    assert len(loads["ray"]) == 1  # one actor, several chunks

    removed = sorted((tmp_path / "ray" / "work").glob("part-*.tar"))[0]
    removed.unlink()
    report = curation(tmp_path / "ray", 40, steps=steps()).run()  # by one process, where Ray began
    assert 0 < report.units - report.done_before < 40
    assert files(tmp_path / "ray") == files(tmp_path / "local")


@pytest.mark.usefixtures("_cluster")
def test_stages_that_look_alike_are_each_their_own_and_light_steps_stay_out_of_the_actors(tmp_path: Path) -> None:
    """Both ends of the first steps have the same names; so have two collections, but for their folders."""
    light, network = Pid(tmp_path / "light"), Pid(tmp_path / "heavy")
    network.heavy = True  # type: ignore[misc]
    for name, steps in (("ends", (light, network, HeavyCut(), light)), ("one", (Cut(),)), ("two", (Cut(),))):
        report = curation(tmp_path / name, 12, steps=steps, executor=HERE).run()
        assert (report.kept, report.done_before) == (12, 0)
    seen = {log: Counter((tmp_path / log).read_text().split()) for log in ("light", "heavy")}
    assert {log: pids.total() for log, pids in seen.items()} == {"light": 24, "heavy": 12}
    assert not seen["light"].keys() & seen["heavy"].keys()
    curation(tmp_path / "local", 12, steps=(Cut(),)).run()
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "local")


@pytest.mark.usefixtures("_cluster")
def test_a_worker_that_dies_under_ray_loses_its_chunk_alone(tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    dying = (Dies((30,)), Dies((3,), str(tmp_path / "marks")))
    report = curation(tmp_path / "ray", 40, steps=(Cut(), *dying), executor=HERE, max_failure_rate=1.0).run()
    (chunk,) = [found for found in chunks([Numbers(40)], 6) if any(unit.id == "n00030" for unit in found)]
    drops = [json.loads(line) for line in (tmp_path / "ray" / "drops.jsonl").read_text().splitlines()]
    dead = [drop for drop in drops if drop["reason"] == "worker died"]
    assert [drop["video"] for drop in dead] == [unit.id for unit in chunk]
    assert "(2 times)" in dead[0]["detail"]
    assert report.read == report.kept + report.dropped
    assert (tmp_path / "marks" / "3").exists()
    assert "n00003" not in {drop["video"] for drop in dead}
    assert not list(tmp_path.rglob("*.begun"))


@pytest.mark.usefixtures("_cluster")
def test_a_users_error_on_the_cluster_reaches_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 'unready': no weights at /models/sam"):
        curation(tmp_path / "a", 12, steps=(Cut(), Unready()), executor=HERE).run()
    with pytest.raises(UserError, match=r"gpus_per_actor=1: the cluster has 0 GPUs; 0 runs networks on CPUs"):
        curation(tmp_path / "b", 12, steps=steps(), executor=RayExecutor()).run()


def test_steps_are_grouped_by_weight_with_light_ends() -> None:
    light, other, heavy = Cut(), Split(), Weigh()
    assert grouped([]) == [((), False)]
    assert grouped([heavy]) == [((), False), ((heavy,), True), ((), False)]
    assert grouped([light, other, heavy, heavy, light]) == [
        ((light, other), False),
        ((heavy, heavy), True),
        ((light,), False),
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"actors": 0}, "actors=0"), ({"attempts": 0}, "attempts=0"), ({"gpus_per_actor": -1}, "gpus_per_actor=-1")],
)
def test_settings_of_the_cluster_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        RayExecutor(**settings)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("auto", "address=auto: this machine belongs to no Ray cluster; start one by ray start --head, or for this "),
        (
            "10.0.0.1:6379",
            "address=10.0.0.1:6379: no Ray cluster answers there (ConnectionError: timed out); ray start",
        ),
    ],
)
def test_where_there_is_no_cluster_the_message_says_how_to_go_on(
    address: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it says to write, behind the recipe, makes a cluster here without GPUs."""
    ray = pytest.importorskip("ray")

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("timed out")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError) as raised:
        curation(tmp_path, executor=RayExecutor(address)).run()
    text = str(raised.value)
    assert text.startswith(words)
    settings = text[text.index("--executor") :].split()
    recipes = [ROOT / "recipes/curate.yaml", ROOT / "recipes/hardware/ray.yaml"]
    made = parse([part for recipe in recipes for part in ("--config", str(recipe))] + settings)
    assert made is not None
    assert isinstance(made.executor, RayExecutor)
    assert (made.executor.address, made.executor.gpus_per_actor) == (None, 0)


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'idc\[ray\]'"):
        curation(tmp_path, executor=HERE).run()
