# %% [markdown]
# # Reading an evaluation
#
# Three systems make the same twelve videos. They are judged, and the results are read: what a mean says and how sure
# one may be of it, what failed and why, who was mistaken for whom, and which clips to look at first. Commands are
# called as in a terminal; everything runs on a CPU, offline.

# %%
import json
import logging
import shutil
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message=".*ipywidgets.*")  # nothing here needs them

import lightning  # noqa: F401 - it sets its loggers' levels when it is imported
import numpy as np
import torch
from diffusers.utils.logging import disable_progress_bar
from IPython.display import Markdown, display

import idc
from idc.cli import main
from idc.show import film, matrix, plot, side_by_side

disable_progress_bar()
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
scratch = tempfile.TemporaryDirectory()  # all that this notebook writes
work = Path(scratch.name)
recipes = Path(idc.__file__).parents[1] / "recipes"


def command(text, *arguments):
    """`idc TEXT ARGUMENTS`; `recipes/` in the text is the checkout's, and its exit status is returned."""
    words = [
        str(recipes / word.removeprefix("recipes/")) if word.startswith("recipes/") else word for word in text.split()
    ]
    return main([*words, *map(str, arguments)])


# %% [markdown]
# ## Three systems
#
# **The toy world itself** renders the clips that were asked for: no system can be better, so its scores are a
# ceiling. The exit status of `idc evaluate` is 0 when every score is there.

# %%
evaluate = "evaluate --config recipes/evaluate.yaml --trainer.logger false"
status = command(evaluate, "--model.init_args.out", work / "truth", "--model.init_args.source.init_args.count", 12)
print("exit status", status)

# %% [markdown]
# **The model that comes with the package** gets the same prompts and references.

# %%
videos = work / "truth" / "videos"
items = json.dumps({"class_path": "ItemFile", "init_args": {"path": str(videos / "items.jsonl")}})
generate = "generate --config recipes/generate.yaml --model.init_args.checkpoint toy"
command(generate, "--model.init_args.out", work / "made", "--data.init_args.items", items)
arguments = ("--model.init_args.out", work / "model", "--model.init_args.system", "model")
status = command(evaluate, "--model.init_args.videos", work / "made", *arguments)
print("exit status", status)

# %% [markdown]
# **A damaged copy** of the toy world's clips has faults that we know, to see whether the scores find them: in three
# clips two subjects wear each other's colours, in one a subject vanishes half-way, one clip is cut short on the disk,
# one is missing, and there is a video that nobody asked for.

# %%
from dataclasses import replace

from idc.data.benchmark import read_items
from idc.data.toy import ToySpec, render_clip
from idc.data.video import decode_video, encode_video

asked = {item.id: item for item in read_items(videos / "items.jsonl")}
specs = {id: ToySpec.from_json(item.meta["toy"]) for id, item in asked.items()}


def apart(spec):
    """Whether the first two subjects have nothing in common: else, to swap colours is to swap places."""
    return len(spec.subjects) > 1 and all(
        getattr(spec.subjects[0], name) != getattr(spec.subjects[1], name) for name in ("shape", "texture")
    )


*exchanged, vanishing = [id for id, spec in specs.items() if apart(spec)][:4]
cut_short, missing = [id for id in asked if id not in (*exchanged, vanishing)][:2]

shutil.copytree(videos, work / "broken")


def write(id, frames_THWC):
    data = encode_video(frames_THWC, specs[id].fps, crf=0, pixel_format="yuv444p")
    (work / "broken" / f"{id}.mp4").write_bytes(data)


for id in exchanged:
    first, second, *others = specs[id].subjects
    subjects = (replace(first, colour=second.colour), replace(second, colour=first.colour), *others)
    write(id, render_clip(replace(specs[id], subjects=subjects)))

spec = specs[vanishing]
alone = replace(spec, subjects=tuple(replace(subject, target=None) for subject in spec.subjects[:-1]))
write(vanishing, np.concatenate([render_clip(spec)[:5], render_clip(alone)[5:]]))

