"""Runs that lose processes at random moments continue exactly: steps, samples, weights, checkpoints.

Three kills here; `make test-faults` has twenty in one run, a loss of the whole job, and a node that goes and comes back.
The moments are drawn from RCM_FAULT_SEED, which is printed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import launch
import pytest
import tiny
import torch

from rcm_mcore.checkpoint import write_network
from rcm_mcore.checkpoint.folder import check_files
from rcm_mcore.config import parse_config
from rcm_mcore.models import build_model

EVERY = 3  # steps between checkpoints
TIMES = {"seconds", "data_seconds", "samples_per_second"}
SCRIPT = launch.HERE / "ranks_faults.py"
PATIENCE = 900.0  # seconds for anything to happen on a busy machine


@pytest.fixture(scope="module", autouse=True)
def same_rounding():
    """The results of Intel's BLAS depend on where in memory its operands happen to lie, unless it is told otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MKL_CBWR", "COMPATIBLE")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory, mesh):
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
        optim={"warmup_steps": 2, "warmup_start_lr": 1e-3, "decay": "linear"},
    )  # fmt: skip
    return tiny.write_config(place / f"{name}.yaml", tree)


def fault_rng():
    seed = int(os.environ.get("RCM_FAULT_SEED", time.time_ns() % 1_000_000))
    print(f"RCM_FAULT_SEED={seed}", flush=True)
    return seed, random.Random(seed)


def until(condition, what, alive=lambda: True):
    """The first true value of `condition`."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert alive(), f"the run ended before {what}"
        assert time.monotonic() < end, f"waited {PATIENCE:.0f} s until {what}"
        time.sleep(0.002)
    return value


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


@contextmanager
def started(command, output, **environment):
    """A process whose output goes to a file; ended with its children if it is still there."""
    # torchrun lends workers that it starts again the store of those before them, who left their addresses in it
    # (pytorch issue 135712); told so, it lets the workers make a store of their own.
    env = launch.environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **environment)
    with output.open("a") as stream:
        run = subprocess.Popen(command, env=env, stdout=stream, stderr=stream)
        try:
            yield run
        finally:
            if run.poll() is None:
                run.terminate()  # torchrun ends its workers
                try:
                    run.wait(60)
                except subprocess.TimeoutExpired:
                    run.kill()


def torchrun(*arguments):
    return [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]


class Checkpoints:
    """The checkpoints of a run, watched: once there is one, there is always a whole one, none older than the last."""

    def __init__(self, folder):
        self.folder, self.newest, self.looks, self.problems = folder, 0, 0, []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def steps(self):
        return sorted(int(path.name[5:]) for path in self.folder.glob("step_*"))

    def saving(self):
        """Names of the saves that are going on."""
        return {path.name for path in self.folder.glob(".partial_step_*")}

    def look(self, check):
        """Whether the newest is whole by `check`, a function of its folder that raises ValueError or OSError."""
        steps = self.steps()
        newest = steps[-1] if steps else 0
        if newest < self.newest:
            self.problems.append(f"the newest checkpoint went from step {self.newest} back to {newest}")
        self.newest, self.looks = max(self.newest, newest), self.looks + 1
        if newest:
            try:
                check(self.folder / f"step_{newest:09d}")
            except (ValueError, OSError) as error:
                self.problems.append(f"step {newest}: {error}")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()

    def _watch(self):
        while not self._end.wait(0.02):
            self.look(sizes_agree)


def sizes_agree(path):
    for name, (size, _) in json.loads((path / "manifest.json").read_text()).items():
        if (path / name).stat().st_size != size:
            raise ValueError(f"{name} has another size")


class Disturbed:
    """A run of two ranks under torchrun of which a rank is killed at chosen moments.

    kills: of each the moment aimed at, rank, step that the log had reached, whether a save was cut short, wall time.
    """

    def __init__(self, place, name, run, rng):
        self.place, self.run, self.rng, self.name = place, run, rng, name
        self.folder, self.kills = place / name, []
        self.checkpoints = Checkpoints(self.folder)

    def logged(self):
        """The last step in the log."""
        try:
            lines = (self.folder / "log.jsonl").read_bytes().splitlines()
            return max((json.loads(line)["step"] for line in lines), default=0)
        except (OSError, ValueError):
            return 0

    def alive(self):
        return self.run.poll() is None

    def _until(self, condition, what):
        def checked():
            attempt = max(read_json(self.place / f"rank_{rank}.json").get("attempt", -1) for rank in range(2))
            assert attempt <= len(self.kills), f"attempt {attempt} after {len(self.kills)} kills, waiting until {what}"
            return condition()

        return until(checked, what, self.alive)

    def ranks(self):
        """Both ranks of this attempt, once they are there."""

        def there():
            found = [read_json(self.place / f"rank_{rank}.json") for rank in range(2)]
            attempts = [facts.get("attempt", -1) for facts in found]
            return found if attempts == [len(self.kills)] * 2 else None

        return self._until(there, f"attempt {len(self.kills)} began")

    def kill(self, moment):
        """Kill a random rank: during its "start", in a "step", or in a "save" that follows one that this attempt finished."""
        ranks, rank = self.ranks(), self.rng.randrange(2)
        if moment == "start":
            time.sleep(self.rng.uniform(0.0, 10.0))
        else:
            self._until(lambda: self._taken(0) == len(self.kills), "it went on")
            first, saved = self.logged(), self.checkpoints.steps()
            if moment == "save":
                self._until(lambda: self.checkpoints.steps() > saved, "it saved")
                self._until(self.checkpoints.saving, "it saved again")
                time.sleep(self.rng.uniform(0.0, 0.1))
            else:
                wanted = first + self.rng.randint(EVERY, 2 * EVERY)
                self._until(lambda: self.logged() >= wanted, f"step {wanted}")
                time.sleep(self.rng.uniform(0.0, 0.1))
        saving, step = self.checkpoints.saving(), self.logged()
        os.kill(ranks[rank]["pid"], signal.SIGKILL)
        now = time.time()
        cut = bool(saving & self.checkpoints.saving())
        self.checkpoints.look(check_files)
        newest = self.checkpoints.newest
        self.kills.append({"moment": moment, "rank": rank, "step": step, "save": cut, "newest": newest, "time": now})

    def _taken(self, rank):
        """The last attempt in which a rank took samples."""
        try:
            return json.loads((self.place / f"keys_{self.name}_{rank}.jsonl").read_text().splitlines()[-1])["attempt"]
        except (OSError, IndexError):
            return -1

    def recoveries(self):
        """Seconds from each kill until the run went on."""
        times = [event["time"] for event in events(self.folder) if event["event"] in ("started", "resumed")]
        return [min(t for t in times if t > kill["time"]) - kill["time"] for kill in self.kills]


def events(folder):
    try:
        return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []


def metrics(folder):
    """The lines of the log without the times, which no two runs share."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in tiny.log_lines(folder)]


