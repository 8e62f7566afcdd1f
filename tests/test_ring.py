"""Attention round a ring of ranks, for duals and for tensors with their gradients (the ranks run ranks_ring.py)."""

import socket
import subprocess
import sys

import pytest
from launch import HERE, environment, run_ranks
from ranks_ring import LENGTHS, WAYS

from rcm_mcore.parallel.ring import tokens_of_rank

NAMES = ("out", "out_dot", "lse", "lse_dot", "forward", "forward lse", "dq", "dk", "dv", "gradient of padding", "dtypes")


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request, tmp_path_factory):
    return run_ranks(request.param, "ranks_ring.py", tmp_path_factory.mktemp("ring"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("way", WAYS)
def test_equals_one_rank(results, way, tokens, name):
    assert results[f"{way} {tokens} torch.float64"]["ring"][name] <= 1e-12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_within_the_budget(results, way, tokens, name):
    """At most twice the error of plain PyTorch on one rank, although every block's share is rounded once more."""
    errors = results[f"{way} {tokens} torch.bfloat16"]
    assert errors["ring"][name] <= 2 * errors["plain"].get(name, 0) + 1e-6


@pytest.mark.parametrize("name", NAMES[:4])
def test_blocks_whose_lse_dot_differ_lose_no_digits(results, name):
    """Parts of out in 16 bits would make out_dot ten times worse than on one rank, and worse than plain PyTorch."""
    errors = results["drifting"]
    assert errors["ring"][name] <= errors["plain"][name]


@pytest.mark.parametrize("tokens", [1, 2, 31200, 32760, 75600, 84480])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
def test_blocks_hold_every_token_once(tokens, size):
    counts = [tokens_of_rank(tokens, rank, -(-tokens // size)) for rank in range(size)]
    assert sum(counts) == tokens and counts == sorted(counts, reverse=True)
    assert all(count == counts[0] for count in counts[: tokens // counts[0]])


@pytest.mark.parametrize("gpus", [0, pytest.param(2, marks=pytest.mark.gpu2)])
@pytest.mark.parametrize("end", ["SIGKILL", "SIGSTOP"])
def test_a_lost_rank_is_an_error_within_the_timeout(end, gpus):
    """The ranks are started by hand: torchrun would end the survivor itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    if not gpus:
        common["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(HERE / "ranks_lost.py"), end]
    start = lambda rank: subprocess.Popen(
        command, env=environment(**common, RANK=str(rank), LOCAL_RANK=str(rank)), stderr=subprocess.PIPE, text=True
    )
    survivor, lost = start(0), start(1)
    try:
        _, message = survivor.communicate(timeout=60)  # the timeout of its mesh is 6 s; the rest is starting up
        assert survivor.returncode not in (0, None)
        wanted = ("closed by peer", "imed out", "onnection reset", "timeout", "launch failure")
        assert any(words in message for words in wanted), message[-2000:]
    finally:
        for process in (survivor, lost):
            process.kill()
            process.communicate()
