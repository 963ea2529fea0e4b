"""Classifier-free guidance as a wrapper of velocity functions: the result is a velocity function again."""

from __future__ import annotations

from torch import Tensor

from idc.flow.path import Velocity


def guided(cond: Velocity, uncond: Velocity, scale: float, rescale: float = 0.0) -> Velocity:
    """v = v_uncond + scale (v_cond - v_uncond) (arXiv 2207.12598); the paper's scale is 2.5.

    A scale of 1 is `cond` itself: one evaluation in place of two.

    Args:
        rescale: in [0, 1], how far the result's standard deviation per sample is drawn back to v_cond's
            (arXiv 2305.08891, section 3.4); 0 is plain guidance.
    """
    if scale == 1:
        return cond

    return lambda x, t: guide(cond(x, t), uncond(x, t), scale, rescale)


def guide(v_cond: Tensor, v_uncond: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """The arithmetic of `guided`, on velocities `[B, ...]`."""
    v = v_uncond + scale * (v_cond - v_uncond)
    return _rescale(v, v_cond, rescale) if rescale else v


def guided_text_image(
    both: Velocity,
    references: Velocity,
    uncond: Velocity,
    text_scale: float,
    image_scale: float,
    rescale: float = 0.0,
) -> Velocity:
    """v = v_uncond + image_scale (v_references - v_uncond) + text_scale (v_both - v_references), as in Phantom.

    Args:
        both, references, uncond: conditioned on text and references, on the references alone, and on neither.

    Three evaluations a step; two where the scales are equal (v_references cancels) or image_scale is 1 (v_uncond
    cancels), one where both are 1.
    """
    if text_scale == image_scale:
        return guided(both, uncond, text_scale, rescale)
    if image_scale == 1:
        return guided(both, references, text_scale, rescale)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v_both, v_references, v_uncond = both(x, t), references(x, t), uncond(x, t)
        v = v_uncond + image_scale * (v_references - v_uncond) + text_scale * (v_both - v_references)
        return _rescale(v, v_both, rescale) if rescale else v

    return velocity


def _rescale(v: Tensor, v_cond: Tensor, amount: float) -> Tensor:
    dims = tuple(range(1, v.ndim))
    ratio = v_cond.std(dims, keepdim=True) / v.std(dims, keepdim=True)
    return amount * ratio * v + (1 - amount) * v
