"""A process that asks a hosted image model, for the tests that kill it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from idc.curate.candidate import encode_png
from idc.curate.synthetic.editors import EditError
from idc.curate.synthetic.hosted import HostedEditor
from idc.errors import UserError

SIZE = (64, 64)


def given(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def ask_all(url: str, store: str, out: str, count: int, settings: dict[str, Any]) -> None:
    """Ask for `count` pictures one after another; each lies in `out` once it is there, and why it stopped."""
    editor = HostedEditor(url, "a-model", store, pause=0.0, api_key_env="TEST_KEY", **settings)
    for seed in range(count):
        try:
            picture = editor.edit([given(seed)], f"picture {seed}", seed, SIZE)
        except EditError as error:
            Path(out, f"{seed}.txt").write_text(str(error))
        except UserError as error:
            Path(out, "stopped.txt").write_text(str(error))
            return
        else:
            Path(out, f"{seed}.png").write_bytes(encode_png(picture))
