"""Time the attention functions on one GPU beside a matmul: `python tests/bench_attention.py` prints a Markdown table.

Refuses to report when the tangent is wrong at a small size. FLOPs: 4 B N S^2 D forward, 10 backward, 12 with tangents.
"""

import torch
from rcm_kernels import flash_attention, flash_attention_backward, flash_attention_jvp
from rcm_kernels.reference import attention_jvp

SHAPE = (1, 32760, 12, 128)  # Wan2.1 1.3B, 480p, 81 frames


def seconds(fn, repeats=3):
    fn()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def main():
    small = [torch.randn(1, 300, 2, 128, device="cuda", dtype=torch.float64) for _ in range(6)]
    got = flash_attention_jvp(*(x.bfloat16() for x in small))[1].double()
    want = attention_jvp(small[:3], small[3:])[1]
    error = float((got - want).norm() / want.norm())
    assert error < 0.02, f"the tangent is wrong: {error}"
    q, k, v, q_dot, k_dot, v_dot = (torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(6))
    out, lse = flash_attention(q, k, v)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    batch, tokens, heads, width = SHAPE
    unit = batch * heads * tokens**2 * width
    rows = {
        "matmul 8192^3": (seconds(lambda: a @ b, 10), 2 * 8192**3),
        "forward": (seconds(lambda: flash_attention(q, k, v)), 4 * unit),
        "backward": (seconds(lambda: flash_attention_backward(q_dot, q, k, v, out, lse)), 10 * unit),
        "forward with tangents": (seconds(lambda: flash_attention_jvp(q, k, v, q_dot, k_dot, v_dot)), 12 * unit),
        "forward, tangent of q alone": (seconds(lambda: flash_attention_jvp(q, k, v, q_dot)), 8 * unit),
    }
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{machine}, bfloat16, [B, S, N, D] = {list(SHAPE)}, error {error:.1e}\n")
    print("| what | ms | TFLOP/s |\n|---|---:|---:|")
    for name, (time, flops) in rows.items():
        print(f"| {name} | {1e3 * time:.1f} | {flops / time / 1e12:.0f} |")


if __name__ == "__main__":
    main()
