"""Time attention on one GPU beside a matmul and others' attention: `python kernels/benchmarks/attention.py [--out DIR]`.

Prints Markdown tables and writes them to DIR/attention.md with the figures in DIR/attention.json. Every row is preceded by a
check against float64 on a few hundred tokens of the same width; a row that fails it is not timed, and the exit
status is 1. A time is the median of several, between CUDA events, after a warm-up; TFLOP/s count 4 B N Sq Skv D for a forward,
10 for a backward and 12 with tangents (8 with that of q alone). The share is that of an 8192^3 matmul timed right before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from rcm_kernels import flash_attention, flash_attention_backward, flash_attention_jvp, reference, use_backends
from rcm_kernels.backends import backends, choices
from torch import Tensor
from torch.autograd import forward_ad

WAN = [(8192, 5, 128), (8192, 12, 128), (16384, 12, 128), (32760, 5, 128), (32760, 12, 128), (32760, 40, 128), (75600, 12, 128)]
COSMOS = [(8192, 16, 128), (8192, 32, 64), (32760, 12, 64)]
TEXT = 512  # keys of the cross-attention to text
TOLERANCE = 8e-3  # of bfloat16, relative, in the 2-norm: about two roundings


def seconds(run: Callable[[], object], repeats: int = 5, inner: int = 1) -> float:
    """Median time of one call, of `repeats` series of `inner` calls."""
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats):
        start.record()
        for _ in range(inner):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / inner)
    return sorted(times)[repeats // 2]


def matmul_rate() -> float:
    """FLOP/s of an 8192^3 bfloat16 matmul of random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b, 20)