whole = (work / "broken" / f"{cut_short}.mp4").read_bytes()
(work / "broken" / f"{cut_short}.mp4").write_bytes(whole[: len(whole) // 2])
(work / "broken" / f"{missing}.mp4").rename(work / "broken" / "holiday.mp4")

arguments = ("--model.init_args.out", work / "damaged", "--model.init_args.system", "damaged")
status = command(evaluate, "--model.init_args.videos", work / "broken", *arguments)
print("exit status", status)

# %% [markdown]
# Exit status 3: all that could be scored is scored, and what could not is named. A failure is a failure with its
# reason and never a number: counted as 0 it would look like a bad video, left out in silence it would flatter the
# system.
#
# ## A run folder
#
# `run.json` says what was judged and with what; beside it lies one JSON line for each video and metric. `read_run`
# reads both, also while the evaluation is still running.

# %%
from idc.metrics.results import read_run

runs = {name: read_run(work / name) for name in ("truth", "model", "damaged")}
info = runs["model"].info
print("protocol", info.protocol, "| commit", info.commit[:10] or "unknown", "| expected", info.expected)
print("metrics ", ", ".join(info.metrics), "\n")

line = runs["model"].results[exchanged[0], "toy_identity"]
for name in ("id", "metric", "value", "reason", "category", "prompt", "seconds"):
    print(f"{name:9} {getattr(line, name)}")
print("details  ", ", ".join(line.details))

# %% [markdown]
# ## Means, and how sure one may be of them
#
# Behind each mean stands how many videos it is made of, and an interval: the videos are drawn again, with
# replacement, two thousand times, and 95% of the means that come out lie within it (a bootstrap). With twelve videos
# it is wide. Two systems whose intervals overlap widely have not been told apart.
#
# A mean over fewer videos than were asked for does not compare with one over all of them: the two that are gone from
# the damaged copy might have been its worst.

# %%
from idc.report.measure import Measured

measured = {name: Measured(run) for name, run in runs.items()}


def cell_text(cell):
    if cell.value is None:
        return f"– ({cell.reason})"
    span = "" if cell.low is None else f" [{cell.low:.2f}, {cell.high:.2f}]"
    return f"{cell.value:.3f}{span}, {cell.scored} / {cell.expected}"


def table(columns, rows):
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]
    display(Markdown("\n".join(lines)))


metrics = ("toy", "toy_identity", "motion_amplitude")
table(["", *measured], [[metric, *(cell_text(each.cell(metric)) for each in measured.values())] for metric in metrics])

# %% [markdown]
# Face similarity was measured, too, and has nothing to say: toy subjects have no faces, so no video is expected to have
# a score. That is something else than a failure.

# %%
for name, run in runs.items():
    print(f"{name:8} facesim {run.mean('facesim')}")

# %% [markdown]
# ## What failed
#
# Every failure with its reason, and what lies in the folder without having been asked for:

# %%
from idc.stages.summary import complaints

print("\n".join(complaints(runs["damaged"])))

# %% [markdown]
# ## Identity over time
#
# A mean hides when something went wrong. The results keep each subject's likeness to its reference, frame by frame,
# with a gap where it is not seen. In the clip with the vanishing subject:

# %%
from idc.report.tracks import identity


def frames_of(run, id):
    return torch.from_numpy(decode_video(Path(run.info.videos) / f"{id}.mp4")).movedim(-1, 0) / 127.5 - 1


def curves(run, id):
    tracked = identity(run.results[id, "toy_identity"].details)
    seen = {track: any(value is not None for value in track.similarity) for track in tracked.tracks}
    return {track.name if seen[track] else f"{track.name}: not seen": track.similarity for track in tracked.tracks}


damaged, model = runs["damaged"], runs["model"]
print(asked[vanishing].prompt)
display(film({run.info.system: frames_of(run, vanishing) for run in (damaged, model)}, frames=9, height=64))
side_by_side(
    *(
        plot(curves(run, vanishing), f"{run.info.system}: likeness to the reference", width=300)
        for run in (damaged, model)
    )
)

# %% [markdown]
# ## Who was mistaken for whom
#
# One row a subject, one column a reference; the last column is "like none of them". A faithful video is dark on the
# diagonal; the row of a subject that is missing is empty. To wear another's colour does not make a subject the other
# one, as its shape and texture are still its own; the table on the right shows how far it goes.


# %%
def who(run, id):
    details = run.results[id, "toy_identity"].details
    names = [subject["name"] for subject in details["subjects"]]
    short = [f"ref. {number + 1}" for number in range(len(names))]
    confusion = matrix(details["confusion"], names, [*short, "none"], f"{run.info.system}: looks like")
    return side_by_side(confusion, matrix(details["likeness"], [""] * len(names), short, "likeness"))


id = exchanged[0]
print(asked[id].prompt)
display(film({run.info.system: frames_of(run, id) for run in (damaged, model)}, height=72))
display(who(damaged, id), who(model, id))

# %% [markdown]
# Over all videos, as rates: the shares of subjects and frames in which a subject is missing or looks like another,
# the share of subjects that appear twice, and the mean identity of the least similar subject of each video.

# %%
rates = {
    "missing": "subject_missing",
    "looks like another": "subject_swapped",
    "doubled": "subject_doubled",
    "least similar subject": "subject_min",
}
table(
    ["", *measured],
    [[title, *(cell_text(each.cell(key)) for each in measured.values())] for title, key in rates.items()],
)

# %% [markdown]
# The exact scorers of the toy world also count pairs that wear each other's colours. They find the three clips that
# we damaged:

# %%
pairs = {result.id: result.details.get("swapped") for result in damaged.of("toy") if not result.failed}
found = [id for id, count in pairs.items() if count]
print("found", found)
assert found == sorted(exchanged)

# %% [markdown]
# ## The worst clips
#
# Before anything is concluded from a mean: look. These are the model's three worst by the total of the exact scorers,
# with what was wrong in them; at the right of each is the clip that was asked for.

# %%
worst = sorted(model.of("toy"), key=lambda result: result.value)[:3]
ours, wanted = {}, {}
for result in worst:
    faults = [f"{result.details[name]} {name}" for name in ("missing", "extra", "doubled") if result.details[name]]
    ours[f"{result.id}: {', '.join([f'{result.value:.2f}', *faults])}"] = frames_of(model, result.id)
    wanted[f"{result.id}, asked for"] = frames_of(runs["truth"], result.id)
    print(f"{result.id}: {result.prompt}")
side_by_side(film(ours, frames=5, height=72), film(wanted, frames=5, height=72))

# %% [markdown]
# Which attributes are hard? The mean of each over the videos that have one:

# %%
attributes = ("background", "count", "presence", "colour", "shape", "texture", "motion", "separation")
means = []
for run in runs.values():
    details = [result.details for result in run.of("toy") if not result.failed]
    values = [[entry[name] for entry in details if entry[name] is not None] for name in attributes]
    means.append([float(np.mean(value)) if value else None for value in values])
matrix(means, list(runs), attributes, "mean of each score, 1 is perfect")

# %% [markdown]
# ## Protocols, and why they never mix
#
# A protocol says which metrics there are, on which scale, and with which weights they add up to a total. The same
# measurement is another number under another protocol: a NexusScore of 0.03 is a fraction of

# %%
from idc.metrics.total import PROTOCOLS, normalise, weights

for protocol in PROTOCOLS:
    parts = ", ".join(f"{weight:.2f} {name}" for name, weight in weights(protocol).items())
    print(f"{normalise('nexusscore', 0.03, protocol):.2f} under {protocol:12} total = {parts}")

# %% [markdown]
# So a table holds runs of one protocol, and a report that is given two says no. Here the toy clips are judged again,
# under the paper's protocol. Its total stays blank, with the reason: a sum of part of the metrics would look like a
# low total.

# %%
arguments = ("--model.init_args.out", work / "other", "--model.init_args.protocol", "paper")
command(evaluate, "--model.init_args.videos", videos, *arguments)
print(cell_text(Measured(read_run(work / "other")).total), "\n")
status = command("report", work / "truth", work / "other")
print("exit status", status)

# %% [markdown]
# ## The report
#
# `idc report` writes the paper's tables as Markdown, CSV and LaTeX, and a page with all videos side by side, the
# curves and the matrices of above, and what failed. It is a folder; open its `index.html` in a browser. (This one
# goes away with the notebook: give `--out` another folder to keep it.)

# %%
command(
    "report", work / "truth", work / "model", work / "damaged", "--out", work / "report", "--title", "Three systems"
)
for path in sorted((work / "report").iterdir()):
    print(f"  {path.name}{'/' if path.is_dir() else ''}")

# %%
scratch.cleanup()
