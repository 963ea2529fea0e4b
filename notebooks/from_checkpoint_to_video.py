# %% [markdown]
# # From checkpoint to video
#
# A trained model, a prompt and pictures of the subjects: what comes out, what each part has to do with it, and what
# goes on in the three stages of its attention. The model is the small one that comes with the package, trained on the
# toy world by `recipes/sft.yaml`; everything runs on a CPU, offline. What it cannot do yet shows, too: every figure
# below is of this model, on a few clips.

# %%
import dataclasses
import warnings
from contextlib import contextmanager

warnings.filterwarnings("ignore", message=".*ipywidgets.*")  # nothing here needs them

import numpy as np
import torch
from diffusers.utils.logging import disable_progress_bar
from IPython.display import Image as Picture
from IPython.display import display

from idc.callbacks.previews import gif, panel
from idc.data.toy import ToySpec, ToyWorld
from idc.data.toy_scoring import score_video
from idc.models.pipeline import IDCrafterPipeline
from idc.models.sampling import to_uint8
from idc.show import film, heat, matrix, plot, side_by_side

disable_progress_bar()

# %% [markdown]
# ## The checkpoint
#
# `from_pretrained` reads a folder that `save_pretrained` or `idc export` wrote; `"toy"` is the one in the package. A
# run of `idc fit` opens as it is: `IDCrafterPipeline.from_run("runs/sft")`. The same model and the same sampler stand
# behind `idc generate`, so a video is the same from either, bit for bit, with the seed of its `records/<id>.json`.

# %%
pipe = IDCrafterPipeline.from_pretrained("toy")
transformer = pipe.transformer
count = sum(parameter.numel() for parameter in transformer.parameters())
print(f"{count / 1e6:.1f} million parameters in {len(transformer.blocks)} layers")
print(f"{len(transformer.id_blocks)} of the layers are followed by the three stages")
print(pipe.sampling)

# %% [markdown]
# ## A video
#
# A clip of the held-out world gives the prompt and the references; the model has never seen it. Its caption says "an
# object" where it could say what the objects look like, so all looks must come from the references.

# %%
HELD_OUT = 1_000_000_000  # training clips have seeds below
world = ToyWorld(subjects=(0, 1), named=0)  # two subjects, never described in words
clips = [world.sample(HELD_OUT + number) for number in range(5)]


def pictures(sample):
    return [subject.image_CHW for subject in sample.subjects]


def video(sample, references=None, **settings):
    """The model's video for a prompt and references, as `[3, T, H, W]` in [-1, 1]."""
    shown = pictures(sample) if references is None else references
    size = dict(zip(("frames", "height", "width"), sample.video_CTHW.shape[1:], strict=True))
    return pipe(sample.caption, shown, **size, output_type="pt", seed=0, **settings).frames


clip = clips[0]
made = video(clip)
print(clip.caption)
Picture(gif(panel(to_uint8(made), list(map(to_uint8, pictures(clip))), to_uint8(clip.video_CTHW)), clip.fps))

# %% [markdown]
# From left to right: the references, the model's video, and the clip that the prompt was taken from. The clip is one
# right answer, not the only one: where a subject starts is nowhere said.

# %% [markdown]
# ## Do the references matter?
#
# The same prompts and the same noise, with the clip's own references, with another clip's, and with none. The toy
# world's exact scorers say how much each video has in common with the subjects of the clip itself, and with those of
# the other clip: the share of colours, shapes and textures that are right, times the share of frames that show the
# subject (`idc.metrics.ToyIdentity`).

# %%
from idc.metrics import ToyIdentity
from idc.metrics.base import Clip


def spec_of(sample):
    return ToySpec.from_json(sample.meta["toy"])


