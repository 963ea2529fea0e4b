"""Models that come with the package, by name: `checkpoint: toy`, `IDCrafterPipeline.from_pretrained("toy")`."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


def shipped_names() -> list[str]:
    """The names, sorted."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/model_index.json"))


def resolve_shipped(value: str | Path) -> Path:
    """The folder of a shipped model, or `value` itself: a path of the user's own that exists wins."""
    path = Path(value)
    if not path.exists() and str(value) in shipped_names():
        return WEIGHTS / str(value)
    return path
