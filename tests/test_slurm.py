"""The real scripts on a real Slurm: to the end, through preemption, and no further when it is of no use (`make test-slurm`)."""

import json
import sys
from pathlib import Path

import cluster
import launch
import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slurm
STEPS = 400


@pytest.fixture(scope="module")
def slurm():
    reason = cluster.why_not()
    if reason:
        pytest.skip(reason)
    with cluster.cluster() as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Shards and the configuration of a short run."""
    place = tmp_path_factory.mktemp("slurm")
    tiny.make_shards(place / "shards")
    tree = tiny.config(place / "shards", place / "unset", train={"steps": STEPS}, checkpoint={"every": 1000, "keep_last": 9})
    tiny.write_config(place / "config.yaml", tree)
    return place


def submit(slurm, place, name, *overrides, nodes=2):
    """The job of a run whose folder is place/name; its output goes to place/name.txt."""
    site = {
        "RCM_PYTHON": sys.executable, "RCM_RANKS_PER_NODE": "1", "RCM_HEAD_ADDRESS": "127.0.0.1",
        "RCM_CONFIG": str(place / "config.yaml"), "MKL_CBWR": "COMPATIBLE",
    }  # fmt: skip
    command = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={place / name}.txt", "launch_slurm/rcm_1_3b.sh"]
    slurm.env = launch.environment(SLURM_CONF=slurm.env["SLURM_CONF"], **site)
    return slurm.ask(*command, f"checkpoint.dir={place / name}", *overrides, cwd=ROOT)


def output(place, name):
    path = place / f"{name}.txt"
    return path.read_text() if path.exists() else "no output"


def wait_for_end(slurm, place, name, job, seconds=180):
    cluster.until(lambda: slurm.has_ended(job), seconds, lambda: output(place, name) + str(slurm.facts(job)))
    return slurm.facts(job)


def logged(folder):
    path = folder / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(slurm, place):
    job = submit(slurm, place, "undisturbed")
    return wait_for_end(slurm, place, "undisturbed", job)


def test_runs_to_completion(undisturbed, place):
    text = output(place, "undisturbed")
    assert (undisturbed["JobState"], undisturbed["ExitCode"], undisturbed["Restarts"]) == ("COMPLETED", "0:0", "0"), text
    assert undisturbed["NumNodes"] == "2" and f"finished: {STEPS} steps" in text
    assert (place / "undisturbed" / "latest").read_text() == f"step_{STEPS:09d}"


def test_stopped_twice_equals_undisturbed(slurm, undisturbed, place):
    """By what Slurm sends ahead of the time limit, and by a job that preempts."""
    folder = place / "stopped"
    job = submit(slurm, place, "stopped")
    cluster.until(lambda: logged(folder) >= 20, 120, lambda: output(place, "stopped"))
    slurm.ask("scancel", "--signal=USR1", job)
    cluster.until(lambda: slurm.facts(job)["Restarts"] == "1", 60, lambda: output(place, "stopped"))
    (first,) = [int(path.name[5:]) for path in folder.glob("step_*")]
    cluster.until(lambda: logged(folder) >= first + 20, 120, lambda: output(place, "stopped"))
    urgent = slurm.ask(
        "sbatch", "--parsable", "-p", "urgent", "-N", 2, "--exclusive", "-o", place / "urgent.txt", "--wrap", "date"
    )
    assert wait_for_end(slurm, place, "urgent", urgent)["JobState"] == "COMPLETED"
    assert slurm.facts(job)["Restarts"] == "2"
    facts = wait_for_end(slurm, place, "stopped", job)

    text = output(place, "stopped")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "2"), text
    assert "SIGUSR1: stopped after step" in text and "SIGTERM: stopped after step" in text
    attempts = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    assert [(line["job"], line["exit_code"]) for line in attempts] == [(job, 0), (job, 0)]
    assert 20 <= attempts[0]["saved"] < attempts[1]["saved"] < STEPS and attempts[0]["saved"] == first
    assert all(line["saved"] == line["step"] for line in attempts)  # saved at once: no step is done twice
    assert [line["step"] for line in tiny.log_lines(folder)] == list(range(1, STEPS + 1))
    found = tiny.differences(folder / f"step_{STEPS:09d}", place / "undisturbed" / f"step_{STEPS:09d}")
    assert set(found.values()) == {0.0}


def test_failing_twice_at_the_same_step_ends_the_job(slurm, place):
    """After a first step so large that nothing is finite in the second."""
    job = submit(slurm, place, "failing", "optim.lr=1e30", nodes=1)
    facts = wait_for_end(slurm, place, "failing", job)
    text = output(place, "failing")
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "1:0", "1"), text
    assert text.count("error: step 1: ") == 2 and text.count("\nstart again: failed with exit code 1 after step 1 of") == 1
    assert "\nnot started again: failed with exit code 1 after step 1 of" in text and "failed there the time before" in text