def with_looks_of(spec, other):
    """What `spec` asks for, with the subjects of `other`: same places and paths."""
    looks = [{name: getattr(subject, name) for name in ("shape", "texture", "colour")} for subject in other.subjects]
    subjects = [dataclasses.replace(subject, **look) for subject, look in zip(spec.subjects, looks, strict=True)]
    return dataclasses.replace(spec, subjects=tuple(subjects))


def identity(video_CTHW, spec):
    judged = Clip("a", to_uint8(video_CTHW), meta={"toy": spec.to_json()})
    return ToyIdentity().score(judged).value


others = clips[1:] + clips[:1]
made_of = {
    "own references": [made, *map(video, clips[1:])],
    "another clip's": [video(sample, pictures(other)) for sample, other in zip(clips, others, strict=True)],
    "no references": [video(sample, ()) for sample in clips],
}
behind = {"own references": pictures(clip), "another clip's": pictures(others[0])}
film({name: videos[0] for name, videos in made_of.items()}, behind)

# %%
specs = [spec_of(sample) for sample in clips]
strange = [with_looks_of(spec, spec_of(other)) for spec, other in zip(specs, others, strict=True)]
table = [
    [float(np.mean(list(map(identity, videos, asked)))) for asked in (specs, strange)] for videos in made_of.values()
]
title = f"identity, mean of {len(clips)} videos"
matrix(table, list(made_of), ["of the clip's subjects", "of the other clip's"], title)

# %% [markdown]
# A model that draws what it is shown has its dark cells on the diagonal of the upper two rows. The last row is what
# guessing gives: one colour in six, one shape in four and one texture in three are right by accident.

# %% [markdown]
# ## From noise to clip
#
# Sampling walks the flow path back from noise, at t = 1, to data, at t = 0, by Euler's method. At each step the model
# says which way; following that straight to the end gives its present guess of the clip. Layout and colours come
# first, edges last.

# %%
from idc.flow.path import denoised
from idc.flow.samplers import sample_euler, shifted_times
from idc.flow.times import noise_like

sampler, codec = pipe.sampler, pipe.encoders.codec
features = pipe.encoders.features([dataclasses.replace(clip, video_CTHW=None)])
noise = noise_like([0], codec.latent_shape(*clip.video_CTHW.shape[1:]))
times = shifted_times(pipe.sampling.steps, pipe.sampling.shift)

states = [noise]
with torch.no_grad():
    velocity = sampler.guided_velocity(features, pipe.sampling)
    end = sample_euler(velocity, noise, times, on_step=lambda step, x: states.append(x))
    shown = [0, 2, 5, 10, 15, len(times) - 2]
    guesses = {f"t = {times[i]:.2f}": denoised(states[i], velocity(states[i], times[i]), times[i]) for i in shown}

assert torch.equal(codec.decode(end)[0], made)  # the loop that the pipeline runs
walked = {f"t = {times[i]:.2f}": codec.decode(states[i])[0] for i in shown}
guessed = {name: codec.decode(guess)[0] for name, guess in guesses.items()}
side_by_side(film(walked, frames=4, height=72), film(guessed, frames=4, height=72))

# %% [markdown]
# Left: where the walk is. Right: where it believes to be going.

# %% [markdown]
# ## Guidance
#
# Each step asks twice, with the condition and without, and goes further in the direction of the difference. At a
# scale of 1 there is no guidance; too much of it overdraws colours. The paper uses 2.5.

# %%
scales = (1.0, 2.5, 5.0, 10.0)
guided_videos = {
    f"guidance {scale:g}": made if scale == pipe.sampling.scale else video(clip, guidance=scale) for scale in scales
}
display(film(guided_videos))
for name, frames in guided_videos.items():
    saturation = float((frames.amax(0) - frames.amin(0)).mean() / 2)
    print(f"{name:14} identity {identity(frames, specs[0]):.2f}, mean saturation {saturation:.2f}")

