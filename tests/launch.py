"""Run a script of this folder on several ranks with torchrun, and read back what rank 0 wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def environment(**extra):
    """Ranks import what is installed, never the repository's root, and use one thread each."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false", **extra}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    return env


def torchrun(world_size, *args, check=True, timeout=600):
    """`torchrun --nproc-per-node world_size args`; returns the completed process, its output on failure in the error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", *map(str, args)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    return done


def run_ranks(world_size, script, folder):
    """Run tests/`script` with `folder` as its argument; returns folder/results.json."""
    torchrun(world_size, HERE / script, folder)
    return json.loads((Path(folder) / f"results_{world_size}.json").read_text())
