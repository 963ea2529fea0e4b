"""Lightning's command line as the kit uses it: merged overlays, runs that resume, errors that say one thing."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from omegaconf.errors import OmegaConfBaseException

from idc.data.module import VideoDataModule
from idc.errors import UserError
from idc.explain import explain, finish
from idc.recipes import merged, no_recipe
from idc.stage_help import stage_settings
from idc.stages.base import Stage, check_precision


class Parser(LightningArgumentParser):
    """A parser that raises one message in place of printing its usage and a nest of union types."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # --seed would set seed_everything, where generation means data.init_args.seed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        hints = self._hints()
        raise UserError(explain(message, hints, hints)) from None

    def _hints(self) -> dict[str, Any]:
        """Types of the settings that this parser and its subcommands know, by name."""
        actions = list(self._actions)
        for action in self._actions:
            if isinstance(action.choices, dict):  # the subcommands, by name
                for parser in action.choices.values():
                    actions += parser._actions
        hidden = ("help", "print_shtab", "print_config")
        return {action.dest: getattr(action, "_typehint", None) for action in actions if action.dest not in hidden}


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml as early as Lightning does; of a run that resumes, once its checkpoint was taken.

    Generation and export read the model from that file: a resume that is refused must leave it as it was.
    """

    resumes = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.resumes = trainer.strategy.broadcast(self.resumes)  # what follows is for all ranks together
        if not self.resumes:
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.resumes:
            super().setup(trainer, pl_module, "fit")


class CLI(LightningCLI):
    """`--ckpt_path last` continues the newest run of the recipe; `auto` does so if there is one."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # The text's width reaches the transformer through the stage, so nothing has to be linked here.
        parser.set_defaults({"trainer.enable_model_summary": False})

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            if isinstance(error, UserError) or "Does not validate" not in str(error):
                raise
            raise UserError(explain(str(error))) from None
        except RuntimeError as error:
            if (twice := _TWICE.search(str(error))) is None:
                raise
            raise UserError(
                f"trainer.callbacks: {twice[1]} is there twice, and its state is saved under one name; "
                "--trainer.callbacks+ adds to the recipe's; to change one of those, write the whole list into a file"
            ) from None

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let a checkpoint's old settings override the recipe and the command line."""

    def before_instantiate_classes(self) -> None:
        """`last` and `auto`: go on in the newest run's own folder, so that its curves go on too."""
        if self.subcommand is None:  # used as a library, with run=False
            return
        config = self.config[self.subcommand]
        if self.subcommand in ("fit", "validate"):
            check_precision(config.trainer.precision)  # as it was given: Lightning may take another, with a warning
        wanted, logger = config.get("ckpt_path"), config.trainer.logger
        if logger is False:
            _leave_out_rates(config.trainer)
        if not hasattr(logger, "init_args"):
            self.save_config_callback = None  # there is no run's folder for it
            if wanted in ("last", "auto"):
                raise UserError(f"--ckpt_path {wanted}: without trainer.logger no run has a folder; name a checkpoint")
            return
        if self.subcommand != "fit" and "sub_dir" in logger.init_args:
            # Not among the training run's own curves: Lightning does not know the checkpoint's step here.
            logger.init_args.sub_dir = self.subcommand
        if wanted not in ("last", "auto"):
            return
        root = Path(logger.init_args.save_dir) / str(logger.init_args.get("name") or "")
        newest = newest_run(root)
        if newest is not None:
            logger.init_args.version = newest.name
        elif wanted == "last" or self.subcommand != "fit":
            raise UserError(
                f"--ckpt_path {wanted}: no finished checkpoint under {root}; "
                "leave --ckpt_path out for a new run, or write --ckpt_path auto"
            )

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        from idc.callbacks.resume import prepare_resume

        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("weights_only") is None:
            kwargs["weights_only"] = True  # nothing that came from elsewhere is unpickled
        wanted = kwargs.get("ckpt_path")
        if wanted is not None:
            wanted = "last" if wanted == "auto" else wanted
            run_dir = Path(self.trainer.log_dir or self.trainer.default_root_dir)
            run_dir = run_dir.parent if run_dir.name == subcommand else run_dir
            kwargs["ckpt_path"] = prepare_resume(wanted, run_dir, self.trainer)
        elif subcommand != "fit" and isinstance(self.model, Stage) and not self.model.has_weights:
            raise UserError(
                f"idc {subcommand} needs weights: --ckpt_path last, a checkpoint, or transformer.pretrained"
            )
        if subcommand == "fit":
            _warn_of_shared_store()
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's Trainer has them
                if isinstance(callback, SaveConfig):
                    callback.resumes = kwargs.get("ckpt_path") is not None
            if isinstance(self.model, Stage):
                self.model.check_run(self.trainer, self.datamodule)
        return kwargs


