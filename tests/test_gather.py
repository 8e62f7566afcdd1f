"""Updated weights that are gathered while other networks compute: the same training, bit for bit, however late they come."""

import pytest
import tiny
import torch
from launch import run_ranks

MESHES = {"dp2": (2, {}), "cp2": (2, {"cp": 2, "cp_mode": "all_to_all"}), "pp2-dp2": (4, {"pp": 2})}
STEPS = ["student", "critic", "critic", "student"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of each mesh, with overlap and without; and what rank 0 did."""
    folder = tmp_path_factory.mktemp("gather")
    tiny.make_shards(folder / "shards")
    teacher = tiny.config(folder / "shards", "")
    tiny.train_all(folder, {(1, "teacher"): teacher})
    events = {}
    for world in (2, 4):
        paths = []
        for mesh, (size, sections) in MESHES.items():
            for overlap in (False, True) if size == world else ():
                name = f"{mesh}-{'overlap' if overlap else 'plain'}"
                tree = tiny.config(
                    folder / "shards", folder / name, "distill", mesh=sections, train={"steps": len(STEPS)},
                    distill={"teacher": str(folder / "teacher"), "student_every": 3, "rollout_max_steps": 2},
                    optim={"overlap_param_gather": overlap, "ema_length": 0.1}, checkpoint={"every": 2, "keep_last": 9},
                )  # fmt: skip
                paths.append(str(tiny.write_config(folder / f"{name}.yaml", tree)))
        (folder / f"world_{world}.txt").write_text("\n".join(paths))
        events |= run_ranks(world, "ranks_gather.py", folder)
    return folder, events


@pytest.mark.parametrize("mesh", MESHES)
def test_the_training_is_the_same(runs, mesh):
    folder, _ = runs
    one, other = folder / f"{mesh}-overlap", folder / f"{mesh}-plain"
    assert [line["phase"] for line in tiny.log_lines(one)] == STEPS
    for step in (2, 4):
        a, b = (tiny.all_tensors(run / f"step_{step:09d}") for run in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("mesh", MESHES)
def test_an_update_gathers_once_and_other_networks_need_not_wait(runs, mesh):
    _, events = runs
    for name in ("plain", "overlap"):
        of_run = events[f"{mesh}-{name}"]
        (buffers,) = set(of_run["buffers"].values())
        starts, waits, beside = 0, 0, 0
        for event in of_run["events"]:
            starts, waits = starts + (event == "start"), waits + (event == "wait")
            beside += event == "forward" and starts > waits
        assert starts == waits == buffers * len(STEPS)
        assert (beside > 0) == (name == "overlap")
