"""Attention of other libraries, brought to this package's form: cuDNN and FlashAttention-2 through PyTorch, flash-attn 2 and 3.

Each backend has `unfit`, `forward` and `backward` as `blockwise` has the latter two; none carries a tangent. All return the
logsumexp with the natural logarithm in float32, and a backward takes an `out` and `lse` of a larger set of keys.

cuDNN and torch's flash ran on an H200 (tests marked gpu1). The packages flash_attn (2.7 and later) and flash_attn_interface (3)
were not at hand: their adaptors follow their sources and have run against stand-ins only.
"""

import importlib
import importlib.util
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

_aten = torch.ops.aten
_Forward = tuple[Tensor, None, Tensor, None]
_Gradients = tuple[Tensor, Tensor, Tensor]


class Cudnn:
    """cuDNN's fused attention, through the operator behind scaled_dot_product_attention."""

    @staticmethod
    def unfit(q: Tensor, k: Tensor, *_: Tensor) -> str | None:
        """Why this backend cannot take these tensors [B, S, N, D]; None if it can."""
        if 1 in (q.shape[1], k.shape[1]):
            return "PyTorch gives cuDNN no sequence of one token"
        return _torch_refuses("cuDNN", can_use_cudnn_attention, q, k)

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> _Forward:
        """out [B, Sq, N, D] and lse [B, N, Sq]."""
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = _aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, scale=scale)[:2]
        return out.transpose(1, 2), None, lse.reshape(q.shape[0], q.shape[2], q.shape[1]), None

    @staticmethod
    def backward(  # noqa: PLR0917 (as in flash_attention_backward)
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
    ) -> _Gradients:
        """dq, dk and dv."""
        tensors = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        seed = _no_seed(q.device, torch.int64, ())
        rest = (seed, seed, None, None, None, q.shape[1], k.shape[1], 0.0, False)
        grads = _aten._scaled_dot_product_cudnn_attention_backward(*tensors, lse.unsqueeze(-1), *rest, scale=scale)
        return tuple(x.transpose(1, 2) for x in grads)


class TorchFlash:
    """The FlashAttention-2 that PyTorch carries."""

    @staticmethod
    def unfit(q: Tensor, k: Tensor, *_: Tensor) -> str | None:
        """Why this backend cannot take these tensors [B, S, N, D]; None if it can."""
        if q.shape[3] % 8:
            return f"it takes head widths that are multiples of 8, not {q.shape[3]}"
        return _torch_refuses("flash attention", can_use_flash_attention, q, k)

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> _Forward:
        """out [B, Sq, N, D] and lse [B, N, Sq]."""
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = _aten._scaled_dot_product_flash_attention(*heads_first, scale=scale)[:2]
        return out.transpose(1, 2), None, lse, None

    @staticmethod
    def backward(  # noqa: PLR0917 (as in flash_attention_backward)
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
    ) -> _Gradients:
        """dq, dk and dv."""
        tensors = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        seed = _no_seed(q.device, torch.uint64, (2,))
        rest = (None, None, q.shape[1], k.shape[1], 0.0, False, seed, seed)
        grads = _aten._scaled_dot_product_flash_attention_backward(*tensors, lse, *rest, scale=scale)
        return tuple(x.transpose(1, 2) for x in grads)


class FlashAttn2:
    """The package flash_attn."""

    @staticmethod
    def unfit(q: Tensor, *_: Tensor) -> str | None:
        """Why this backend cannot take these tensors [B, S, N, D]; None if it can."""
        return _package_lacks("flash_attn") or _flash_attn_refuses(q, least=(8, 0))

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> _Forward:
        """out [B, Sq, N, D] and lse [B, N, Sq]."""
        out, lse, *_ = _imported("flash_attn.flash_attn_interface")._flash_attn_forward(
            q, k, v, dropout_p=0.0, softmax_scale=scale, causal=False, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return out, None, lse, None

    @staticmethod
    def backward(  # noqa: PLR0917 (as in flash_attention_backward)
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
    ) -> _Gradients:
        """dq, dk and dv."""
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _imported("flash_attn.flash_attn_interface")._flash_attn_backward(
            dout, q, k, v, out, lse, *grads, dropout_p=0.0, softmax_scale=scale, causal=False, window_size_left=-1,
            window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False,
        )  # fmt: skip
        return grads


class FlashAttn3:
    """The package flash_attn_interface, built from flash-attention's folder hopper."""

    @staticmethod
    def unfit(q: Tensor, *_: Tensor) -> str | None:
        """Why this backend cannot take these tensors [B, S, N, D]; None if it can."""
        return _package_lacks("flash_attn_interface") or _flash_attn_refuses(q, least=(9, 0))

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> _Forward:
        """out [B, Sq, N, D] and lse [B, N, Sq]."""
        out, lse, *_ = _imported("flash_attn_interface")._flash_attn_forward(q, k, v, softmax_scale=scale, causal=False)
        return out, None, lse, None

    @staticmethod
    def backward(  # noqa: PLR0917 (as in flash_attention_backward)
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
    ) -> _Gradients:
        """dq, dk and dv."""
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _imported("flash_attn_interface")._flash_attn_backward(
            dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale
        )
        return dq, dk, dv


def _torch_refuses(name: str, can_use, q: Tensor, k: Tensor) -> str | None:
    if not q.is_cuda:
        return "it needs a GPU"
    query, key = q.detach().transpose(1, 2), k.detach().transpose(1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fits = can_use(SDPAParams(query, key, key, None, 0.0, False, False))
    return None if fits else f"PyTorch's {name} takes no {q.dtype} of width {q.shape[3]} here, or is switched off"


def _flash_attn_refuses(q: Tensor, *, least: tuple[int, int]) -> str | None:
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) < least:
        return f"it needs a GPU of compute capability {least[0]}.{least[1]} or newer"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"it takes head widths that are multiples of 8 up to 256, not {q.shape[3]}"
    return None


@cache
def _package_lacks(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"the package {name} is not installed"


@cache
def _imported(name: str) -> ModuleType:
    return importlib.import_module(name)


@cache
def _no_seed(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The state of a random generator that nobody reads: there is no dropout."""
    return torch.zeros(shape, dtype=dtype, device=device)
