"""What every page of the kit is made of: a folder that works from a file:// address with no network.

Texts reach a page escaped, or as JSON whose strings its script only ever sets as text. A page's style and script are
the base that all pages share, and its own behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

BASE = resources.files("idc") / "templates"
PLAYED = ("yuv420p", "yuvj420p")  # pixel formats of H.264 that every browser plays
SMALL = 256  # shorter sides below this are enlarged by whole factors before 4:2:0 halves the colours


def script_json(data: Any) -> str:
    """JSON that is harmless inside a script: no "<", no line separators, nothing but ASCII."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def file_name(text: str) -> str:
    """A file's name that no file system and no address misreads; texts that differ get names that differ."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", text)[:80].strip(" ")
    if safe == text and safe.strip("."):
        return safe
    return f"{safe.strip('.')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def write_base(out: Path, templates: Any) -> None:
    """Write into a page's folder what the base and the folder `templates` give: `page.css`, `page.js`, `theme.js`."""
    for suffix in ("css", "js"):
        base = (BASE / f"base.{suffix}").read_text(encoding="utf-8")
        own = (templates / f"page.{suffix}").read_text(encoding="utf-8")
        (out / f"page.{suffix}").write_text(f"{base}\n{own}", encoding="utf-8")
    (out / "theme.js").write_text((BASE / "theme.js").read_text(encoding="utf-8"), encoding="utf-8")


def save_jpeg(picture: Any, target: Path, side: int) -> None:
    """Save a Pillow picture, no longer than `side` pixels, whole or not at all; what is transparent becomes white."""
    from PIL import Image

    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("RGB")
    picture.thumbnail((side, side))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    picture.save(part, format="JPEG", quality=85)
    os.replace(part, target)


def plays_everywhere(clip: bytes) -> bool:
    """Whether browsers play a clip as it is: H.264 with halved chroma. What cannot be opened does not."""
    import io

    import av

    try:
        with av.open(io.BytesIO(clip)) as container:
            stream = container.streams.video[0].codec_context
            return stream.name in ("h264", "libx264") and stream.pix_fmt in PLAYED
    except (av.FFmpegError, IndexError, ValueError):
        return False


def playable(clip: bytes, fps: float) -> bytes:
    """The clip as it is where every browser plays it, else encoded anew.

    Tiny clips are enlarged by a whole factor first, since 4:2:0 smears their colours.

    Raises:
        VideoError: if it cannot be decoded.
    """
    from idc.data.video import decode_video, encode_video

    if plays_everywhere(clip):
        return clip
    video_THWC = decode_video(clip)
    factor = -(-SMALL // min(video_THWC.shape[1:3]))
    video_THWC = video_THWC.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = (side // 2 * 2 for side in video_THWC.shape[1:3])
    return encode_video(video_THWC[:, :height, :width], fps, crf=14)
