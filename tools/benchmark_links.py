"""Time what a ring of GPUs is made of: `torchrun --nproc-per-node 2 tools/benchmark_links.py`.

Prints the rate of messages to the next GPU by NCCL and by copy engines through shared memory, how long a kernel of attention
takes beside each, and the kernels of one rank of larger rings on one GPU.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from rcm_kernels import Partial, flash_attention_jvp, merge

MIB = 1 << 20


def seconds(run: Callable[[], object], repeats: int = 9) -> float:
    """Median time of a call."""
    run()
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def links(rank: int, size: int) -> None:
    """Messages to the next rank."""
    import torch.distributed._symmetric_memory as symmetric

    count = 256 * MIB
    leaving, coming = (torch.zeros(count, dtype=torch.uint8, device="cuda") for _ in range(2))
    shared = symmetric.empty(count, dtype=torch.uint8, device=leaving.device)
    handle = symmetric.rendezvous(shared, dist.group.WORLD)
    to, from_ = (rank + 1) % size, (rank - 1) % size

    def nccl(n: int) -> list[dist.Work]:
        operations = [dist.P2POp(dist.isend, leaving[:n], to), dist.P2POp(dist.irecv, coming[:n], from_)]
        return dist.batch_isend_irecv(operations)

    def engine(n: int) -> None:
        coming[:n].copy_(handle.get_buffer(from_, (n,), torch.uint8))

    def both(n: int) -> None:
        for work in nccl(n):
            work.wait()

    for n in (32 * MIB, 128 * MIB, 256 * MIB):
        rates = [n / seconds(lambda run=run, n=n: run(n)) / 1e9 for run in (both, engine)]
        say(f"{n // MIB} MiB: NCCL {rates[0]:.0f} GB/s, copy engine {rates[1]:.0f} GB/s")

    x = [torch.randn(1, 8192, 20, 128, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
    side = torch.cuda.Stream()

    def beside_nccl() -> None:
        works = nccl(160 * MIB)
        flash_attention_jvp(*x)
        for work in works:
            work.wait()

    def beside_engine() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            engine(160 * MIB)
        flash_attention_jvp(*x)
        torch.cuda.current_stream().wait_stream(side)

    alone, slowed, beside = (seconds(run) for run in (lambda: flash_attention_jvp(*x), beside_nccl, beside_engine))
    say(f"a kernel of {1e3 * alone:.2f} ms beside 160 MiB: NCCL {1e3 * slowed:.2f}, copy engine {1e3 * beside:.2f} ms")


def one_rank() -> None:
    """The kernels of one rank of a ring on as many blocks as would come, against one GPU with all tokens."""
    for tokens in (32760, 75600):
        whole = [torch.randn(1, tokens, 40, 128, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
        alone = seconds(lambda whole=whole: flash_attention_jvp(*whole), 3)
        for size in (4, 8, 16):
            x = [y[:, : -(-tokens // size)].contiguous() for y in whole]
            part = lambda x=x: Partial(*flash_attention_jvp(*x, wide_out=True))
            parts = [part() for _ in range(size)]
            merging = seconds(lambda parts=parts: merge(parts, torch.bfloat16), 3)
            del parts
            all_of_it = lambda part=part, size=size: merge([part() for _ in range(size)], torch.bfloat16)
            time = seconds(all_of_it, 3)
            say(
                f"{tokens} tokens, {size} ranks: {1e3 * time:.2f} ms of kernels ({alone / size / time:.2f} of one GPU's rate), "
                f"of which merging {1e3 * merging:.2f}"
            )


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> None:
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    links(dist.get_rank(), dist.get_world_size())
    one_rank()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