def _warn_of_shared_store() -> None:
    """Where torchrun would start ranks again beside the addresses of those before, which torch keeps in its store."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank_zero_warn(
            "torchrun --max-restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, or ranks that it "
            "starts again may look for those that died"
        )


# Lightning's words for two callbacks of a class whose state has one name.
_TWICE = re.compile(r"more than one stateful callback of type `(\w+)`")


def _leave_out_rates(trainer: Any) -> None:
    """Take out the callback that fails without a logger, at its first step."""
    rates = [c for c in trainer.callbacks or [] if str(c.class_path).endswith(".LearningRateMonitor")]
    trainer.callbacks = [c for c in trainer.callbacks or [] if c not in rates]
    if not rates:
        return
    folder = trainer.get("default_root_dir") or Path.cwd()
    rank_zero_info(f"trainer.logger=false: no curves are written; checkpoints and samples go to {folder}")


def _quiet() -> None:
    """Leave out messages that are no news to a user of the recipes."""
    for message in (
        "does not have many workers",
        "LeafSpec",
        "args parameter is intended to run from within Python",
        "exists and is not empty",
        "Since DeepSpeed handles gradient clipping",  # as ours, see `ZeROPrecision`
        "_tensor. is deprecated",  # collectives under DeepSpeed
        "returned a view tensor",  # FSDP2: nobody writes into the velocity
        "predict returned None",  # videos go to files as they are made
        "smaller than the logging interval",  # of an epoch; these runs count steps
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero.addFilter(lambda record: "litlogger" not in str(record.msg))


def newest_run(root: Path) -> Path | None:
    """The newest `version_*` folder under `root` that holds a checkpoint, by number; None where there is none."""
    numbered = [path for path in root.glob("version_*") if path.name.removeprefix("version_").isdecimal()]
    runs = [path for path in numbered if any(path.glob("checkpoints/step-*/manifest.json"))]
    return max(runs, key=lambda path: int(path.name.removeprefix("version_")), default=None)


def _finish(explained: str, command: str, args: Sequence[str], typed: str) -> str:
    if "arguments are required" in explained:
        return str(no_recipe(typed))
    tree = merged(args)
    return finish(explained, command, tree, [setting.name for setting in stage_settings(tree)])


def run(command: str, args: Sequence[str], typed: str | None = None) -> int:
    """Run one of Lightning's subcommands, which the user may have `typed` as another word for it.

    Returns the exit status: the stage's own, where it has one.
    """
    return getattr(command_line(CLI, command, args, typed).model, "exit_status", 0)


def command_line(cls: type[CLI], command: str, args: Sequence[str], typed: str | None = None) -> CLI:
    """Lightning's command line of this class, when it has done what the class does. Arguments as in `run`.

    Raises:
        UserError: for what a user can mend.
    """
    # Absolute interpolations (${model.x}) fail under subcommands unless they are made relative first.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    _quiet()
    try:
        trains = command in ("fit", "validate")
        return cls(
            # Evaluation has no transformer and no data module of its own.
            Stage if trains else LightningModule,
            VideoDataModule if trains else None,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "idc"},
            args=[command, *args],
        )
    except UserError as error:
        raise UserError(_finish(str(error), command, args, typed or command)) from error
    except MisconfigurationException as error:  # Lightning's word for a setting that cannot work
        hint = "; recipes/hardware/cpu2.yaml runs without one" if "gpu backend" in str(error) else ""
        raise UserError(" ".join(str(error).split()) + hint) from error
    except OmegaConfBaseException as error:
        raise UserError(f"interpolation: {str(error).splitlines()[0]}") from error
