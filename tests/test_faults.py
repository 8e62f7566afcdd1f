"""Runs that lose processes at random moments continue exactly: steps, samples, weights, checkpoints.

Three kills here; `make test-faults` has twenty in one run, a loss of the whole job, and a node that goes and comes back.
The moments are drawn from RCM_FAULT_SEED, which is printed.
"""

import json
import os
import random
import signal
import socket
import time

import launch
import pytest
import tiny
import torch
from disturbed import (
    EVERY,
    PATIENCE,
    Checkpoints,
    Disturbed,
    by_place,
    events,
    logged,
    read_json,
    started,
    taken,
    torchrun,
    until,
)

from rcm_mcore.checkpoint import write_network
from rcm_mcore.config import parse_config
from rcm_mcore.models import build_model

SCRIPT = launch.HERE / "ranks_faults.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory, mesh, same_rounding):
    """Shards and a teacher."""
    place = tmp_path_factory.mktemp("faults")
    tiny.make_shards(place / "shards")
    config = parse_config(tiny.config("s", "r"))
    net, g = build_model(config.model, config.mesh, mesh.groups), torch.Generator().manual_seed(0)
    weights = {name: p.detach() + 0.05 * torch.randn(p.shape, generator=g) for name, p in net.named_parameters()}
    write_network(place / "teacher", weights, tiny.MODEL | {"patch_size": [1, 2, 2]})
    return place


def write_config(place, name, steps):
    """Student and fake score with rates that change with every step of a network."""
    tree = tiny.config(
        place / "shards", place / name, "distill", checkpoint={"every": EVERY, "keep_last": 2}, train={"steps": steps},
        distill={"teacher": str(place / "teacher"), "student_every": 2, "guidance": 2.0, "rollout_max_steps": 2},
        optim={"warmup_steps": 2, "warmup_start_lr": 1e-3, "decay": "linear", "min_lr_ratio": 0.1},
    )  # fmt: skip
    return tiny.write_config(place / f"{name}.yaml", tree)


def fault_rng():
    seed = int(os.environ.get("RCM_FAULT_SEED", time.time_ns() % 1_000_000))
    print(f"RCM_FAULT_SEED={seed}", flush=True)
    return seed, random.Random(seed)


