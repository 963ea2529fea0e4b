"""Weights from the model hub where there is no network: what the cache lacks is told at once.

The hub's client tries each file five times over, with waits of up to 8 s between, before it says that it has none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)+")
PATIENCE_S = 5.0  # for an answer of any kind
log = logging.getLogger(__name__)


@cache
def reachable(endpoint: str) -> bool:
    """Whether the hub at `endpoint` answers, be it with an error: asked once a process, through its own client, which
    knows of proxies and certificates, and without its retries."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=PATIENCE_S)
    except Exception as error:  # the client's library and its errors change from version to version
        log.debug("%s does not answer: %s", endpoint, error)
        return False
    return True


def names_hub(settings: Any) -> bool:
    """Whether plain JSON holds a string that reads like a hub's `owner/name` and is no path on this machine."""
    if isinstance(settings, str):
        return _HUB_NAME.fullmatch(settings) is not None and not Path(settings).exists()
    if isinstance(settings, Mapping):
        return any(names_hub(value) for value in settings.values())
    return isinstance(settings, list) and any(map(names_hub, settings))


@contextmanager
def offline_without_a_network(settings: Any) -> Iterator[bool]:
    """For loading what has these settings; where they name nothing of the hub, nothing is asked of it.

    Yields whether they name something of a hub that is out of reach.

    Within, the hub's client is in offline mode (as by HF_HUB_OFFLINE=1) where the hub does not answer: what lies in
    its cache is loaded from there, what does not fails at once. Where the hub answers, downloads go on as ever.
    """
    if not names_hub(settings):
        yield False
        return
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable(constants.ENDPOINT)
    try:
        yield constants.HF_HUB_OFFLINE
    finally:
        constants.HF_HUB_OFFLINE = before
