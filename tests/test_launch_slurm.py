"""The scripts of launch_slurm/ with stand-ins for Slurm: what they run, when they requeue (on a real Slurm: test_slurm.py)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import launch
import pytest
import tiny

from rcm_mcore import requeue

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "launch_slurm").glob("*.sh"))
STUBS = {
    # srun runs the task in place, once; what stands before `bash` are its own options.
    "srun": """
        printf '%s\\0' "$@" >> "$CALLS/srun"; printf '\\n' >> "$CALLS/srun"
        while [[ $1 != bash ]]; do shift; done
        exec "$@"
    """,
    "scontrol": """
        if [[ $1 == show ]]; then printf 'node07\\nnode08\\n'; else echo "$*" >> "$CALLS/scontrol"; fi
    """,
    # Python is real but for torchrun, which writes down its arguments and what it ignores, and exits as it is told.
    "python": """
        if [[ $2 != torch.distributed.run ]]; then exec "$REAL_PYTHON" "$@"; fi
        printf '%s\\0' "$@" > "$CALLS/torchrun"
        grep SigIgn /proc/self/status > "$CALLS/ignored" || true
        env > "$CALLS/environment"
        exit "$(cat "$CALLS/code")"
    """,
}


class Site:
    """A folder with stand-ins, and what they were called with."""

    def __init__(self, folder):
        self.folder, self.run = folder, folder / "run"
        for name, text in STUBS.items():
            (folder / "bin").mkdir(exist_ok=True)
            path = folder / "bin" / name
            path.write_text(f"#!/usr/bin/env bash\n{text}")
            path.chmod(0o755)
        tree = tiny.config(folder / "shards", self.run, train={"steps": 9})
        self.config = tiny.write_config(folder / "a config.yaml", tree)

    def script(self, name, *arguments, code=0, **extra):
        """Run a script as the job 4242 on two nodes; torchrun ends with `code`."""
        for path in self.folder.glob("*"):
            if path.name in ("srun", "scontrol", "torchrun"):
                path.unlink()
        (self.folder / "code").write_text(str(code))
        env = {
            "CALLS": str(self.folder), "REAL_PYTHON": sys.executable, "RCM_PYTHON": str(self.folder / "bin" / "python"),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "RCM_CONFIG": str(self.config),
            "SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_GPUS_ON_NODE": "8",
            "SLURM_SUBMIT_DIR": str(ROOT),
        }  # fmt: skip
        command = ["bash", str(ROOT / "launch_slurm" / name), *arguments]
        return subprocess.run(command, cwd=ROOT, env=launch.environment(**env | extra), capture_output=True, text=True)

    def called(self, name):
        """Arguments of the last call of a stand-in."""
        return (self.folder / name).read_text().rstrip("\n").split("\n")[-1].split("\0")[:-1]

    @property
    def requeued(self):
        path = self.folder / "scontrol"
        return path.read_text().splitlines() if path.exists() else []

    def leave(self, step, saved):
        """What an attempt leaves in checkpoint.dir."""
        self.run.mkdir(exist_ok=True)
        (self.run / "log.jsonl").write_text("".join(json.dumps({"step": i + 1}) + "\n" for i in range(step)) + '{"ste')
        if saved:
            (self.run / "latest").write_text(f"step_{saved:09d}")


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_arguments_reach_the_trainer_as_they_are(site):
    site.leave(9, 9)
    overrides = ['data.shards=["/a folder/*.tar", "$HOME"]', "train.seed=7", "log.project=a 'b' \"c\""]
    done = site.script("rcm_14b.sh", *overrides)
    assert done.returncode == 0 and "finished: 9 steps" in done.stdout, done.stderr
    assert site.called("torchrun") == [
        "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=8", "--max-restarts=0", "--rdzv-backend=c10d",
        "--rdzv-endpoint=node07:24242", "--rdzv-id=4242.0", "-m", "rcm_mcore.train", str(site.config), *overrides,
    ]  # fmt: skip
    first = (site.folder / "srun").read_text().split("\n")[0].split("\0")
    assert first[:3] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"] and "--kill-on-bad-exit=1" in first
    assert not any(word.startswith("--container") for word in first) and site.requeued == []
    ignored = int((site.folder / "ignored").read_text().split()[1], 16)
    assert all(ignored >> (number - 1) & 1 for number in (10, 15))  # USR1 and TERM: torchrun must outlive them
    environment = (site.folder / "environment").read_text().splitlines()
    assert "PYTHONSAFEPATH=1" in environment and "PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT" in environment
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in environment


@pytest.mark.parametrize("script, example", [("rcm_14b.sh", "wan_14b"), ("rcm_1_3b.sh", "wan_1_3b")])
def test_each_script_has_its_example(site, script, example):
    """Site values come from the environment too; without a folder of checkpoints there is nothing to start again."""
    values = {"RCM_CONFIG": "", "RCM_HEAD_ADDRESS": "10.0.0.1", "RCM_HEAD_PORT": "5000", "RCM_RANKS_PER_NODE": "4"}
    image = {"RCM_CONTAINER_IMAGE": "an image.sqsh", "RCM_CONTAINER_MOUNTS": "/a b:/a b"}
    done = site.script(script, f"checkpoint.dir={site.run}", code=1, SLURM_RESTART_COUNT="3", **values, **image)
    assert done.returncode == 1 and "not started again: the run had not begun" in done.stdout and site.requeued == []
    arguments = site.called("torchrun")
    assert str(ROOT / f"examples/{example}/config.yaml") in arguments
    assert {"--nproc-per-node=4", "--rdzv-endpoint=10.0.0.1:5000", "--rdzv-id=4242.3"} <= set(arguments)
    options = site.called("srun")
    assert {"--container-image=an image.sqsh", "--container-mounts=/a b:/a b", f"--container-workdir={ROOT}"} <= set(options)


def test_headers_ask_for_a_signal_and_a_requeue():
    for name in ("rcm_14b.sh", "rcm_1_3b.sh"):
        header = [line for line in (ROOT / "launch_slurm" / name).read_text().splitlines() if line.startswith("#SBATCH")]
        assert {"#SBATCH --signal=USR1@300", "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --mem=0"} <= set(
            header
        )


def test_a_stopped_run_is_requeued(site):
    site.leave(4, 4)
    done = site.script("rcm_1_3b.sh")
    assert done.returncode == 75 and site.requeued == ["requeue 4242"]
    assert "start again: was asked to stop after step 4 of 9, newest checkpoint 4" in done.stdout


def test_two_failures_at_the_same_step_end_the_job(site):
    site.leave(4, 3)
    for step, code, wanted in ((4, 1, 75), (5, 1, 75), (5, 0, 75), (5, 1, 75), (5, 9, 9)):
        site.leave(step, 3 + (step == 5))
        done = site.script("rcm_1_3b.sh", code=code)
        assert (done.returncode, site.requeued) == (wanted, ["requeue 4242"] if wanted == 75 else [])
    assert "not started again: failed with exit code 9 after step 5 of 9" in done.stdout
    assert "failed there the time before" in done.stdout
    notes = [json.loads(line) for line in (site.run / "attempts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["exit_code"]) for line in notes] == [(4, 1), (5, 1), (5, 0), (5, 1), (5, 9)]
    assert site.script("rcm_1_3b.sh", code=1, SLURM_JOB_ID="4243").returncode == 75  # another job begins anew


def test_attempts_without_a_new_checkpoint_end_the_job(site):
    """A time limit that is always past, say."""
    config = requeue.load_config(site.config)
    site.leave(0, 0)
    verdicts = [requeue.decide(config, 0, job="1") for _ in range(requeue.MAX_WITHOUT_PROGRESS)]
    assert [verdict for verdict, _ in verdicts] == ["start again"] * 4 + ["not started again"]
    assert "5 attempts have left no newer checkpoint" in verdicts[-1][1] and "checkpoint.every=100" in verdicts[-1][1]
    site.leave(2, 2)
    assert requeue.decide(config, 0, job="1")[0] == "start again"


def test_a_dry_run_or_a_wrong_configuration_is_not_requeued(site):
    site.leave(4, 4)
    assert site.script("rcm_14b.sh", "--dry-run").returncode == 0
    done = site.script("rcm_14b.sh", "train.stops=3", code=1)
    assert done.returncode == 1 and "not started again: unknown key train.stops" in done.stdout
    assert site.requeued == [] and not (site.run / "attempts.jsonl").exists()


def test_sample_and_convert(site):
    arguments = ["--prompt", "a cat, a dog", "--out", str(site.folder / "a b")]
    assert site.script("sample.sh", *arguments, code=3).returncode == 3
    assert site.called("torchrun")[-6:] == ["-m", "rcm_mcore.sample", *arguments]
    done = site.script(
        "convert.sh", "--from", "wan", "--to", "mcore", str(site.folder / "no such.pth"), str(site.folder / "out")
    )
    assert done.returncode == 2 and "no such.pth" in done.stderr
    assert site.called("srun")[:2] == ["--nodes=1", "--ntasks=1"]
