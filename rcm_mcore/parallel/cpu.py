"""megatron-core 0.16 on CPU: everything it takes for granted about CUDA, answered for gloo.

megatron-core allocates with device="cuda", asks for current streams and devices, and asserts CUDA tensor types in its
optimizers. Without a GPU, `install` answers these questions with their CPU meaning; with one it does nothing.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CUDA_TYPE = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}
_mode: _CudaMeansCpu | None = None


class _CudaMeansCpu(TorchFunctionMode):
    """device="cuda" becomes the CPU, and `tensor.type()` says what megatron's optimizers assert."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs = {**kwargs, "device": _CPU}
        elif func is torch.Tensor.cuda:
            return args[0]
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return _CUDA_TYPE.get(name, name)
        return func(*args, **kwargs)


class _Stream:
    """CPU work is already in order. (A class, since others write annotations such as `torch.cuda.Stream | None`.)"""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *_: Any) -> None: ...


def install() -> None:
    """Make megatron-core run on CPU tensors in this process and thread; nothing where CUDA exists. Idempotent.

    Call it before any process group of megatron's is made, and never reset its RNG tracker afterwards.
    """
    global _mode
    if torch.cuda.is_available() or _mode is not None:
        return
    import megatron.core.tensor_parallel.random as rng

    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU  # megatron passes it on as device=
    cuda.synchronize = lambda *a, **k: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda s, device="cuda": torch.set_rng_state(s)
    cuda.current_stream = cuda.default_stream = lambda *a, **k: _Stream()
    cuda.stream = lambda s: contextlib.nullcontext()
    cuda.Stream = _Stream
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *a, **k: None
    rng._set_cuda_rng_state = lambda s, device=-1, graph_safe=False: torch.set_rng_state(s)
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()

    class CpuRNGStatesTracker(rng.CudaRNGStatesTracker):
        @contextlib.contextmanager
        def fork(self, name: str = rng._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Any:
            assert name in self.states_, f"rng state {name} was never added"
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    rng._CUDA_RNG_STATE_TRACKER = CpuRNGStatesTracker()
    rng._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    _mode = _CudaMeansCpu()
    _mode.__enter__()
