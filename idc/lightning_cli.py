"""Lightning's command line as the kit uses it: merged overlays, runs that resume, errors that say one thing."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from idc.data.module import VideoDataModule
from idc.errors import UserError, nearest
from idc.stages.base import Stage


class CLI(LightningCLI):
    """`--ckpt_path last` continues the newest run of the recipe; `auto` does so if there is one."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # The text's width reaches the transformer through the stage, so nothing has to be linked here.
        parser.set_defaults({"trainer.enable_model_summary": False})

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let a checkpoint's old settings override the recipe and the command line."""

    def before_instantiate_classes(self) -> None:
        from idc.callbacks.resume import newest_version

        config = self.config[self.subcommand] if self.subcommand else self.config
        wanted = config.get("ckpt_path")
        logger = config.trainer.logger
        if wanted not in ("last", "auto") or not hasattr(logger, "init_args"):
            return
        root = Path(logger.init_args.save_dir) / str(logger.init_args.get("name") or "")
        version = newest_version(root)
        if version is not None:
            logger.init_args.version = version
        elif wanted == "last":
            raise UserError(
                f"--ckpt_path last: no finished checkpoint under {root}; "
                "leave --ckpt_path out for a new run, or use --ckpt_path auto"
            )

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        from idc.callbacks.resume import resolve_ckpt_path

        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        wanted = kwargs.get("ckpt_path")
        if wanted is not None:
            kwargs["ckpt_path"] = resolve_ckpt_path(wanted, self.trainer)
        return kwargs


def run(command: str, args: Sequence[str]) -> int:
    """Run one of Lightning's subcommands. Returns the exit status."""
    # Absolute interpolations (${model.x}) fail under subcommands unless they are made relative first.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    CLI(
        Stage,
        VideoDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"parser_mode": "omegaconf+"},
        args=[command, *args],
    )
    return 0
