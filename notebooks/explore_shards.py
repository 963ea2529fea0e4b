# %% [markdown]
# # Explore the shards
#
# What a model learns from, from the picture to the batch: a world whose truth is known, its clips as shards, the plan
# that says which sample comes when, and what happens to a sample that breaks. It runs in seconds on a CPU and
# downloads nothing.
#
# The toy world stands in for real video at every step, and real clips take the same way:
# `idc shards build --videos DIR --out data_shards/clips`.

# %%
import dataclasses
import os
import tarfile
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message=".*ipywidgets.*")  # nothing here needs them

import torch
from IPython.display import Image as Picture
from IPython.display import display
from PIL import Image

from idc.callbacks.previews import gif, panel
from idc.cli import main as idc
from idc.curate.sheet import contact_sheet
from idc.data.toy import ToySpec, ToyWorld, render_clip
from idc.models.sampling import to_uint8
from idc.show import film

scratch = tempfile.TemporaryDirectory()  # all that this notebook writes
work = Path(scratch.name)

# %% [markdown]
# ## A world in which everything is known
#
# One to three subjects, each a shape, a texture and a colour, move and meet on a background. A clip follows from one
# number, its seed. On the right are its references: each shows a subject turned, at another size and on another
# ground than the clip, so that copying does not pay.
#
# Only half of the captions say what the subjects look like (`ToyWorld(named=0.5)`). The others say "an object":
# there, nothing but the references tells, and a model that ignores them loses.

# %%
world = ToyWorld(frames=9, height=64, width=64, named=0.5)
samples = [world.sample(seed) for seed in range(6)]
Image.fromarray(contact_sheet(samples, row_height=96))

# %% [markdown]
# The same, moving. Previews in TensorBoard look like this, too.

# %%
shown = samples[5]
print(shown.caption)
Picture(gif(panel(to_uint8(shown.video_CTHW), [to_uint8(s.image_CHW) for s in shown.subjects]), shown.fps))

# %% [markdown]
# ## Exact scores
#
# Nobody has to be asked whether a toy video is right. The scorers find each subject, follow it, and compare colour,
# shape, texture and path with what was asked for. Below, two subjects have swapped their colours, which is the fault
# that multi-subject models are known for: `separation` falls, and the swap is counted.

# %%
from idc.data.toy_scoring import score_video

two = samples[1]
spec = ToySpec.from_json(two.meta["toy"])
first, second = spec.subjects
mixed_up = (dataclasses.replace(first, colour=second.colour), dataclasses.replace(second, colour=first.colour))
swapped = torch.from_numpy(render_clip(dataclasses.replace(spec, subjects=mixed_up))).movedim(-1, 0) / 127.5 - 1

pictures = [subject.image_CHW for subject in two.subjects]
display(film({"the clip": two.video_CTHW, "colours swapped": swapped}, {"the clip": pictures}))

right, wrong = score_video(two.video_CTHW, spec), score_video(swapped, spec)
print(f"{'':12}{'clip':>9}{'swapped':>9}")
for name, value in right.as_dict().items():
    print(f"{name:12}{value:9.2f}{wrong.as_dict()[name]:9.2f}")
print(f"{'pairs':12}{right.swapped:9}{wrong.swapped:9}   that wear each other's colour")

# %% [markdown]
# ## Shards
#
# Training reads tar files in WebDataset's layout. `ToyShards` writes them on first use; recipes name it as a source.

# %%
from idc.data.index import ShardIndex
from idc.data.sources import ToyShards

source = ToyShards(str(work / "toy"), count=48, seed=0)
source.prepare()
for path in sorted(work.glob("toy/*")):
    print(f"{path.stat().st_size:9,} bytes  {path.name}")

# %% [markdown]
# A sample is the files that share a name: the clip, its caption, its references, and a JSON file with everything
# else. The index knows where each one lies, so that any sample can be read by itself, in any order, also from a
# bucket in the cloud.

# %%
index = ShardIndex.load(source.path)
entry = index.entries[0]
with tarfile.open(work / "toy" / entry.shard) as tar:
    for member in tar.getmembers()[: len(entry.members)]:
        print(f"{member.size:7,} bytes  {member.name}")
print()
for field in ("id", "bucket", "fps", "caption_words", "sha256"):
    print(f"{field:14}{getattr(entry, field)}")

# %% [markdown]
# The commands see the same. `show` lists samples and draws a page of them, `lint` reads and decodes every one. (In a
# terminal: `idc shards show DIR --limit 3 --out page.png`.)

# %%
idc(["shards", "show", source.path, "--limit", "3", "--out", str(work / "page.png")])
display(Image.open(work / "page.png"))
status = idc(["shards", "lint", source.path])
print("exit status", status)

