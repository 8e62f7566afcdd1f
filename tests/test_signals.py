"""A signal to one rank: all ranks save the step at hand and stop, and started again the run is what it would have been."""

import json
import signal

import launch
import pytest
import tiny

from rcm_mcore.training.signals import listening

STOPPED = {  # signal, rank, when, checkpoint.every -> step it stops after
    "step": ["SIGUSR1", 1, "step", 9, 3],
    "step_saved": ["SIGTERM", 1, "step", 3, 3],
    "save": ["SIGTERM", 0, "save", 2, 2],
    "start": ["SIGUSR1", 1, "start", 9, 0],
    "last": ["SIGUSR1", 0, "last", 9, 6],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where the runs are, and what each rank saw: undisturbed, stopped, and stopped ones to their end."""
    folder = tmp_path_factory.mktemp("signals")
    tiny.make_shards(folder / "shards")

    def config(name, every):
        tree = tiny.config(
            folder / "shards", folder / name, train={"steps": 6}, checkpoint={"every": every, "keep_last": 9},
            optim={"warmup_steps": 4, "warmup_start_lr": 1e-3},
        )  # fmt: skip
        return str(tiny.write_config(folder / f"{name}.yaml", tree))

    plan = {"undisturbed": [config("undisturbed", 9), "SIGUSR1", None, "never"]}
    for name, (number, rank, when, every, _) in STOPPED.items():
        plan[name] = [config(name, every), number, rank, when]
        plan[f"{name} again"] = [config(name, every), number, None, "never"]
    (folder / "plan.json").write_text(json.dumps(list(plan.values())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MKL_CBWR", "COMPATIBLE")  # or its results depend on where in memory operands lie
        results = launch.run_ranks(2, "ranks_signal.py", folder)
    return folder, dict(zip(plan, results, strict=True))


@pytest.mark.parametrize("name", STOPPED)
def test_every_rank_saves_the_same_step_and_stops(runs, name):
    _, results = runs
    step = STOPPED[name][-1]
    (here, files), (there, _) = results[name]
    assert here == there == step
    assert [f for f in files if f.startswith(("step", ".partial", ".removed"))] == ([f"step_{step:09d}"] if step else [])


@pytest.mark.parametrize("name", STOPPED)
def test_started_again_equals_undisturbed(runs, name):
    folder, results = runs
    assert results[f"{name} again"][0][0] == 6
    assert set(tiny.differences(folder / name / "step_000000006", folder / "undisturbed" / "step_000000006").values()) == {0.0}
    assert [line["step"] for line in tiny.log_lines(folder / name)] == [1, 2, 3, 4, 5, 6]
    losses = ([line["loss"] for line in tiny.log_lines(folder / run)] for run in (name, "undisturbed"))
    assert next(losses) == next(losses)


def test_listening_notes_signals_and_gives_the_handlers_back():
    former = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    for number in former:
        with listening() as stop:
            assert stop.received == 0
            signal.raise_signal(number)
            assert stop.received == number
    assert {number: signal.getsignal(number) for number in former} == former