# %% [markdown]
# ## Inside the three stages
#
# Beside the backbone, each of the first layers has a block of three attentions (`idc.models.hierarchy`; the paper's
# equations S.9 to S.11):
#
# 1. **within a subject**: the tokens of a reference look at each other;
# 2. **between subjects**: a subject looks at the others, through a gate;
# 3. **cross**: the video looks at all subjects, and at the words and pictures as the VLM reads them.
#
# `record_attention` collects what they do without changing it. Stages 1 and 2 know neither the time nor the video, so
# they run once; stage 3 runs at every step.

# %%
from idc.models.attention_maps import record_attention, subject_shares
from idc.models.conditioning import Drop

three = ToyWorld(subjects=(0, 0, 1), named=0).sample(HELD_OUT + 5)
names = [f"subject {number + 1}" for number in range(3)]
with record_attention(transformer) as maps:
    seen = video(three, guidance=1)  # one branch: the recorded calls are those of the condition alone
counts = {stage: sum(call.stage == stage for call in maps) for stage in ("intra", "inter", "cross")}
print(three.caption)
print("calls:", counts, f"for {len(transformer.id_blocks)} blocks, 3 subjects, {pipe.sampling.steps} steps")
film({"made": seen}, {"made": pictures(three)})

# %% [markdown]
# ### Stage 1: within a subject
#
# A reference of 32 x 32 pixels is four tokens, its quarters. Each row says where one quarter looks. An even 0.25
# would be no attention to anything in particular.

# %%
quarters = ["top left", "top right", "bottom left", "bottom right"]
short = ["tl", "tr", "bl", "br"]
block = len(transformer.id_blocks) - 1
intra = [call.weights_BALM[0].mean(0) for call in maps if call.stage == "intra" and call.block == block]
side_by_side(
    *(
        matrix(weights.tolist(), quarters if not number else short, short, names[number])
        for number, weights in enumerate(intra)
    )
)

# %% [markdown]
# ### Stage 2: between subjects
#
# Whom does a subject look at? With two others, half and half is indifference. What it sees is added through a gate in
# (0, 1), one for each channel: nearly shut at the start of training, at sigmoid(-2) = 0.12, and opened as far as it
# helps. Its mean for each block:

# %%
inter = [call.weights_BALM[0].mean((0, 1)) for call in maps if call.stage == "inter" and call.block == block]
looks = [[None] * 3 for _ in names]
for i, weights in enumerate(inter):
    for j, part in zip([j for j in range(3) if j != i], weights.chunk(2), strict=True):
        looks[i][j] = float(part.sum())

gates = []
hooks = [
    block.inter_gate.register_forward_hook(lambda module, inputs, out: gates.append(float(out.sigmoid().mean())))
    for block in transformer.id_blocks
]
features = pipe.encoders.features([dataclasses.replace(three, video_CTHW=None)])
condition = pipe.encoders.condition(features, Drop.NOTHING).to(torch.float32)
with torch.no_grad():
    sampler.velocity_function(condition)  # runs the subject side, once
for hook in hooks:
    hook.remove()

side_by_side(
    matrix(looks, names, names, "looks at"),
    matrix([gates], ["gate"], [f"block {number + 1}" for number in range(len(gates))], "how far the gate is open"),
)

# %% [markdown]
# ### Stage 3: which pixels look at which subject
#
# The share of each video token's attention that goes to each subject, averaged over heads and blocks, in the second
# half of the steps. Each map has its own scale, from its darkest to its lightest place. A token is a patch of 16 x 16
# pixels over one latent frame, which is why the maps are coarse.

