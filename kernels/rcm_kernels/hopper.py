"""Attention on Hopper (compute capability 9.0): compiles hopper.cu when it is first needed, and launches it.

The compiler (NVRTC) and the driver are reached through cuda-bindings; torch's CUDA builds since 2.11 bring both. One kernel
takes about half a second to compile, once a process for each (dtype, head width, tangents given).
"""

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcm_kernels.blockwise import empty_results

WIDTHS = (64, 128)
# (head width, with tangents) -> keys in a tile and warpgroups of 64 queries, for long and for short sets of keys;
# docs/benchmarks/attention_h200_202611.md compares.
TILES = {
    (128, True): ((64, 2), (64, 2)),
    (64, True): ((96, 2), (48, 3)),
    (128, False): ((80, 3), (128, 2)),
    (64, False): ((128, 3), (128, 3)),
}
SHORT = 1024  # keys
# How far (in powers of two) a score may rise above the running maximum before the accumulators are rescaled. P is then up to
# 2**MAX_RISE and H that times S_dot, which float16 must hold.
MAX_RISE = {torch.bfloat16: 8, torch.float16: 4}
SHARED_MEMORY = 232448  # bytes a block may use on compute capability 9.0
MAX_STAGES = 4


def unfit(q: Tensor, *others: Tensor | None) -> str | None:
    """Why this backend cannot take these tensors [B, S, N, D]; None if it can."""
    if not q.is_cuda or _capability(q.device) != (9, 0):
        return "it needs a Hopper GPU (compute capability 9.0)"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "it needs the package cuda-bindings"
    if q.dtype not in MAX_RISE:
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[3] not in WIDTHS:
        return f"it takes head widths {WIDTHS}, not {q.shape[3]}"
    for x in (q, *others):
        if x is not None and not _tma_can_read(x):
            return f"TMA reads tensors whose address and strides are multiples of 16 bytes; one has strides {x.stride()}"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    wide_out: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """As `blockwise.forward`, for tensors that are not `unfit`."""
    q_dot, k_dot, v_dot = tangents
    results = empty_results(q, with_tangent=q_dot is not None, wide_out=wide_out)
    given = q_dot is not None, k_dot is not None, v_dot is not None
    variant = _Variant(q.dtype, q.shape[3], given, k.shape[1] <= SHORT, wide_out)
    with torch.cuda.device(q.device):  # gives the current device back, whatever the driver's calls make current
        kernel = _kernel(variant, q.device)
        kernel.launch((q, k, v, q_dot, k_dot, v_dot), results, scale)
    return results


