"""Time what checkpoints cost a run: training stands still while the state is copied, and may be slower while it is written.

    torchrun --nproc-per-node 2 tools/benchmark_save.py examples/wan_1_3b/config.yaml model.num_layers=14 --out DIR

Trains the configuration's network by flow matching on random data, with random weights, and saves every few steps:
with checkpoint.asynchronous and without. The last checkpoint must hold the networks' state bit for bit, or the tool stops.
Steps count as beside a save if any of it was written while they ran. Times are those of rank 0; the first save of a run comes
after the host's memory was made ready, which `set-up` is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rcm_mcore.config import Config, load_config
from rcm_mcore.data import Sample, write_shards
from rcm_mcore.interop.dcp import read_pieces
from rcm_mcore.parallel.mesh import destroy_mesh, init_distributed
from rcm_mcore.training import loop, saver
from rcm_mcore.training.setup import Run, check
from rcm_mcore.training.state import pieces_to_save


def main(argv: list[str] | None = None) -> int:
    """The command line; 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="benchmark_save.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="fields that replace those of the file")
    parser.add_argument("--steps", type=int, default=20, help="of each run (20)")
    parser.add_argument("--every", type=int, default=5, help="steps between saves (5)")
    parser.add_argument("--work", type=Path, default=Path("/tmp/benchmark_save"), help="folder for shards and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    args = parser.parse_intermixed_args(argv)
    try:
        if not 1 <= args.every < args.steps:
            raise ValueError(f"--every {args.every}: must lie between 1 and --steps {args.steps}, which is not counted")
        config = load_config(args.config, [*args.overrides, f"data.shards=[{args.work}/shards/*.tar]", "data.readers=4"])
        config = prepare(config, args)
        rows = [row(config, asynchronous) for asynchronous in (True, False)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if dist.get_rank() == 0:
        report(rows, args)
    dist.destroy_process_group()
    return 0


def prepare(config: Config, args: argparse.Namespace) -> Config:
    """Shards of random samples, and the configuration of the runs. Collective."""
    init_distributed()
    config = replace(
        config,
        train=replace(config.train, objective="pretrain", steps=args.steps),
        checkpoint=replace(config.checkpoint, dir=str(args.work / "run"), every=args.every, keep_last=1),
        log=replace(config.log, wandb=False),
    )
    if dist.get_rank() == 0:
        shutil.rmtree(args.work, ignore_errors=True)
        g = torch.Generator().manual_seed(0)
        model = config.model
        draw = lambda *shape: torch.randn(shape, generator=g).to(torch.bfloat16)
        one = Sample(latent=draw(*config.data.latent_shape), embed=draw(min(64, model.text_len), model.text_dim), prompt="-")
        write_shards((one for _ in range(8)), args.work / "shards", samples_per_shard=1)
    dist.barrier()
    check(config, dist.get_world_size())
    return config


def row(config: Config, asynchronous: bool) -> dict[str, Any]:
    """A run, and what its saves cost. Collective."""
    config = replace(config, checkpoint=replace(config.checkpoint, asynchronous=asynchronous))
    if dist.get_rank() == 0:
        shutil.rmtree(config.checkpoint.dir, ignore_errors=True)
    dist.barrier()
    spans: list[tuple[float, float]] = []
    ready: list[float] = []
    steps: list[tuple[float, float]] = []
    write, room, step = saver.save_state, saver._HostRoom, loop.run_step

    def timed_write(*arguments: Any) -> None:
        begin = time.perf_counter()
        write(*arguments)
        spans.append((begin, time.perf_counter()))

    def timed_room(*arguments: Any) -> Any:
        begin = time.perf_counter()
        made = room(*arguments)
        ready.append(time.perf_counter() - begin)
        return made

    def timed_step(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        result = step(*arguments, **options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        steps.append((begin, time.perf_counter()))
        return result

    saver.save_state, saver._HostRoom, loop.run_step = timed_write, timed_room, timed_step  # type: ignore[misc]
    try:
        run = loop.train(config)
    finally:
        saver.save_state, saver._HostRoom, loop.run_step = write, room, step  # type: ignore[misc]
    require_same(run)
    events = [json.loads(line) for line in (run.folder.root / "events.jsonl").read_text().splitlines()]
    saves = [event for event in events if event["event"] == "saved"]
    beside = lambda span: any(a < span[1] and span[0] < b for a, b in spans)
    seconds = lambda wanted: [b - a for a, b in steps[1:] if beside((a, b)) == wanted]
    destroy_mesh()
    return {
        "asynchronous": asynchronous,
        "ranks": dist.get_world_size(),
        "gib_of_rank_0": saves[0]["gib"],
        "set_up_seconds": ready[0] if ready else 0.0,
        "stalled_seconds": [event["stalled_seconds"] for event in saves],
        "written_seconds": [event["seconds"] for event in saves],
        "step_seconds": seconds(False),
        "step_seconds_beside_a_save": seconds(True),
    }


def require_same(run: Run) -> None:
    """The newest checkpoint holds the state of the networks, or ValueError. Collective."""
    newest = run.folder.newest()
    if newest != run.folder.path(run.state.step):
        raise ValueError(f"the newest checkpoint is {newest}, not that of step {run.state.step}")
    ours = pieces_to_save(run.networks, run.mesh)
    stored = {key: pieces.map(torch.empty_like) for key, pieces in ours.items()}
    read_pieces(newest, stored)
    for key, pieces in ours.items():
        for (_, a), (_, b) in zip(pieces.parts, stored[key].parts, strict=True):
            if not torch.equal(a, b):
                raise ValueError(f"{newest}: {key} is not what the network has")


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """A table on stdout, and everything as JSON."""
    median = lambda values: f"{statistics.median(values):.3f}" if values else "-"
    print("| saves | ranks | GiB of a rank | set-up, s | stalled, s | written after, s | step, s | step beside a save, s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for x in rows:
        kind = "asynchronous" if x["asynchronous"] else "training waits"
        print(
            f"| {kind} | {x['ranks']} | {x['gib_of_rank_0']:.1f} | {x['set_up_seconds']:.2f} | {median(x['stalled_seconds'])} "
            f"| {median(x['written_seconds'])} | {median(x['step_seconds'])} | {median(x['step_seconds_beside_a_save'])} |"
        )
    versions = {"torch": torch.__version__, "config": args.config, "overrides": args.overrides}
    versions["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "save.json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
