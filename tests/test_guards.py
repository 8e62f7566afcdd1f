"""What watches a run: equal ranks at its start, hangs that end, slow ranks that are named."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import launch
import pytest
import tiny
import torch

import rcm_mcore
from rcm_mcore.config import ConfigError, parse_config
from rcm_mcore.training import preflight, watchdog
from rcm_mcore.training.stragglers import FLOORS, Stragglers, median_of, slow_ranks
from rcm_mcore.training.watchdog import EXIT_STALLED, Watchdog

NAN, CPU = float("nan"), torch.device("cpu")


@pytest.mark.parametrize(
    "field, value",
    [
        ("stall_minutes", -1.0),
        ("stall_minutes", NAN),
        ("stall_minutes", float("inf")),
        ("straggler_every", -1),
        ("straggler_ratio", 1.0),
        ("straggler_ratio", NAN),
    ],
)
def test_impossible_settings_are_refused_by_field(field, value):
    parse_config(tiny.config("s", "r", guard={"stall_minutes": 0.0, "straggler_every": 0}))
    with pytest.raises(ConfigError, match=rf"guard.{field}={value}: must be"):
        parse_config(tiny.config("s", "r", guard={field: value}))


# What differs between ranks.


def test_a_difference_names_the_ranks_in_the_minority():
    facts = [{"torch": "2.13.0", "triton": "3.7"} for _ in range(5)]
    hosts = ["a", "a", "b", "b", "c"]
    assert preflight.differences(facts, hosts) == []
    facts[2] = {"torch": "2.11.0"}
    assert preflight.differences(facts, hosts) == [
        "torch is 2.11.0 on rank 2 (b), 2.13.0 on the others",
        "triton is missing on rank 2 (b), 3.7 on the others",
    ]


def test_without_a_majority_all_ranks_are_named():
    one, other = {"optim.lr": "1e-06"}, {"optim.lr": "2e-06"}
    assert preflight.differences([one, other], ["a", "b"]) == ["optim.lr is 1e-06 on rank 0 (a), 2e-06 on rank 1 (b)"]
    (text,) = preflight.differences([other, one, one, other], list("abcd"))
    assert text == "optim.lr is 2e-06 on ranks 0 (a), 3 (d), 1e-06 on ranks 1 (b), 2 (c)"
    (text,) = preflight.differences([one] * 9 + [other] * 10, ["a"] * 19)
    assert text.startswith("optim.lr is 1e-06 on ranks 0 (a), 1 (a), ") and text.endswith(
        "7 (a) and 1 more, 2e-06 on the others"
    )


def test_facts_are_versions_sources_and_every_field():
    config = parse_config(tiny.config("s", "r"))
    facts = preflight.facts(config)
    sources = {name for name in facts if name.endswith((".py", ".cu"))}
    files = [p for root in preflight.SOURCES.values() for p in root.rglob("*") if p.suffix in (".py", ".cu")]
    assert len(sources) == len(files) > 100
    assert {"rcm_mcore/training/preflight.py", "rcm_kernels/__init__.py"} <= sources
    assert any(name.endswith(".cu") for name in sources)
    own = Path(preflight.__file__).read_bytes()
    assert facts["rcm_mcore/training/preflight.py"] == hashlib.sha256(own).hexdigest()[:12]
    assert facts["torch"] == torch.__version__ and facts["megatron-core"].startswith("0.16")
    assert {"optim.lr", "mesh.tp", "guard.stall_minutes"} <= facts.keys()


def test_a_clock_that_is_off_is_named():
    clocks = [100.0, 100.9, 93.0, 100.2, 106.0]
    assert preflight.clock_warnings(clocks, list("abcde")) == [
        "rank 2 (c): its clock is -7.2 s off the median of the ranks",
        "rank 4 (e): its clock is +5.8 s off the median of the ranks",
    ]


def test_a_rate_below_the_others_is_named():
    assert preflight.slow_warnings([600.0, 610.0, 479.0, 595.0], list("abcd"), "TFLOP/s") == [
        "rank 2 (c): 479 TFLOP/s, the median is 600"
    ]
    assert preflight.slow_warnings([600.0, 470.0], ["a", "b"], "x") == ["rank 1 (b): 470 x, the median is 600"]
    assert preflight.slow_warnings([600.0, 490.0, NAN], ["a", "b", "c"], "x") == []
    assert preflight.slow_warnings([600.0], ["a"], "x") == []


# Arithmetic.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_wrong_element_of_a_product_is_seen(dtype, monkeypatch):
    assert preflight.product_error(CPU, dtype) == ""
    true = preflight.product

    def changed(value):
        def product(a, b):
            c = true(a, b)
            c[7, 9] = c[7, 9] + value
            return c

        return product

    monkeypatch.setattr(preflight, "product", changed(1))
    assert preflight.product_error(CPU, dtype) == "1 of 256 rows differ from the exact result"
    monkeypatch.setattr(preflight, "product", changed(NAN))
    assert preflight.product_error(CPU, dtype) == "1 of 65536 elements are not finite"


@pytest.mark.parametrize("size", [256, 2048])
def test_the_product_is_exact_in_eight_bits(size):
    """Also where a kernel adds two halves that it has rounded to bfloat16."""
    a, b, _ = preflight.operands(size)
    halves = [a[:, k].float() @ b[k].float() for k in (slice(size // 2), slice(size // 2, None))]
    parts = [*halves, sum(halves)]
    assert max(float(x.abs().max()) for x in parts) <= 256


# nvidia-smi.


def test_what_nvidia_smi_says_against_a_gpu():
    healthy = {"": ["0", "No", "No", "No"], "clocks_event_reasons.": ["Not Active"] * 4}

    def warnings(**changes):
        prefixes = {"health": "", "events": "clocks_event_reasons.", "older": "clocks_throttle_reasons."}
        answers = healthy | {prefixes[name]: values for name, values in changes.items()}
        return preflight.smi_warnings(lambda fields: answers.get(fields[0].rpartition("hw_slowdown")[0]))

    assert warnings() == []
    assert warnings(health=["[N/A]"] * 4) == warnings(health=None) == warnings(health=["?"]) == []
    assert warnings(health=["3", "[N/A]", "Yes", "No"]) == [
        "uncorrected memory errors since the driver was loaded (ecc.errors.uncorrected.volatile.total: 3)",
        "memory rows wait for a reset to be remapped (remapped_rows.pending: Yes)",
    ]
    hot = ["Not Active", "Active", "Not Active", "Not Active"]
    assert warnings(events=hot) == ["slowed down: too hot (hw_thermal_slowdown: Active)"]
    assert warnings(events=None, older=hot) == ["slowed down: too hot (hw_thermal_slowdown: Active)"]
    assert warnings(events=None) == []


def test_nvidia_smi_is_asked_about_one_gpu(tmp_path):
    command = tmp_path / "nvidia-smi"
    command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "3, No"\nexit $(cat {tmp_path}/code)\n')
    command.chmod(0o755)
    (tmp_path / "code").write_text("0")
    assert preflight._query(str(command), "GPU-1", ["a.b", "c"]) == ["3", "No"]
    assert (tmp_path / "asked").read_text() == "-i GPU-1 --query-gpu=a.b,c --format=csv,noheader,nounits\n"
    (tmp_path / "code").write_text("2")  # an unknown field
    assert preflight._query(str(command), "GPU-1", ["a.b", "c"]) is None
    assert preflight._query(str(tmp_path / "none"), "GPU-1", ["a.b", "c"]) is None
    assert preflight.gpu_warnings(CPU) == []


# Slow ranks.


def test_slow_ranks():
    decide = lambda seconds, ratio=1.5, floor=0.005: slow_ranks(seconds, ratio=ratio, floor=floor)
    assert decide([1.0, 1.1, 1.6, 0.9]) == [2]
    assert decide([1.0, 1.1, 1.4, 0.9]) == []
    assert decide([1.0, 2.0]) == [1]  # of two ranks, the median is the faster
    assert decide([0.001, 0.005, 0.001]) == []  # below the floor
    assert decide([0.0, 0.0, 0.006]) == [2]
    assert decide([NAN, 1.0, 1.0, 9.0, NAN]) == [3]
    assert decide([1.0, 1.0, float("inf"), NAN]) == []
    assert decide([7.0]) == decide([NAN]) == decide([NAN, NAN]) == decide([]) == []
    assert median_of([3.0, NAN, 1.0]) == 1.0 and FLOORS.keys() == {"step", "data", "probe"}


class Log:
    def __init__(self):
        self.events = []

    def event(self, kind, **facts):
        json.dumps(facts, allow_nan=False)
        self.events.append({"event": kind, **facts})


@pytest.fixture
def stragglers(mesh):
    def make(**guard):
        here = SimpleNamespace(device=CPU, reads=True, is_main=True)  # spans are then numbers
        return Stragglers(parse_config(tiny.config("s", "r", guard=guard)).guard, here, dtype=torch.float32)

    return make


def test_times_are_means_of_the_steps_since_the_last_report_but_the_first(stragglers):
    one, log = stragglers(straggler_every=2), Log()
    for step, (own, waited) in enumerate([(9.0, 7.0), (2.0, 1.0), (3.0, 2.0), (5.0, 4.0)], start=1):
        one.before_step(step)
        one.own_time._spans = [(0.0, own)] if step % 2 else [*one.own_time._spans, (0.0, own)]
        one.after_step(step, waited, log)
    assert [(e["step_seconds"], e["data_seconds"]) for e in log.events] == [([2.0], [1.0]), ([4.0], [3.0])]
    assert all(0 < seconds < 1 for e in log.events for seconds in e["probe_seconds"])


def test_what_was_not_measured_is_null(stragglers):
    one, log = stragglers(straggler_every=1), Log()
    one.after_step(1, 0.5, log)
    assert log.events == [{"event": "rank_times", "step_seconds": [None], "data_seconds": [None], "probe_seconds": [None]}]


def test_a_rank_that_is_handed_its_samples_does_not_wait_for_the_loader(mesh):
    guard, log = parse_config(tiny.config("s", "r", guard={"straggler_every": 2})).guard, Log()
    one = Stragglers(guard, SimpleNamespace(device=CPU, reads=False, is_main=True), dtype=torch.float32)
    for step in (1, 2):
        one.after_step(step, 1.0, log)
    assert [e["data_seconds"] for e in log.events] == [[None]]


def test_no_stragglers_no_measurement(stragglers):
    one, log = stragglers(straggler_every=0), Log()
    one.before_step(1)
    one.after_step(1, 1.0, log)
    assert one.own_time is None and log.events == []


# The watchdog, in this process.

MINUTES = 0.02


@pytest.fixture
def ended(monkeypatch):
    """Exit codes that the watchdog would have ended this process with."""
    codes = []

    def exit_(code):
        codes.append(code)
        raise SystemExit  # ends the watchdog's thread

    monkeypatch.setattr(watchdog.os, "_exit", exit_)
    return codes


def wait_for(what, seconds=60.0):
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < seconds, "it did not happen"
        time.sleep(0.02)


def test_a_stall_is_written_down_and_ends_the_process(tmp_path, ended, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    # A stand-in for NCCL's recorder, which only a build with CUDA has.
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"collectives", raising=False)
    with Watchdog(tmp_path / "run" / "stacks", MINUTES) as dog:
        dog.beat("in step 5")
        wait_for(lambda: ended)
    assert ended == [EXIT_STALLED] and EXIT_STALLED == 76
    text = (tmp_path / "run" / "stacks" / "rank_00003.txt").read_text()
    words = ["time: 20", f"pid: {os.getpid()}", "rank: 3", "doing: in step 5", "since: 20", "host: ", "in wait_for"]
    assert [word for word in words if word not in text] == []
    assert (tmp_path / "run" / "stacks" / "nccl_trace_rank_00003").read_bytes() == b"collectives"


def test_a_slow_run_that_moves_is_left_alone(tmp_path, ended):
    minutes = 0.05
    with Watchdog(tmp_path / "stacks", minutes) as dog:
        for step in range(15):  # longer than it may stand still
            dog.beat(f"in step {step}")
            time.sleep(60 * minutes / 10)
        dog.beat("saving", patience_minutes=1.0)
        time.sleep(60 * minutes * 1.3)
    assert ended == [] and list(tmp_path.iterdir()) == []


def test_a_run_that_moves_again_goes_on(tmp_path, ended, caplog):
    written = tmp_path / "rank_00000.txt"
    with Watchdog(tmp_path, MINUTES) as dog:
        for stalls in (1, 2):
            dog.beat("in a slow step")
            wait_for(lambda n=stalls: written.exists() and written.read_text().count("doing:") == n)
        dog.beat("in the next step")
        wait_for(lambda: caplog.text.count("moves again") == 2)
    assert ended == []


def test_a_folder_that_cannot_be_written_does_not_keep_a_hung_run(tmp_path, ended, caplog):
    (tmp_path / "file").write_text("")
    with Watchdog(tmp_path / "file" / "stacks", MINUTES):
        wait_for(lambda: ended)
    assert ended == [EXIT_STALLED] and "could not be written" in caplog.text


def test_a_file_system_that_hangs_does_not_keep_a_hung_run(tmp_path, ended):
    os.mkfifo(tmp_path / "rank_00000.txt")  # opening it waits for a reader
    with Watchdog(tmp_path, MINUTES):
        wait_for(lambda: ended, seconds=30.0)
    assert ended == [EXIT_STALLED]
    (tmp_path / "rank_00000.txt").open().close()  # let the writer go


def test_without_minutes_nothing_is_watched(tmp_path):
    with Watchdog(tmp_path, 0.0) as dog:
        dog.beat("anything")
        assert not dog._thread.is_alive()


def test_a_suspended_process_has_not_stalled(tmp_path):
    """SIGSTOP is how Slurm suspends a job."""
    minutes = 0.04
    code = f"""