@dataclass(frozen=True)
class _Variant:
    """What a kernel is compiled for."""

    dtype: torch.dtype
    width: int
    tangents: tuple[bool, bool, bool]  # of q, k, v
    short: bool  # few keys
    wide_out: bool = False  # out in float32

    @property
    def tile(self) -> tuple[int, int]:
        """Keys in a tile, and warpgroups of 64 queries."""
        return TILES[self.width, self.tangents[0]][self.short]

    @property
    def query_buffers(self) -> int:
        """Two, through which results leave too, where keys and values have no tangents and so leave room."""
        return 2 if self.tangents == (True, False, False) else 1

    def shared_memory(self) -> tuple[int, int, int]:
        """Stages of the ring of tiles, buffers for a tile's results, and the bytes of dynamic shared memory all takes."""
        keys, groups = self.tile
        row, of_q, of_k, of_v = 2 * self.width, *self.tangents
        stage = keys * row * (2 + of_k + of_v)
        alignment = static = 1024  # the latter for barriers
        for buffers in (1 + of_q, 1):
            apart = buffers if self.query_buffers == 1 else 0
            fixed = alignment + 64 * groups * row * ((1 + of_q) * self.query_buffers + apart)
            stages = min(MAX_STAGES, (SHARED_MEMORY - static - fixed) // stage)
            if stages >= 3:
                break
        assert stages >= 2 and keys % 16 == 0, f"{stages} stages of {keys} keys: the table of tiles is wrong"
        return stages, buffers, fixed + stages * stage

    def source(self) -> str:
        """hopper.cu for this variant."""
        keys, groups = self.tile
        of_q, of_k, of_v = map(int, self.tangents)
        stages, buffers, _ = self.shared_memory()
        kind = "bf16" if self.dtype == torch.bfloat16 else "f16"
        constants = {"D": self.width, "BN": keys, "GROUPS": groups, "STAGES": stages, "BUFFERS": buffers}
        constants |= {"QUERY_BUFFERS": self.query_buffers, "WIDE_OUT": int(self.wide_out)}
        constants |= {"TANGENT": of_q, "K_TANGENT": of_k, "V_TANGENT": of_v, "BF16": int(kind == "bf16")}
        names = {"WGMMA_SS": f"wgmma_ss_{keys}", "WGMMA_RS": f"wgmma_rs_{self.width}"}
        names |= {"MAX_RISE": f"{MAX_RISE[self.dtype]}.0f", "INFINITY": "__int_as_float(0x7f800000)"}
        types = {"u32": "unsigned int", "u64": "unsigned long long", "i64": "long long"}
        lines = [f"typedef {meaning} {name};" for name, meaning in types.items()]
        lines += [f"#define {name} {value}" for name, value in (constants | names).items()]
        lines += [_wgmma(keys, kind, a_in_registers=False), _wgmma(self.width, kind, a_in_registers=True)]
        return "\n".join(lines) + "\n" + Path(__file__).with_name("hopper.cu").read_text()


class _Kernel:
    """One compiled variant, loaded on one device."""

    def __init__(self, variant: _Variant, device: torch.device) -> None:
        from cuda.bindings import driver

        self.driver = driver
        self.keys, groups = variant.tile
        self.queries, self.threads = 64 * groups, 128 * (groups + 1)
        self.memory = variant.shared_memory()[-1]
        self.blocks = torch.cuda.get_device_properties(device).multi_processor_count
        code = _compile(variant.source())
        _make_current(device)
        self.function = _checked(driver.cuModuleGetFunction(_checked(driver.cuModuleLoadData(code)), b"attention"))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self.function, attribute, self.memory))

    def launch(self, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...], scale: float) -> None:
        """Fills `outputs` (out, out_dot, lse, lse_dot) from `inputs` (q, k, v and their tangents) on the current stream."""
        (q, k), (out, out_dot, lse, lse_dot) = inputs[:2], outputs
        assert q is not None and k is not None and lse is not None, "these are always there"
        # A map that the kernel does not use must still be one: q's.
        rows = (64, self.keys, self.keys) * 2 + (64, 64)
        wide = out is not None and out.dtype != q.dtype  # the kernel then writes it without a map
        mapped = (*inputs, None if wide else out, out_dot)
        maps = [_tensor_map(q if x is None else x, n) for x, n in zip(mapped, rows, strict=True)]
        works = q.shape[0] * q.shape[2] * -(-q.shape[1] // self.queries)
        pointers = (lse.data_ptr(), 0 if lse_dot is None else lse_dot.data_ptr())
        unmapped = (out.data_ptr(), *out.stride()[:3]) if wide and out is not None else (0, 0, 0, 0)
        values = (*maps, *pointers, q.shape[1], k.shape[1], q.shape[2], works, scale, *unmapped)
        _make_current(q.device)
        stream = torch.cuda.current_stream(q.device).cuda_stream
        grid = (min(works, self.blocks), 1, 1, self.threads, 1, 1)
        _checked(self.driver.cuLaunchKernel(self.function, *grid, self.memory, stream, (values, _ARGUMENT_TYPES), 0))


_ARGUMENT_TYPES = (
    *(None,) * 8,  # tensor maps of q, k, v, their tangents, out, out_dot
    *(ctypes.c_void_p,) * 2,  # lse, lse_dot
    *(ctypes.c_int,) * 4,  # queries, keys, heads, works
    ctypes.c_float,  # scale
    ctypes.c_void_p,  # out in float32, and its strides
    *(ctypes.c_longlong,) * 3,
)


@functools.cache
def _kernel(variant: _Variant, device: torch.device) -> _Kernel:
    return _Kernel(variant, device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _tma_can_read(x: Tensor) -> bool:
    strides = [stride for stride, size in zip(x.stride()[:3], x.shape) if size > 1]
    return x.data_ptr() % 16 == 0 and all(s >= 0 and s * x.element_size() % 16 == 0 for s in strides)


def _wgmma(columns: int, kind: str, *, a_in_registers: bool) -> str:
    """A device function d = a b (+ d if `add`) for wgmma.m64n<columns>k16, accumulating in float32.

    From registers, b's columns are contiguous in memory (values); from shared memory, its rows are (keys).
    """
    count = columns // 2
    results = ", ".join(f"%{i}" for i in range(count))
    parts = [f"%{count + i}" for i in range(4 if a_in_registers else 1)]
    a = "{" + ", ".join(parts) + "}" if a_in_registers else parts[0]
    b, add = count + len(parts), count + len(parts) + 1
    parameters = "u32 a0, u32 a1, u32 a2, u32 a3" if a_in_registers else "u64 a"
    constraints = '"r"(a0), "r"(a1), "r"(a2), "r"(a3)' if a_in_registers else '"l"(a)'
    transposed = "1" if a_in_registers else "0, 0"
    operation = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"
    in_out = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    name = f"wgmma_{'rs' if a_in_registers else 'ss'}_{columns}"
    return f"""__device__ __forceinline__ void {name}(float (&d)[{count}], {parameters}, u64 b, bool add) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{add}, 0;\\n"
    "{operation} {{{results}}}, {a}, %{b}, p, 1, 1, {transposed};\\n}}"
    : {in_out} : {constraints}, "l"(b), "r"((int)add));
}}"""


def _compile(source: str) -> bytes:
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"hopper.cu", 0, [], []))
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17", b"-default-device"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC could not compile hopper.cu ({status}):\n{log.decode(errors='replace')}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def _tensor_map(x: Tensor, rows: int) -> Any:
    return _encoded_map(x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, rows)


