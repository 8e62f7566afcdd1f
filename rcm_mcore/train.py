"""Train a network: `torchrun --nproc-per-node N -m rcm_mcore.train CONFIG.yaml [section.field=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

from rcm_mcore.config import load_config, to_yaml


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for what the user can put right (one line says what)."""
    parser = argparse.ArgumentParser(
        prog="python -m rcm_mcore.train",
        description="Pretrain a teacher by flow matching or distil a student by rCM. A run that was interrupted continues "
        "from the newest checkpoint in checkpoint.dir.",
        epilog="example: torchrun --nproc-per-node 8 -m rcm_mcore.train examples/wan_1_3b/config.yaml mesh.tp=2 mesh.sp=true",
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="fields that replace those of the file")
    parser.add_argument(
        "--dry-run", action="store_true", help="check configuration, mesh, data, teacher and disk, print the run, and stop"
    )
    parser.add_argument("--world-size", type=int, help="with --dry-run: ranks to check the mesh for")
    args = parser.parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(asctime)s %(levelname)s %(message)s")
    # megatron-core and torch warn of their own internals (fallbacks without apex, renamed collectives) at every start.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch|megatron|rcm_mcore\.parallel\.cpu")
    try:
        config = load_config(args.config, args.overrides)
        # Heavy imports only once the configuration is known to be sound.
        from rcm_mcore.training.setup import check, world_size

        facts = check(config, args.world_size or world_size())
        if rank == 0:
            print(to_yaml(config), end="", flush=True)
            print("".join(f"# {name}: {value}\n" for name, value in facts.items()), end="", flush=True)
        if args.dry_run:
            return 0
        from rcm_mcore.training.loop import train

        train(config)
    except ValueError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        _leave_process_group()
    return 0


def _leave_process_group() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
