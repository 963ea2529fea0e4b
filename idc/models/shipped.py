"""Models that come with the package, by name: `checkpoint: toy`, `IDCrafterPipeline.from_pretrained("toy")`."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
_MODELS = ("model_index.json", "manifest.json", "checkpoints", "step-*", "version_*/checkpoints")


def shipped_names() -> list[str]:
    """The names, sorted."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/model_index.json"))


def resolve_shipped(value: str | Path) -> Path:
    """The folder of a shipped model, or `value` itself: a file, pipeline, run or checkpoint of the user's own wins, and
    an unrelated folder that happens to have the name does not. `./toy` is never a name."""
    path = Path(value)
    if str(value) not in shipped_names() or path.is_file() or any(any(path.glob(mark)) for mark in _MODELS):
        return path
    return WEIGHTS / str(value)
