"""What is on another machine may be out of reach for a while, which is another thing than not being there.

Whoever opens what need not be on this machine does so within `reaching`, and whoever asks a server raises
`UnreachedError` for no answer. In whatever step or source it comes up, the engine counts it as a fault: the candidate
or unit is dropped as `UNREACHED`, many of them stop the run, and --retry_failed does them again. What is not there, or
is none of what is wanted, is a drop with a reason of its own, and stays one.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from idc.data import storage

UNREACHED = "could not be reached"  # a drop's reason that another time may mend
# What a local disk, also one that lies on a network, says of a name and will say again.
LASTING = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO),
    *(errno.EACCES, errno.EPERM),
}


class UnreachedError(Exception):
    """A store, a disk on a network or a server does not answer, or not in full. The message is a short reason."""


@contextmanager
def reaching(path: str, shown: str = "") -> Iterator[None]:
    """Reads what is at a path or URL, and nothing else.

    Args:
        shown: begins the message.

    Raises:
        UnreachedError: for what another time may not meet: of a URL any error but that nothing, or a folder, is there;
            of a local path those of the disk but not those of the name and of rights. All other errors pass.
    """
    try:
        yield
    except Exception as error:  # every file system behind fsspec has its own; what is not passing goes on as it is
        if is_passing(path, error):
            text = " ".join(str(error).split())
            raise UnreachedError(f"{shown}{type(error).__name__}: {text[:200]}".rstrip(": ")) from error
        raise


def is_passing(path: str, error: BaseException) -> bool:
    """Whether an error in reading what is at a path or URL may not come again."""
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | ValueError | UnreachedError):
        return False  # ValueError: of a name that nothing can have
    if isinstance(error, OSError) and not storage.is_url(path):
        return error.errno not in (None, *LASTING)
    return storage.is_url(path)  # every file system behind fsspec has its own errors
