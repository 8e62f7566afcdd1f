"""The choice of an implementation of attention, and the adaptors of libraries that are not installed."""

import logging
import sys
from types import ModuleType
from typing import get_args, get_type_hints

import pytest
import torch
from attention_oracle import assert_close, draw, exact_gradients
from rcm_kernels import backends, blockwise, flash_attention, flash_attention_jvp, hopper, reference, use_backends, vendors
from rcm_kernels.backends import BACKENDS, FUNCTIONS, choices, choose

from rcm_mcore.config.schema import AttentionConfig


@pytest.fixture(autouse=True)
def auto():
    yield
    use_backends(**dict.fromkeys(FUNCTIONS, "auto"))


def test_the_configuration_offers_what_there_is():
    for function, hint in get_type_hints(AttentionConfig).items():
        assert get_args(hint) == ("auto", *choices(function))


def test_report_on_a_cpu():
    report = backends(torch.float32, 16, "cpu")
    assert list(report) == list(FUNCTIONS)
    for function in FUNCTIONS:
        assert tuple(report[function]) == choices(function)
        assert report[function]["blockwise"] == "used"
    assert "Hopper GPU" in report["jvp"]["hopper"]
    assert report["backward"]["flash_attn_2"] == "the package flash_attn is not installed"


def test_a_choice_is_followed_and_taken_back(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    q, k, v, q_dot = (x.half() for x in draw(20, 4))
    calls = []
    monkeypatch.setitem(BACKENDS, "triton", recording(BACKENDS["triton"], calls))
    use_backends(jvp="triton")
    assert backends(torch.float16, 16, "cpu")["jvp"] == {
        "hopper": "it needs a Hopper GPU (compute capability 9.0)",
        "triton": "used",
        "blockwise": "available",
    }
    flash_attention_jvp(q, k, v, q_dot)
    use_backends(jvp="blockwise")
    flash_attention_jvp(q, k, v, q_dot)
    assert len(calls) == 1


def recording(backend, calls):
    def jvp(*args, **kwargs):
        calls.append(args)
        return backend.jvp(*args, **kwargs)

    return type(backend)(backend.unfit, jvp=jvp, forward=backend.forward)


@pytest.mark.parametrize(
    "names,message",
    [
        ({"jvp": "cudnn"}, "jvp='cudnn': choose one of auto, hopper, triton, blockwise"),
        ({"backward": "hoper"}, "backward='hoper': choose one of auto, cudnn, flash_attn_3"),
        ({"foward": "cudnn"}, "foward='cudnn': there is no such function; there are jvp, forward, backward"),
    ],
)
def test_unknown_names(names, message):
    with pytest.raises(ValueError, match=message):
        use_backends(**names)
    assert choose("jvp", *draw(5, 2)) is blockwise.forward  # nothing changed


def test_a_backend_asked_for_by_name_never_gives_way():
    q, k, v = (x.float() for x in draw(20, 3))
    use_backends(forward="hopper")
    with pytest.raises(ValueError, match="forward='hopper' was chosen, but it needs a Hopper GPU"):
        flash_attention(q, k, v)


@pytest.mark.gpu1
def test_a_gpu_left_with_the_slow_path_is_told_once(caplog):
    q, k, v, q_dot = (x.float().cuda() for x in draw(20, 4))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            flash_attention_jvp(q, k, v, q_dot)
    (record,) = caplog.records
    assert "runs in plain PyTorch" in record.message and "hopper: it takes bfloat16" in record.message


@pytest.mark.gpu1
def test_what_the_hopper_kernel_leaves_to_others():
    def reason(*shape, dtype=torch.bfloat16, view=lambda x: x):
        x = view(torch.empty(shape, dtype=dtype, device="cuda"))
        return hopper.unfit(x, x, x)

    assert reason(1, 8, 2, 64) is None
    assert "head widths" in reason(1, 8, 2, 96)
    assert "float32" in reason(1, 8, 2, 64, dtype=torch.float32)
    assert "multiples of 16 bytes" in reason(1, 8, 2, 65, view=lambda x: x[..., :64])
    assert "multiples of 16 bytes" in reason(1, 8, 2, 72, view=lambda x: x[..., 1:65])


# flash-attn's functions as its sources declare them (2.8 and the one for Hopper), computed by the reference


def flash_attn_2():
    module = ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_forward(  # noqa: PLR0917
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert alibi_slopes is None and not return_softmax
        return *reference.attention(q, k, v, scale=softmax_scale), None, None

    def _flash_attn_backward(  # noqa: PLR0917
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert alibi_slopes is None and not deterministic
        for to, grad in zip((dq, dk, dv), blockwise.backward(dout, q, k, v, out, softmax_lse, scale=softmax_scale)):
            to.copy_(grad)

    module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    return module


def flash_attn_3():
    module = ModuleType("flash_attn_interface")

    def _flash_attn_forward(q, k, v, k_new=None, v_new=None, *, softmax_scale=None, causal=False, num_splits=1):
        assert k_new is v_new is None and not causal and num_splits == 1
        return *reference.attention(q, k, v, scale=softmax_scale), None, None

    def _flash_attn_backward(  # noqa: PLR0917
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
    ):  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k is sequed_q is sequed_k is max_seqlen_q is max_seqlen_k is None and not is_causal
        for to, grad in zip((dq, dk, dv), blockwise.backward(dout, q, k, v, out, softmax_lse, scale=softmax_scale)):
            to.copy_(grad)

    module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    return module


@pytest.mark.parametrize("backend,stand_in", [(vendors.FlashAttn2, flash_attn_2), (vendors.FlashAttn3, flash_attn_3)])
def test_flash_attn_adaptors(monkeypatch, backend, stand_in):
    module = stand_in()
    monkeypatch.setitem(sys.modules, module.__name__.split(".")[0], module)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vendors._imported.cache_clear()
    q, dout = draw(9, 2, seed=1)
    k, v = draw(11, 2, seed=2)
    out, out_dot, lse, lse_dot = backend.forward(q, k, v, scale=0.3)
    assert out_dot is lse_dot is None
    assert_close((out, lse), reference.attention(q, k, v, scale=0.3), 1e-12)
    grads = backend.backward(dout, q, k, v, out, lse, scale=0.3)
    assert_close(grads, exact_gradients(dout, (q, k, v), 0.3), 1e-12)
    vendors._imported.cache_clear()


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(
    "tangents", [(True, True, True), (True, True, False), (True, False, True), (True, False, False), (False,) * 3]
)
@pytest.mark.parametrize("width", hopper.WIDTHS)
def test_every_variant_of_the_hopper_kernel_fits(width, tangents, short):
    variant = hopper._Variant(torch.bfloat16, width, tangents, short)
    stages, buffers, memory = variant.shared_memory()
    assert stages >= 2 and buffers >= 1 and memory < hopper.SHARED_MEMORY
    source = variant.source()
    assert f"#define BN {variant.tile[0]}\n" in source and f"wgmma_ss_{variant.tile[0]}(" in source
