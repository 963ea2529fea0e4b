"""Checks of the transformer's `id_*` settings, with messages for the person who wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from idc.errors import UserError, nearest

PAPER_LAYERS = 20


def check_settings(
    num_layers: int,
    patch_size: Sequence[int],
    id_layers: int,
    cross_modal: bool,
    joint_references: bool,
    max_subjects: int,
) -> None:
    """Raise `UserError` where the settings contradict each other or the backbone."""
    if not 0 <= id_layers <= num_layers:
        raise UserError(
            f"id_layers={id_layers}: must be from 0 to num_layers={num_layers}; the nearest valid choice is "
            f"{min(max(id_layers, 0), num_layers)}"
        )
    if not (cross_modal or joint_references or id_layers == 0):
        raise UserError(
            "id_cross_modal=False: no path is left from the subjects to the video; set id_joint_references=True with it"
        )
    if max_subjects < 1:
        raise UserError(f"id_max_subjects={max_subjects}: must be 1 or more; the paper's videos have up to 3 subjects")
    if patch_size[0] != 1:
        raise UserError(
            f"patch_size={tuple(patch_size)}: a reference is one frame, so the temporal patch must be 1; "
            f"the nearest valid choice is {(1, *patch_size[1:])}"
        )


def complete_settings(settings: Mapping[str, Any], known: Sequence[str], num_layers: int) -> dict[str, Any]:
    """The settings with `id_layers` filled in: the paper's 20, or all layers of a shallower backbone.

    Raises:
        UserError: for a name that is not in `known`.
    """
    for name in settings:
        if name not in known:
            raise UserError(f"{name!r} is not a setting of the id blocks{nearest(name, known)}")
    return {"id_layers": min(PAPER_LAYERS, num_layers), **settings}


def check_references(config: Mapping[str, Any], count: int) -> None:
    """Raise `UserError` where a model of this config cannot take so many references."""
    limit = config["id_max_subjects"]
    if not (config["id_layers"] or config["id_joint_references"]):
        raise UserError(
            f"{count} references, but no path leads from them to the video: set id_layers to 1 or more, or "
            "id_joint_references=True, or drop the references"
        )
    if count > limit:
        raise UserError(f"{count} subjects: the model was built with id_max_subjects={limit}, the most it can take")


def reads_vlm(config: Mapping[str, Any], width: int) -> bool:
    """Whether a model of this config reads VLM tokens. Raises `UserError` where they are not of its width."""
    if not (config["id_use_vlm"] and config["id_cross_modal"] and config["id_layers"]):
        return False
    if config["vlm_dim"] != width:
        raise UserError(
            f"VLM tokens of width {width}: the model was built with vlm_dim={config['vlm_dim']}; "
            f"set vlm_dim={width}, or id_use_vlm=False to leave the VLM out"
        )
    return True