def taken(place, name, ranks):
    """What each rank took, in order: lists of {"attempt", "step", "slots", "keys"}."""
    paths = [place / f"keys_{name}_{rank}.jsonl" for rank in ranks]
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def by_place(lines):
    """{(step, slot): key} of a run; a place that was taken again, after a kill, must get the same sample."""
    found = {}
    for line in lines:
        for slot, key in zip(line["slots"], line["keys"], strict=True):
            assert found.setdefault((line["step"], slot), key) == key, f"step {line['step']}, slot {slot}: {key}"
    return found


def check_samples(place, name, steps):
    """Each sample once per epoch in the undisturbed run, and the same at the same places in the disturbed one."""
    undisturbed, disturbed = (taken(place, run, range(2)) for run in ("undisturbed", name))
    order = by_place(line for lines in undisturbed for line in lines)
    assert sorted(order) == [(step, slot) for step in range(steps) for slot in range(4)]
    keys = [order[where] for where in sorted(order)]
    for epoch in range(steps // 12):  # of 48 samples, four to a step
        assert len(set(keys[48 * epoch : 48 * (epoch + 1)])) == 48
    assert by_place(line for lines in disturbed for line in lines) == order
    for lines in disturbed:
        for before, after in zip(lines, lines[1:]):
            if after["attempt"] == before["attempt"]:
                assert after["step"] == before["step"] + 1
            else:  # from a checkpoint, none of whose steps is lost
                assert after["step"] % EVERY == 0 and after["step"] <= before["step"] + 1


def check_equal(place, name, steps):
    """Log, weights, masters, second moments, EMA, counters and positions are those of the undisturbed run, bit for bit."""
    undisturbed, disturbed = place / "undisturbed", place / name
    assert metrics(disturbed) == metrics(undisturbed) and len(metrics(disturbed)) == steps
    last = f"step_{steps:09d}"
    found = tiny.differences(disturbed / last, undisturbed / last)
    assert {key: value for key, value in found.items() if value != 0.0} == {}
    assert read_json(disturbed / last / "state.json") == read_json(undisturbed / last / "state.json") != {}
    moved = tiny.differences(undisturbed / last, place / "undisturbed" / f"step_{steps - EVERY:09d}")
    assert all(value > 1e-9 for value in moved.values())  # equality says something


def disturb(place, steps, moments):
    """A run of two ranks with a kill at each of the moments, compared with an undisturbed one; returns the kills."""
    seed, rng = fault_rng()
    configs = [write_config(place, name, steps) for name in ("disturbed", "undisturbed")]
    moments = rng.sample(moments, len(moments))
    limit = 2 * len(moments)
    command = torchrun("--standalone", "--nproc-per-node=2", f"--max-restarts={limit}", SCRIPT, place, *configs)
    output = place / "output.txt"
    begun = time.monotonic()
    with started(command, output) as run:
        try:
            disturbed = Disturbed(place, "disturbed", run, rng)
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
    return disturbed.kills


def test_a_run_that_loses_ranks_is_the_undisturbed_one(place):
    kills = disturb(place, 24, ["step", "save", "step"])
    assert len(kills) >= 3 and any(kill["save"] for kill in kills)
    check_equal(place, "disturbed", 24)
    check_samples(place, "disturbed", 24)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_twenty_kills_in_one_run(place):
    for path in [*place.glob("keys_*"), *place.glob("rank_*")]:
        path.unlink()  # of the short form
    for name in ("disturbed", "undisturbed"):
        shutil.rmtree(place / name, ignore_errors=True)
    kills = disturb(place, 120, ["start"] * 3 + ["step"] * 9 + ["save"] * 8)
    assert len(kills) >= 20 and sum(kill["save"] for kill in kills) >= 8
    check_equal(place, "disturbed", 120)
    check_samples(place, "disturbed", 120)
