"""On every rank: attention round the ring of all ranks against one rank on the whole sequence (test_ring.py)."""

import json
import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from attention_oracle import draw, exact_gradients, exact_jvp, plain_gradients
from rcm_kernels import reference

from rcm_mcore.parallel import ring
from rcm_mcore.parallel.mesh import init_distributed
from rcm_mcore.parallel.ring import ring_attention, ring_attention_jvp, tokens_of_rank
from rcm_mcore.parallel.shared_memory import Peers, _fill

LENGTHS = (24, 21, 3, 1)  # of the whole sequence: dividing, not dividing, fewer than four ranks, one


class Shown:
    """In the place of memory shared between GPUs: everybody gets a copy."""

    def __init__(self, group):
        self.group = group

    def show(self, shape, dtype, tensors):
        mine = torch.full(shape, torch.nan, dtype=dtype)
        _fill(mine, tensors)
        everyone = [torch.empty_like(mine) for _ in range(self.group.size())]
        dist.all_gather(everyone, mine, group=self.group)
        return mine, everyone.__getitem__


class CopyingPeers(Peers):
    """Ranks of a CPU that see each other's tensors."""

    def __init__(self, group):
        self.group, self.device, self.stream = group, torch.device("cpu"), torch.cuda.Stream()
        self.blocks_shown, self.parts_shown = Shown(group), Shown(group)


WAYS = {"passed on": lambda group, device: None, "shared": lambda group, device: CopyingPeers(group)}


def shard(x, rank, size):
    """This rank's tokens of [B, S, N, D], the sequence padded with numbers that must not matter."""
    block = -(-x.shape[1] // size)
    padded = torch.cat((x, torch.full_like(x[:, :1], 1e3).expand(-1, block * size - x.shape[1], -1, -1)), dim=1)
    return padded[:, rank * block : (rank + 1) * block].contiguous()


def over_ranks(squares):
    """Root mean squares over the tokens of all ranks, from (sum, count) of each."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, squares)
    totals = {name: [sum(parts) for parts in zip(*(one[name] for one in gathered))] for name in squares}
    return {name: (total / max(count, 1)) ** 0.5 for name, (total, count) in totals.items()}


def case(tokens, dtype, drifting=False):
    """Errors of the ring, and of plain PyTorch on one rank, in this dtype against float64.

    drifting: blocks differ in lse_dot and values have a mean, so that rounding the parts of out would cost digits.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD if size > 1 else None
    q, k, v, q_dot, k_dot, v_dot, dout = (x.to(dtype) for x in draw(tokens, 7, seed=5))
    if drifting:
        q, v, k_dot = q + 1, v + 4, (k_dot + torch.linspace(-4, 4, tokens).view(1, -1, 1, 1)).to(dtype)
    primals, tangents = (q, k, v), (q_dot, k_dot, v_dot)
    on_rank = lambda xs: tuple(shard(x, rank, size) for x in xs)
    count = tokens_of_rank(tokens, rank, -(-tokens // size))

    results = ring_attention_jvp(on_rank(primals), on_rank(tangents), tokens=tokens, group=group, scale=0.4)
    leaves = [x.requires_grad_() for x in on_rank(primals)]
    out, lse = ring_attention(*leaves, tokens=tokens, group=group, scale=0.4)
    weights = shard(dout, rank, size)
    weights[:, count:] = 0  # no loss looks at padding
    grads = torch.autograd.grad(out, leaves, weights)

    as_tokens = lambda x: x if x.dim() == 4 else x.transpose(1, 2).unsqueeze(-1)
    exact, gradients = exact_jvp(primals, tangents, 0.4), exact_gradients(dout, primals, 0.4)
    plain = reference.attention_jvp(primals, tangents, scale=0.4)
    plain_grads = plain_gradients(dout, primals, 0.4)
    names = ("out", "out_dot", "lse", "lse_dot", "forward", "forward lse", "dq", "dk", "dv")
    wanted = (*exact, exact[0], exact[2], *gradients)
    mine, theirs = {}, {}
    for name, got, other, want in zip(
        names, (*results, out.detach(), lse, *grads), (*plain, plain[0], plain[2], *plain_grads), wanted, strict=True
    ):
        want, other = as_tokens(want), as_tokens(other).double()
        here = want[:, rank * -(-tokens // size) :][:, :count]
        mine[name] = float((as_tokens(got)[:, :count].double() - here).square().sum()), here.numel()
        theirs[name] = float((other - want).square().sum()), want.numel()
    padding = sum(float(x[:, count:].abs().sum()) for x in grads)
    mine["gradient of padding"] = padding, 1
    mine["dtypes"] = float({x.dtype for x in (*results[:2], out, *grads)} != {dtype}), 1
    return {"ring": over_ranks(mine), "plain": over_ranks(theirs)}


def main(folder):
    init_distributed()
    results = {}
    for way, tokens, dtype in product(WAYS, LENGTHS, (torch.float64, torch.bfloat16)):
        ring.peers_of = WAYS[way]
        results[f"{way} {tokens} {dtype}"] = case(tokens, dtype)
    results["drifting"] = case(500, torch.bfloat16, drifting=True)
    if dist.get_rank() == 0:
        (folder / f"results_{dist.get_world_size()}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
