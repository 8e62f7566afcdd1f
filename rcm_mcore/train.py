"""Train a network: `torchrun --nproc-per-node N -m rcm_mcore.train CONFIG.yaml [section.field=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

from rcm_mcore.config import Config, load_config, to_yaml
from rcm_mcore.training.signals import EXIT_STOPPED, DeadlineError, StopRequest, listening


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 2 for what the user can put right, 1 for a run that could not go on.

    One line on stderr says what was wrong. A run that SIGUSR1 or SIGTERM asked to stop finishes its step, saves, and exits with
    75; under torchrun with 0, since torchrun would start a process again that exits with anything else, and hides the number.
    A rank in which nothing has moved for twice guard.stall_minutes is ended with 76 (training/watchdog.py): started again, the
    run goes on from its newest checkpoint.
    """
    try:
        with listening() as stop:
            return _main(argv, stop)
    except DeadlineError as error:
        _report(error)
        return 2


def _main(argv: list[str] | None, stop: StopRequest) -> int:
    # Options may stand anywhere among the overrides.
    args = build_parser().parse_intermixed_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        format=f"%(asctime)s %(levelname)s {f'rank {rank}: ' if rank else ''}%(message)s",
    )
    # megatron-core and torch warn of their own internals (fallbacks without apex, renamed collectives) at every start.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch|megatron|rcm_mcore\.parallel\.cpu")
    try:
        config = load_config(args.config, args.overrides)
        # Heavy imports only once the configuration is known to be sound.
        from rcm_mcore.training.setup import check, world_size

        if args.world_size is not None and not (args.dry_run and args.world_size > 0):
            raise ValueError(f"--world-size {args.world_size}: must be at least 1, and goes with --dry-run")
        facts = check(config, args.world_size or world_size())
    except ValueError as error:  # the same on every rank
        if rank == 0:
            _report(error)
        return 2
    if rank == 0:
        print(to_yaml(config), end="", flush=True)
        print("".join(f"# {name}: {value}\n" for name, value in facts.items()), end="", flush=True)
    return 0 if args.dry_run else _train(config, rank, stop)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rcm_mcore.train",
        description="Pretrain a teacher by flow matching or distil a student by rCM. A run that was interrupted continues "
        "from the newest checkpoint in checkpoint.dir. SIGUSR1 and SIGTERM end it after the step at hand, with a checkpoint.",
        epilog="example: torchrun --nproc-per-node 8 -m rcm_mcore.train examples/wan_1_3b/config.yaml mesh.tp=2 mesh.sp=true",
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="fields that replace those of the file")
    parser.add_argument(
        "--dry-run", action="store_true", help="check configuration, mesh, data, teacher and disk, print the run, and stop"
    )
    parser.add_argument("--world-size", type=int, help="with --dry-run: ranks to check the mesh for")
    return parser


def _train(config: Config, rank: int, stop: StopRequest) -> int:
    import torch.distributed as dist

    from rcm_mcore.checkpoint import CheckpointError
    from rcm_mcore.data import DataStalled, ReaderDied
    from rcm_mcore.training.loop import train
    from rcm_mcore.training.step import NonFiniteError

    # Each rank reads its own samples: what there is to say of them no other rank says.
    logging.getLogger("rcm_mcore.data").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    try:
        run = train(config, stop)
    except (NonFiniteError, CheckpointError) as error:  # raised on every rank
        if rank == 0:
            _report(error)
        return 1
    except (ValueError, DataStalled, ReaderDied) as error:  # of one rank alone, perhaps
        _report(error, where=f"rank {rank}: " if rank else "")
        return 2 if isinstance(error, ValueError) else 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return 0 if run.state.step == config.train.steps or under_torchrun else EXIT_STOPPED


def _report(error: Exception, where: str = "") -> None:
    print(f"error: {where}{' '.join(str(error).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