# %%
cross = [call for call in maps if call.stage == "cross"]
late = cross[len(cross) // 2 :]
lengths = [reference.shape[-2] * reference.shape[-1] // 4 for reference in condition.references]
shares = torch.stack([subject_shares(call.weights_BALM, lengths)[0] for call in late]).mean(0)
grid = (end.shape[2], end.shape[3] // 2, end.shape[4] // 2)

rows, behind = {"the video": seen}, {}
for name, share, picture in zip(names, shares.T.unflatten(1, grid), pictures(three), strict=False):
    label = f"{name}: {float(share.min()):.1%} to {float(share.max()):.1%} of a token's attention"
    rows[label], behind[label] = heat(seen, share, float(share.min())), [picture]
film(rows, behind)

# %% [markdown]
# When in the walk does the video look at its subjects? What is missing to 100% goes to the VLM's tokens, which are
# several times as many, and know the references, too.

# %%
blocks = len(transformer.id_blocks)
by_step = [cross[start : start + blocks] for start in range(0, len(cross), blocks)]
per_step = [
    100 * torch.stack([subject_shares(call.weights_BALM, lengths)[0].mean(0) for call in step]).mean(0)
    for step in by_step
]
curves = {name: [float(step[number]) for step in per_step] for number, name in enumerate(names)}
highest = max(max(curve) for curve in curves.values())
plot(curves, "stage 3: per cent of the attention that goes to each subject", "step, from noise to data", high=highest)

# %% [markdown]
# ## One stage less
#
# What does a stage change in the video? Each is switched off while sampling. The model was trained with all three, so
# this says what it has come to rely on; what a model can do *without* a stage is another question, which table S.5
# answers by training again (`recipes/ablations/no_intra_subject.yaml` and its neighbours).


# %%
@contextmanager
def without(stage):
    for block in transformer.id_blocks:
        setattr(block, stage, False)
    try:
        yield
    finally:
        for block in transformer.id_blocks:
            setattr(block, stage, True)


whole = {"all stages": video(three)}
for stage, name in {"intra_subject": "1", "inter_subject": "2", "cross_modal": "3"}.items():
    with without(stage):
        whole[f"without stage {name}"] = video(three)
display(film(whole, {"all stages": pictures(three)}))
for name, frames in whole.items():
    moved = float((frames - whole["all stages"]).abs().mean() / 2)
    print(f"{name:16} identity {identity(frames, spec_of(three)):.2f}, mean change of a pixel {moved:.1%} of the range")

# %% [markdown]
# Without stage 3 nothing of the references reaches the video: it is what the text alone gives.

# %% [markdown]
# ## An edit: replace a subject
#
# Editing needs no training. A clip enters the walk part of the way, with as much noise as `strength` says, and only
# what lies under a mask may change; outside, it stays the clip's own. Here one subject of a real clip makes way for
# another. (In a terminal: `idc edit --config recipes/edit.yaml`.)

# %%
source, newcomer = clips[1], clips[0].subjects[1]
spec = spec_of(source)
rows_HW, columns_HW = np.mgrid[: spec.height, : spec.width]
centres = spec.centres()[0]  # of the first subject, in pixels, frame by frame
distance = [np.hypot(columns_HW + 0.5 - x, rows_HW + 0.5 - y) for x, y in centres]
mask = torch.from_numpy(np.stack(distance) < 1.5 * spec.radius_px(0))

references = [newcomer.image_CHW, source.subjects[1].image_CHW]
edited = video(source, references, source=source.video_CTHW, mask=mask, strength=0.95)
film(
    {
        "the source": source.video_CTHW,
        "the mask, light where it may change": heat(source.video_CTHW, mask.float()),
        "edited": edited,
    },
    {"the source": pictures(source), "edited": references},
)

# %% [markdown]
# Outside the mask nothing has changed but for the one trip through the codec that every video takes:

# %%
through_codec = codec.decode(codec.encode(source.video_CTHW[None]))[0]
kept = ~mask.expand_as(edited)
assert torch.equal(edited[kept], through_codec[kept])
print(f"changed outside the mask: {int((edited[kept] != through_codec[kept]).sum())} of {int(kept.sum())} values")
print(f"the source after the codec has a total score of {score_video(through_codec, spec).total:.2f}")

# %% [markdown]
# Next: `read_an_evaluation` judges many videos and says how sure one may be of the result.