@functools.lru_cache(maxsize=4096)  # the allocator hands out the same addresses again and again
def _encoded_map(address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, rows: int) -> Any:
    """The TMA descriptor of a [B, S, N, D] tensor, read in boxes of `rows` tokens by 64 columns."""
    from cuda.bindings import driver

    batch, tokens, heads, width = shape
    types = driver.CUtensorMapDataType
    bf16, f16 = types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    # The stride of a dimension of one element means nothing and may be anything; the descriptor wants a multiple of 16.
    steps = [strides[i] * 2 if shape[i] > 1 else 16 for i in (1, 2, 0)]
    return _checked(
        driver.cuTensorMapEncodeTiled(
            bf16 if dtype == torch.bfloat16 else f16,
            4,
            address,
            [driver.cuuint64_t(n) for n in (width, tokens, heads, batch)],
            [driver.cuuint64_t(n) for n in steps],
            [driver.cuuint32_t(n) for n in (64, rows, 1, 1)],
            [driver.cuuint32_t(1)] * 4,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def _make_current(device: torch.device) -> None:
    """Makes the device's primary context, the one torch uses, current on this thread."""
    from cuda.bindings import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    context = _primary_context(index)
    if int(_checked(driver.cuCtxGetCurrent())) != int(context):
        _checked(driver.cuCtxSetCurrent(context))


@functools.cache
def _primary_context(index: int) -> Any:
    from cuda.bindings import driver

    torch.cuda.init()
    return _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(index))))


def _checked(result: tuple) -> Any:
    """The values of a call of cuda-bindings, or a RuntimeError if it failed."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"a CUDA call failed: {status!r}")
    return values[0] if len(values) == 1 else tuple(values)
