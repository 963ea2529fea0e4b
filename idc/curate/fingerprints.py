"""Perceptual hashes of pictures, and all pairs of near ones without comparing everything with everything.

A hash has 64 bits: the signs of the 8 x 8 lowest cosine frequencies of the grey picture at 32 x 32 pixels, without the
mean (whose bit is 0). Another size, codec or brightness changes few bits; unlike pictures differ in about half of them.
In a mirrored picture exactly the odd horizontal frequencies change their sign, so its hash needs no picture.
Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010 (the DCT hash; signs in the place of
the median).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from idc.curate.candidate import Pixels

Hashes = NDArray[np.uint64]
SIDE, LOW = 32, 8  # pixels of the small picture, frequencies of its hash along each side
FLAT = 3.0  # grey levels; below this deviation a picture is flat, and its signs are noise
BLOCK = 1 << 20  # comparisons at once
MIRROR = np.uint64(sum(1 << (LOW * row + column) for row in range(LOW) for column in range(1, LOW, 2)))


def perceptual_hash(picture_HWC: Pixels) -> int | None:
    """The hash of an RGB uint8 picture `[H, W, 3]`, in [0, 2^64), or None for a flat one."""
    import cv2
    from scipy.fft import dctn

    grey = cv2.cvtColor(np.ascontiguousarray(picture_HWC), cv2.COLOR_RGB2GRAY).astype(np.float32)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float64)
    if small.std() < FLAT:
        return None
    signs = dctn(small, norm="ortho")[:LOW, :LOW] > 0
    signs[0, 0] = False
    return int(np.packbits(signs.ravel(), bitorder="little").view("<u8")[0])


def mirrored(hashes: Hashes) -> Hashes:
    """The hashes of the mirrored pictures (left for right)."""
    return hashes ^ MIRROR


def to_text(hash: int) -> str:
    """16 hexadecimal digits."""
    return f"{hash:016x}"


def from_text(texts: Sequence[str]) -> Hashes:
    """The hashes of `to_text`, uint64 `[N]`. Raises ValueError for anything else."""
    return np.array([int(text, 16) for text in texts], np.uint64)


def distance(a: Hashes, b: Hashes) -> NDArray[np.int64]:
    """Bits in which the hashes differ, added over the last axis; shapes broadcast as in NumPy."""
    return _ones(a ^ b).sum(-1)


def _ones(values: Hashes) -> NDArray[np.int64]:
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(values).astype(np.int64)
    return _ONES[values.astype("<u8").view(np.uint8)].reshape(*values.shape, 8).sum(-1)


_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.int64)


def near_pairs(
    hashes_NF: Hashes, others_MF: Hashes, most: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All (row of `hashes_NF`, row of `others_MF`) that differ in at most `most` bits in all, each once.

    Two rows that differ in at most k bits are equal in one of k + 1 bands of their bits (the pigeonhole), so only rows
    that are equal in a band are compared: none is missed, and a million rows take sorting, not a million squared. Bands
    are of far-off frequencies of a single hash each, since those of successive frames are alike.

    Args:
        hashes_NF, others_MF: uint64 `[N, F]` and `[M, F]`; the rows' hashes are compared one by one.
        most: bits; at most 8 F - 1, above which a band would be too narrow to tell rows apart.

    Yields:
        blocks of pairs, in no order that means anything, but always the same.
    """
    frames = hashes_NF.shape[1]
    bands = _bands(frames, most)
    before: list[tuple[int, np.uint64]] = []
    for frame, mask in bands:
        for rows, columns in _equal_in(hashes_NF[:, frame] & mask, others_MF[:, frame] & mask):
            near = distance(hashes_NF[rows], others_MF[columns]) <= most
            for seen_frame, seen_mask in before:  # a pair counts in the first band that it is equal in
                near &= (hashes_NF[rows, seen_frame] ^ others_MF[columns, seen_frame]) & seen_mask != 0
            if near.any():
                yield rows[near], columns[near]
        before.append((frame, mask))


def _bands(frames: int, most: int) -> list[tuple[int, np.uint64]]:
    """(number of the hash, mask of its bits) of at least `most` + 1 bands that share no bit."""
    each = -(-(most + 1) // frames)
    masks = [np.uint64(sum(1 << bit for bit in range(first, 64, each))) for first in range(each)]
    return [(frame, mask) for frame in range(frames) for mask in masks]


def _equal_in(left: Hashes, right: Hashes) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Blocks of all (place in `left`, place in `right`) of equal values."""
    order = np.argsort(right, kind="stable")
    values = right[order]
    first, end = np.searchsorted(values, left, "left"), np.searchsorted(values, left, "right")
    rows = np.flatnonzero(end > first)
    counts = (end - first)[rows]
    totals = np.cumsum(counts)
    start = 0
    while start < len(rows):
        done = totals[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(totals, done + BLOCK, "right")))
        some = slice(start, stop)
        repeated = np.repeat(rows[some], counts[some])
        within = np.arange(len(repeated)) - np.repeat(totals[some] - counts[some] - done, counts[some])
        yield repeated, order[np.repeat(first[rows[some]], counts[some]) + within]
        start = stop