def check_samples(place, reference, name, steps, nodes=(0, 1)):
    """Each sample once per epoch in the undisturbed run, and the same at the same places in the disturbed one."""
    order = by_place(line for lines in taken(place, reference, (0, 1)) for line in lines)
    assert sorted(order) == [(step, slot) for step in range(steps) for slot in range(4)]
    keys = [order[where] for where in sorted(order)]
    for epoch in range(steps // 12):  # of 48 samples, four to a step
        assert len(set(keys[48 * epoch : 48 * (epoch + 1)])) == 48
    disturbed = taken(place, name, nodes)
    assert by_place(line for lines in disturbed for line in lines) == order
    for lines in disturbed:
        for before, after in zip(lines, lines[1:]):
            if after["pid"] == before["pid"]:
                assert after["step"] == before["step"] + 1


def check_equal(place, reference, name, steps):
    """Log, weights, masters, second moments, EMA, counters and positions are those of the undisturbed run, bit for bit."""
    undisturbed, disturbed, last = place / reference, place / name, f"step_{steps:09d}"
    assert tiny.metrics(disturbed) == tiny.metrics(undisturbed) and len(tiny.metrics(disturbed)) == steps
    found = tiny.differences(disturbed / last, undisturbed / last)
    assert {key: value for key, value in found.items() if value != 0.0} == {}
    assert read_json(disturbed / last / "state.json") == read_json(undisturbed / last / "state.json") != {}
    moved = tiny.differences(undisturbed / last, undisturbed / f"step_{steps - EVERY:09d}")
    assert all(value > 0 for value in moved.values())  # equality says something


def check_close(place, reference, name, steps):
    """As `check_equal`, to the rounding of sums over other ranks."""
    undisturbed, disturbed, last = place / reference, place / name, f"step_{steps:09d}"
    assert len(tiny.metrics(disturbed)) == steps
    worst = 0.0
    for ours, theirs in zip(tiny.metrics(disturbed), tiny.metrics(undisturbed), strict=True):
        for key, value in theirs.items():
            if isinstance(value, float):
                worst = max(worst, abs(ours[key] - value) / max(abs(value), 1e-30))
                assert abs(ours[key] - value) <= 2e-6 * abs(value), (ours["step"], key)
            else:
                assert ours[key] == value
    found = tiny.differences(disturbed / last, undisturbed / last)
    print(f"largest relative differences: log {worst:.1e}, tensors {max(found.values()):.1e}")
    limit = {key: 1e-5 if "exp_avg_sq" in key else 2e-6 for key in found}
    assert {key: value for key, value in found.items() if not value <= limit[key]} == {}
    assert read_json(disturbed / last / "state.json") == read_json(undisturbed / last / "state.json") != {}


def disturb(place, steps, moments):
    """A run of two ranks with a kill at each of the moments, compared with an undisturbed one; returns the kills."""
    seed, rng = fault_rng()
    name = f"disturbed_{steps}"
    configs = [write_config(place, which, steps) for which in (name, f"un{name}")]
    moments = rng.sample(moments, len(moments))
    wanted, limit = len(moments), 2 * len(moments)
    command = torchrun("--standalone", "--nproc-per-node=2", f"--max-restarts={limit}", SCRIPT, place, *configs)
    output = place / "output.txt"
    begun = time.monotonic()
    with started(command, output) as run:
        try:
            disturbed = Disturbed(place, name, run, rng)
            with disturbed.checkpoints as checkpoints:
                while moments and len(disturbed.kills) < limit:
                    moment = moments.pop()
                    disturbed.kill(moment)
                    if moment == "save" and not disturbed.kills[-1]["save"]:
                        moments.insert(0, "save")  # it came too late
                disturbed.ranks()
                code = run.wait(PATIENCE)
        except BaseException:
            print(output.read_text()[-6000:])
            raise
    assert code == 0 and not moments, output.read_text()[-6000:]
    assert checkpoints.problems == [] and checkpoints.looks > len(disturbed.kills)
    assert checkpoints.steps()[-1] == steps and not checkpoints.saving()
    summary = {"seed": seed, "steps": steps, "seconds": time.monotonic() - begun, "looks": checkpoints.looks}
    for kill, seconds in zip(disturbed.kills, disturbed.recoveries(), strict=True):
        kill["recovery"] = seconds
        print("killed rank {rank} in a {moment} at step {step} (save cut short: {save}, newest checkpoint: step {newest}): "
              "went on after {recovery:.1f} s".format(**kill))  # fmt: skip
    (place / "kills.json").write_text(json.dumps(summary | {"kills": disturbed.kills}, indent=1))
    print(f"{len(disturbed.kills)} kills, {summary['looks']} looks at the checkpoints: {place / 'kills.json'}", flush=True)
    assert len(disturbed.kills) >= wanted
    check_equal(place, f"un{name}", name, steps)
    check_samples(place, f"un{name}", name, steps)
    for lines in taken(place, name, (0, 1)):
        for before, after in zip(lines, lines[1:]):
            if after["pid"] != before["pid"]:  # from a checkpoint, none of whose steps is lost
                assert after["step"] % EVERY == 0 and after["step"] <= before["step"] + 1
    return disturbed.kills


def test_a_run_that_loses_ranks_is_the_undisturbed_one(place):
    assert sum(kill["save"] for kill in disturb(place, 24, ["step", "save", "step"])) >= 1


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_twenty_kills_in_one_run(place):
    assert sum(kill["save"] for kill in disturb(place, 120, ["start"] * 3 + ["step"] * 9 + ["save"] * 8)) >= 8


@pytest.fixture(scope="module")
def reference(place):
    """Name and steps of an undisturbed run of two ranks."""
    config = write_config(place, "reference", 36)
    command = torchrun("--standalone", "--nproc-per-node=2", SCRIPT, place, config)
    with started(command, place / "reference.txt") as run:
        assert run.wait(PATIENCE) == 0
    return "reference", 36


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_killed_job_goes_on_with_half_the_ranks(place, reference):
    _, rng = fault_rng()
    name, steps = reference
    config, kill_at = write_config(place, "halved", steps), rng.randint(EVERY + 1, steps - 10)
    output = place / "halved.txt"
    with started(torchrun("--standalone", "--nproc-per-node=2", SCRIPT, place, config), output) as run:
        until(lambda: logged(place / "halved") >= kill_at, f"step {kill_at}", lambda: run.poll() is None)
        run.kill()  # before its workers, which it would start again
        for rank in range(2):
            os.kill(read_json(place / f"rank_{rank}.json")["pid"], signal.SIGKILL)
        run.wait()
    print(f"killed the job after step {kill_at}, newest checkpoint: step {Checkpoints(place / 'halved').steps()[-1]}")
    with started(torchrun("--standalone", "--nproc-per-node=1", SCRIPT, place, config), output) as run:
        assert run.wait(PATIENCE) == 0, output.read_text()[-6000:]
    check_close(place, name, "halved", steps)
    check_samples(place, name, "halved", steps)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_node_that_is_lost_and_comes_back(place, reference):
    """Two agents of one rank each. The other goes on alone from the last checkpoint; both, when the lost one is back."""
    name, steps = reference
    config, folder, pace = write_config(place, "nodes", steps), place / "nodes", place / "pace"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def node(which):
        """An agent; that of "a" holds the store by which they find each other, and cannot be lost."""
        conf = f"is_host={int(which == 'a')},last_call_timeout=8,keep_alive_interval=2,keep_alive_max_attempt=5"
        command = torchrun(
            "--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}",
            "--rdzv-id=faults", f"--rdzv-conf={conf}", "--local-addr=localhost", "--max-restarts=9", SCRIPT, place, config,
        )  # fmt: skip
        return started(command, place / f"node_{which}.txt", RCM_NODE=which, RCM_PACE=str(pace))

    def facts(which):
        return read_json(place / f"rank_{which}.json")

    def last_taken(which):
        lines = taken(place, "nodes", [which])[0] if (place / f"keys_nodes_{which}.jsonl").exists() else []
        return lines[-1] if lines else {"pid": 0}

    def goes_on(ranks, which):
        """Both take samples, with so many ranks."""
        return all(facts(w).get("ranks") == ranks and last_taken(w)["pid"] == facts(w)["pid"] for w in which)

    pace.write_text("0")
    with node("a") as a:
        alive = lambda: a.poll() is None
        with node("b") as b:
            until(lambda: logged(folder) >= EVERY + 1, "the run is past a checkpoint", alive)
            pace.write_text("2")  # seconds a step, so that the lost one is back before the end
            assert facts("a")["ranks"] == facts("b")["ranks"] == 2
            b.kill()
            os.kill(facts("b")["pid"], signal.SIGKILL)
        lost = time.monotonic()
        until(lambda: goes_on(1, "a"), "one node went on alone", alive)
        alone, at = time.monotonic() - lost, logged(folder)
        until(lambda: logged(folder) > at, "a step alone", alive)
        with node("b") as b:
            back = time.monotonic()
            until(lambda: goes_on(2, "ab"), "both went on", alive)
            together, again = time.monotonic() - back, logged(folder)
            pace.write_text("0")
            assert a.wait(PATIENCE) == 0 and b.wait(PATIENCE) == 0
    print(f"lost a node, went on alone after {alone:.1f} s at step {at}; back with two after {together:.1f} s at step {again}")
    sizes = [event["ranks"] for event in events(folder) if event["event"] in ("started", "resumed")]
    assert sizes[-1] == 2 and 1 in sizes and 2 in sizes[:-1]
    check_close(place, name, "nodes", steps)
    check_samples(place, name, "nodes", steps, "ab")