def normal(tokens: int, heads: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[1, tokens, heads, width]."""
    return torch.randn(1, tokens, heads, width, device="cuda", dtype=dtype)


def public_jvp() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """jvp-flash-attention from the package index, if it is installed: out and out_dot of [B, S, N, D] tensors."""
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn
    except ImportError:
        return None

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        heads_first = [x.transpose(1, 2).contiguous() for x in tensors]
        with torch.no_grad(), forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, x_dot) for x, x_dot in zip(heads_first[:3], heads_first[3:])]
            out, out_dot = forward_ad.unpack_dual(JVPAttn.fwd_dual(*duals))
        assert out_dot is not None, "tangents went in"
        return out.transpose(1, 2), out_dot.transpose(1, 2)

    return run


class Bench:
    """Collects rows; and those that could not be timed."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.failed: list[str] = []

    def add(self, what: str, run: Callable[[], object], *, shape: str, flops: float, error: float, inner: int = 1) -> None:
        """Time `run` unless its error is too large."""
        if not error <= TOLERANCE:
            self.failed.append(f"{what}, {shape}: error {error:.1e}")
            return
        matmul = matmul_rate()
        try:
            time_ = seconds(run, inner=inner)
        except RuntimeError as problem:
            self.failed.append(f"{what}, {shape}: {problem}")
            return
        row = {"what": what, "shape": shape, "ms": 1e3 * time_, "tflops": flops / time_ / 1e12}
        self.rows.append(row | {"share": flops / time_ / matmul, "matmul": matmul / 1e12, "error": error})
        print(f"{what}: {shape}: {1e3 * time_:.3f} ms, {row['tflops']:.0f} TFLOP/s", file=sys.stderr, flush=True)

    def table(self) -> str:
        """All rows in Markdown."""
        lines = ["| what | shape | ms | TFLOP/s | share of matmul | error |", "|---|---|---:|---:|---:|---:|"]
        for r in self.rows:
            lines.append(
                f"| {r['what']} | {r['shape']} | {r['ms']:.3g} | {r['tflops']:.0f} | {r['share']:.2f} of {r['matmul']:.0f} "
                f"| {r['error']:.1e} |"
            )
        return "\n".join(lines)


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest 2-norm error of several results. NaN stays NaN."""
    errors = [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]
    return float("nan") if any(e != e for e in errors) else max(errors)


def error_of_jvp(
    run: Callable[..., tuple[Tensor, ...]], width: int, *, given: str = "qkv", lengths: tuple[int, int] = (300, 420)
) -> float:
    """Of out and out_dot, for these numbers of queries and keys."""
    small = [normal(n, 2, width) for n in (lengths[0], lengths[1], lengths[1]) * 2]
    tangents = [x if name in given else None for name, x in zip("qkv", small[3:])]
    exact = [None if x is None else x.double() for x in (*small[:3], *tangents)]
    got = run(*small[:3], *tangents)
    return relative_error(list(got[:2]), list(reference.attention_jvp(exact[:3], exact[3:])[:2]))


def error_of_forward(width: int) -> float:
    q, k, v = (normal(n, 2, width) for n in (300, 420, 420))
    return relative_error([flash_attention(q, k, v)[0]], [reference.attention(q.double(), k.double(), v.double())[0]])


def error_of_backward(width: int) -> float:
    q, k, v, dout = (normal(n, 2, width) for n in (300, 420, 420, 300))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(reference.attention(*leaves)[0], leaves, dout.double())
    out, lse = flash_attention(q, k, v)
    return relative_error(list(flash_attention_backward(dout, q, k, v, out, lse)), list(exact))


def tangents(bench: Bench, shapes: list[tuple[int, int, int]], names: tuple[str, ...]) -> None:
    """Forward with tangents by each backend named."""
    for tokens, heads, width in shapes:
        x = [normal(tokens, heads, width) for _ in range(6)]
        for name in names:
            use_backends(jvp=name)
            error = error_of_jvp(flash_attention_jvp, width)
            shape = f"S {tokens} N {heads} D {width}"
            flops = 12 * heads * tokens**2 * width
            run = partial(flash_attention_jvp, *x)
            bench.add(f"with tangents: {name}", run, shape=shape, flops=flops, error=error)
    use_backends(jvp="auto")


def cross_attention(bench: Bench, widths: tuple[int, ...]) -> None:
    """Onto a text without tangents, by its own kernel and by the general one."""
    for width in widths:
        q, q_dot = normal(32760, 12, width), normal(32760, 12, width)
        k, v = normal(TEXT, 12, width), normal(TEXT, 12, width)
        zeros = torch.zeros_like(k)
        shape = f"S 32760 onto {TEXT} N 12 D {width}"
        flops = 8 * 12 * 32760 * TEXT * width
        runs = {
            "cross, tangent of q alone": ("q", partial(flash_attention_jvp, q, k, v, q_dot)),
            "cross, all tangents": ("qkv", partial(flash_attention_jvp, q, k, v, q_dot, zeros, zeros)),
        }
        for what, (given, run) in runs.items():
            error = error_of_jvp(flash_attention_jvp, width, given=given)
            bench.add(what, run, shape=shape, flops=flops * (1 if given == "q" else 1.5), error=error, inner=50)


def primal(bench: Bench, shapes: list[tuple[int, int, int]]) -> None:
    """Forward and backward by every backend that is there."""
    for tokens, heads, width in shapes:
        q, k, v, dout = (normal(tokens, heads, width) for _ in range(4))
        shape, unit = f"S {tokens} N {heads} D {width}", heads * tokens**2 * width
        here = backends(width=width)
        for name in [n for n in choices("forward") if here["forward"][n] in ("used", "available") and n != "blockwise"]:
            use_backends(forward=name)
            run = partial(flash_attention, q, k, v)
            bench.add(f"forward: {name}", run, shape=shape, flops=4 * unit, error=error_of_forward(width))
        use_backends(forward="auto")
        out, lse = flash_attention(q, k, v)
        for name in [n for n in choices("backward") if here["backward"][n] in ("used", "available")]:
            use_backends(backward=name)
            run = partial(flash_attention_backward, dout, q, k, v, out, lse)
            bench.add(f"backward: {name}", run, shape=shape, flops=10 * unit, error=error_of_backward(width))
        use_backends(backward="auto")


def cold_start() -> str:
    """Seconds of the first call of a process, compiling included, and of the first call at another length."""
    times = []
    for tokens in (4096, 4097):
        x = [normal(tokens, 2, 128) for _ in range(6)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        flash_attention_jvp(*x)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return f"first call {times[0]:.2f} s with compiling, at another length {1e3 * times[1]:.2f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for attention.md and attention.json")
    parser.add_argument("--quick", action="store_true", help="one shape of each kind")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    cold = cold_start()
    for _ in range(10):  # warm, as in training: a cold GPU clocks higher
        matmul_rate()
    bench = Bench()
    ours = [name for name, state in backends()["jvp"].items() if state in ("used", "available") and name != "blockwise"]
    tangents(bench, WAN[4:5] if args.quick else WAN, tuple(ours[:1]))
    tangents(bench, COSMOS[-1:] if args.quick else COSMOS, tuple(ours[:1]))
    tangents(bench, [(8192, 12, 128), (8192, 12, 64)], tuple(ours[1:]))
    public = public_jvp()
    if public is not None:  # it takes equal lengths only
        x = [normal(8192, 12, 128) for _ in range(6)]
        error, flops = error_of_jvp(public, 128, lengths=(512, 512)), 12 * 12 * 8192**2 * 128
        what = "with tangents: jvp-flash-attention (PyPI)"
        bench.add(what, partial(public, *x), shape="S 8192 N 12 D 128", flops=flops, error=error)
    cross_attention(bench, (128,) if args.quick else (128, 64))
    primal(bench, [(32760, 12, 128)] if args.quick else [(32760, 12, 128), (32760, 12, 64)])
    head = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN "
    head += f"{torch.backends.cudnn.version()}, triton {version('triton')}, bfloat16, batch 1; {cold}."
    text = f"{head}\n\n{bench.table()}\n" + "".join(f"\nFAILED: {line}" for line in bench.failed)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "attention.md").write_text(text + "\n")
        (args.out / "attention.json").write_text(json.dumps(bench.rows, indent=1))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