# %% [markdown]
# ## The plan: which sample in which batch
#
# All samples of a batch have one size and one number of subjects: they share a *bucket*. The order is a pure function
# of the seed and the epoch. It does not know how many processes there are, so a run goes on exactly where it was,
# also on another number of machines.

# %%
from idc.data.module import VideoDataModule


def data_of(source, **settings):
    data = VideoDataModule(sources=[source], buckets=[[9, 64, 64]], batch_size=4, **settings)
    data.setup("fit")
    return data


data = data_of(source)
plan = data.plan()


def keys(batch):
    return " ".join(f"{index.entries[ref].key.lstrip('0') or '0':>3}" for ref in batch.refs)


for epoch in (0, 1):
    print(f"epoch {epoch}")
    for number, batch in enumerate(plan.batches(epoch)[:5]):
        print(f"  batch {number}: {plan.buckets[batch.bucket].subjects} subjects, clips {keys(batch)}")

batch = plan.batches(0)[0]
print(f"\nbatch 0 on two processes: {keys(batch.part(0, 2))} | {keys(batch.part(1, 2))}")

# %% [markdown]
# What the trainer gets is a `Batch`: typed, stacked, each sample with a seed of its own. Noise, time and dropout are
# drawn from that seed, so they do not depend on who computes the sample, or when.

# %%
loader = data.train_dataloader()
batch = next(iter(loader))
print(tuple(batch.video_BCTHW.shape), batch.bucket)
for id, seed in zip(batch.ids, batch.seeds_B.tolist(), strict=True):
    print(f"{id:28} seed {seed}")
state = loader.state_dict()
print({name: state[name] for name in ("seed", "epoch", "global_batch")}, "is all it takes to go on")
Image.fromarray(contact_sheet(batch.samples, row_height=72))

# %% [markdown]
# ## A sample that breaks
#
# Disks lose bytes. Here the clip of one sample is overwritten with zeros, without a trace in size or date. `lint`
# finds it and says where.

# %%
victim = index.entries[5]
shard = work / "toy" / victim.shard
times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
clip = next(member for member in victim.members if member.ext == "mp4")
with shard.open("r+b") as stream:
    stream.seek(clip.offset)
    stream.write(bytes(clip.size))
os.utime(shard, ns=times)

status = idc(["shards", "lint", source.path])
print("exit status", status)

# %% [markdown]
# Training does not stop for it. Another sample of the same bucket takes its place, and the quarantine file names what
# was lost and why, once, for all later runs. Above a set share of losses (`max_corrupt_rate`) the run does stop: then
# it is no accident.

# %%
data = data_of(source, quarantine=str(work / "quarantine.jsonl"), max_corrupt_rate=0.05)
failures = [failure for batch in data.train_dataloader() for failure in batch.failures]
for failure in failures:
    print(f"{failure.id}\n  {failure.reason}\n  replaced by {failure.replacement}")
assert [failure.id for failure in failures] == [victim.id]

print("\nquarantine.jsonl\n" + (work / "quarantine.jsonl").read_text())

# %% [markdown]
# ## What the model sees: the codec
#
# The model works on latents. Wan's VAE turns 4n + 1 frames into n + 1 latent frames at an eighth of the size, with 16
# channels. The toy codec has the same geometry and no weights: it keeps 16 coefficients of a cosine transform.

# %%
from idc.models.toy_codec import CosineCodec

codec = CosineCodec().load()
latents = codec.encode(two.video_CTHW[None])
rebuilt = codec.decode(latents)[0]
error = (rebuilt - two.video_CTHW).square().mean()
print(tuple(two.video_CTHW.shape), "->", tuple(latents.shape[1:]), f" PSNR {10 * torch.log10(4 / error):.1f} dB")
film({"the clip": two.video_CTHW, "what is left of it": rebuilt})

# %% [markdown]
# ## What it learns: the flow path
#
# Training mixes clean latents with noise, $z_t = (1 - t)\, z_0 + t\, \epsilon$, and asks for the velocity
# $\epsilon - z_0$. At $t = 0$ is the clip, at $t = 1$ nothing but noise. Sampling walks back along it, as
# `from_checkpoint_to_video` shows.

# %%
from idc.flow.path import denoised, interpolate, velocity_target
from idc.flow.times import noise_like

noise = noise_like([0], latents.shape[1:])
film({f"t = {t}": codec.decode(interpolate(latents, noise, t))[0] for t in (0.0, 0.25, 0.5, 0.75, 1.0)}, height=72)

# %% [markdown]
# From any point of the path, the true velocity leads straight back to the clip.

# %%
halfway = interpolate(latents, noise, 0.5)
assert torch.allclose(denoised(halfway, velocity_target(latents, noise), 0.5), latents, atol=1e-5)

scratch.cleanup()
