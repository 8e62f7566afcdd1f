"""One rank of runs that test_faults.py disturbs: FOLDER CONFIGURATION [CONFIGURATION OF AN UNDISTURBED RUN].

Says in FOLDER who it is, before anything slow, and which samples each of its steps takes: a line for every batch of the
configuration NAME.yaml in keys_NAME_RANK.jsonl. Where the environment has RCM_PACE, the name of a file, each step takes the
seconds that stand in it; RCM_NODE replaces the rank in the names of files.
"""

import json
import os
import sys
import time
from pathlib import Path

FOLDER, RANK = Path(sys.argv[1]), os.environ["RANK"]
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
NODE = os.environ.get("RCM_NODE", RANK)


def present():
    """This process is here: rank_N.json, replaced at once."""
    partial = FOLDER / f".rank_{NODE}.partial"
    facts = {"pid": os.getpid(), "attempt": ATTEMPT, "rank": int(RANK), "ranks": int(os.environ["WORLD_SIZE"])}
    partial.write_text(json.dumps(facts))
    os.replace(partial, FOLDER / f"rank_{NODE}.json")


def main(configuration, undisturbed=None):
    import torch.distributed as dist

    from rcm_mcore import train
    from rcm_mcore.config import load_config
    from rcm_mcore.data import DataLoader
    from rcm_mcore.parallel.mesh import destroy_mesh, init_distributed
    from rcm_mcore.training import loop

    next_item, name = DataLoader.__next__, Path(undisturbed or configuration).stem

    def recorded(loader):
        item = next_item(loader)
        if hasattr(item, "draws"):  # of a step, not of the check before the run
            batch = item.batch
            line = {"attempt": ATTEMPT, "pid": os.getpid(), "step": batch.step, "slots": batch.slots, "keys": batch.keys}
            with (FOLDER / f"keys_{name}_{NODE}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            if "RCM_PACE" in os.environ:
                time.sleep(float(Path(os.environ["RCM_PACE"]).read_text() or 0))
        return item

    DataLoader.__next__ = recorded
    if undisturbed is not None:
        config = load_config(undisturbed)
        folder = Path(config.checkpoint.dir)
        if not (folder / f"step_{config.train.steps:09d}").is_dir():
            init_distributed()
            loop.train(config)
            dist.barrier()
            destroy_mesh()
        name = Path(configuration).stem
    return train.main([configuration])


if __name__ == "__main__":
    present()
    sys.exit(main(*sys.argv[2:]))