import sys, time
from pathlib import Path
from types import SimpleNamespace
from rcm_mcore.training.watchdog import Watchdog
with Watchdog(Path({str(tmp_path)!r}), {minutes}) as dog:
    dog.beat("in a step")
    time.sleep(0.5)  # until the watchdog has seen that
    print("ready", flush=True)
    for _ in range(8):  # it goes on for a while after it was stopped
        time.sleep(0.1)
assert "torch" not in sys.modules
"""
    with subprocess.Popen([sys.executable, "-c", code], env=launch.environment(), stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGSTOP)
        time.sleep(60 * minutes * 2)
        child.send_signal(signal.SIGCONT)
        assert child.wait(60) == 0
    assert list(tmp_path.iterdir()) == []


# Two ranks.


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.make_shards(tmp_path_factory.mktemp("guards") / "shards")


@pytest.fixture(scope="module")
def compared(shards):
    """The folder of the runs, and what the ranks saw."""
    folder = shards.parent
    # Of equal ranks on a busy machine one may well take several times as long.
    for name, steps, every, ratio in (("quiet", 13, 6, 30.0), ("slow", 5, 2, 4.0)):
        guard = {"straggler_every": every, "straggler_ratio": ratio}
        tiny.write_config(folder / f"{name}.yaml", tiny.config(shards, folder / name, train={"steps": steps}, guard=guard))
    launch.torchrun(2, launch.HERE / "ranks_guards.py", folder, "compare")
    return folder, json.loads((folder / "results_compare.json").read_text())


def events(folder, kind):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == kind]


def test_a_slow_rank_is_named(compared):
    folder, _ = compared
    found = [(e["step"], e["rank"], e["what"]) for e in events(folder / "slow", "straggler")]
    assert found == [(2, 1, "step"), (4, 1, "step")]
    assert all(e["seconds"] > 4 * e["median"] > 0 and e["host"] for e in events(folder / "slow", "straggler"))
    assert all(e["step_seconds"][1] > 4 * e["step_seconds"][0] for e in events(folder / "slow", "rank_times"))


def test_ranks_that_are_equally_fast_are_not_named(compared):
    folder, _ = compared
    assert events(folder / "quiet", "straggler") == []
    times = events(folder / "quiet", "rank_times")
    assert [e["step"] for e in times] == [6, 12]
    for name in ("step_seconds", "data_seconds", "probe_seconds"):
        assert all(len(e[name]) == 2 and min(e[name]) > 0 for e in times)


def test_the_preflight_of_a_run_is_an_event_and_the_same_on_all_ranks(compared):
    folder, results = compared
    assert results["preflight"][0] == results["preflight"][1]
    (event,) = events(folder / "quiet", "preflight")
    assert {k: v for k, v in event.items() if k not in ("time", "step", "event")} == results["preflight"][0]
    assert event["matmul_tflops"] >= event["matmul_tflops_min"] > 0
    assert event["allreduce_gbps"].keys() == {"dp_cp"} and event["allreduce_gbps"]["dp_cp"] > 0
    kinds = [json.loads(line)["event"] for line in (folder / "quiet" / "events.jsonl").read_text().splitlines()]
    assert kinds[:2] == ["started", "preflight"]


def test_another_configuration_on_one_rank_is_refused_on_both(compared):
    """Before the groups of its mesh: the two would wait for each other."""
    _, results = compared
    one, other = results["other mesh"]
    assert one == other and "the ranks do not run the same" in one
    assert "mesh.tp is 1 on rank 0 (" in one and "train.seed is 0 on rank 0 (" in one and "), 7 on rank 1 (" in one


def test_a_rank_that_computes_wrongly_is_refused_on_both(compared):
    _, results = compared
    one, other = results["broken"]
    assert one == other and re.search(r"wrong on rank 1 \(.*(CPU|GPU-[0-9a-f-]+)\): 1 of (256|2048) rows differ", one)


def test_clocks_that_differ_are_a_warning_and_tensor_parallel_ranks_are_measured(compared):
    _, results = compared
    for warnings, rates in results["skewed"]:
        assert [w.partition(" (")[0] for w in warnings if "its clock is" in w] == ["rank 0", "rank 1"]
        assert rates.keys() == {"tp"} and rates["tp"] > 0


@pytest.fixture(scope="module")
def ended_run(shards):
    """A folder after: rank 1 had other code, and was refused; then it hung."""
    folder = shards.parent
    other = folder / "other" / "rcm_mcore"
    shutil.copytree(Path(rcm_mcore.__file__).parent, other, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "training" / "schedule.py").open("a") as file:
        file.write("# edited on one node\n")
    tree = tiny.config(shards, folder / "stalled", train={"steps": 6}, guard={"stall_minutes": 0.15})
    tiny.write_config(folder / "stalled.yaml", tree)
    return folder, launch.torchrun(2, launch.HERE / "ranks_guards.py", folder, "end", check=False)


def test_other_code_on_one_rank_is_refused_on_both(ended_run):
    folder, _ = ended_run
    (code, one), (code_1, other) = (json.loads((folder / f"refused_{rank}.json").read_text()) for rank in (0, 1))
    assert code == code_1 == 2
    assert other == one.replace("error: ", "error: rank 1: ")
    assert "the ranks do not run the same: rcm_mcore/training/schedule.py is " in one and one.count(" on rank") == 2


def test_a_run_that_hangs_ends(ended_run):
    _, done = ended_run
    assert done.returncode != 0 and f"exitcode  : {EXIT_STALLED}" in done.stderr


def test_a_hang_leaves_the_stacks_of_both_ranks(ended_run):
    folder, _ = ended_run
    waiting, hanging = ((folder / "stalled" / "stacks" / f"rank_0000{rank}.txt").read_text() for rank in (0, 1))
    assert "in stop_here" in hanging and "in hanging_step" in hanging and "doing: in step 3 (pretrain)" in hanging
    assert "in stop_here" not in waiting and "in run_step" in waiting and "doing: in step 3 (pretrain)" in waiting
    assert f"{len(tiny.log_lines(folder / 'stalled'))} steps" == "2 steps"


def test_the_flight_recorder_shows_who_did_not_come(ended_run):
    """As torch's own analyser reads it."""
    from torch.distributed.flight_recorder.components.loader import read_dump

    stacks = ended_run[0] / "stalled" / "stacks"
    recorder = "nccl_trace_rank_" if torch.cuda.is_available() else "gloo_trace_rank_"  # of where the step communicates
    dumps = [read_dump(recorder, str(stacks / f"{recorder}0000{rank}")) for rank in (0, 1)]
    assert [dump["rank"] for dump in dumps] == [0, 1]
    begun = [len(dump["entries"]) for dump in dumps]
    assert begun[0] > begun[1] > 0, "rank 0 began what rank 1 did not"
