"""Mistakes that were easy to make (mutations.py). Of float8 forwards and of weights that are gathered late."""

from mutation import mutations

FP8 = mutations(
    "kernels/rcm_kernels/fp8.py",
    "tests/test_fp8.py",
    (".clamp(min=SMALLEST)", "", "test_a_row_of_zeros_and_one_that_is_not_finite"),
    ("largest / LARGEST)", "largest / 480)", "test_rows_are_rounded_to_the_nearest"),
    ("wide.abs().amax", "wide.amax", "test_rows_are_rounded_to_the_nearest"),
) + mutations(
    "kernels/rcm_kernels/fp8_kernel.py",
    "tests/test_fp8.py",
    ("tl.maximum(tl.max(tl.abs(wide)), SMALLEST)", "tl.max(tl.abs(wide))", "test_the_kernel_equals_pytorch[48-dtype0]"),
    ("tl.store(scales + row, largest / LARGEST)", "tl.store(scales + row, LARGEST / largest)",
     "test_the_kernel_equals_pytorch[48-dtype0]"),
) + mutations(
    "rcm_mcore/models/common/fp8.py",
    "tests/test_fp8.py",
    ("_on.reset(token)", "pass", "test_the_switch_is_put_back_and_is_of_one_thread"),
    ("reduce_from_tensor_model_parallel_region(out, group=group)", "out", "test_tensor_parallel_ranks"),
    ("capability < (9, 0)", "capability < (8, 9)", "test_gpus_before_hopper_are_refused[capability1-True]"),
) + mutations(
    "rcm_mcore/models/common/dit.py",
    "tests/test_fp8.py",
    ("model.fp8_forwards and not torch.is_grad_enabled()", "model.fp8_forwards",
     "test_passes_with_gradients_are_not_float8[wan-none]"),
    (" and not isinstance(y, Dual)):", "):", "test_passes_with_a_tangent_are_not_float8[wan-no_grad]"),
) + mutations(
    "rcm_mcore/models/common/layers.py",
    "tests/test_fp8.py",
    ("linear(context)[0]", "apply(linear, context)", "test_every_large_linear_of_a_block_is_float8_without_gradients[wan]"),
) + mutations(
    "rcm_mcore/training/setup.py",
    "tests/test_fp8.py",
    ("    require_fp8(config.model)\n", "", "test_a_run_is_checked_for_it"),
    (', "fp8_forwards")', ")", "test_a_teacher_may_have_been_trained_without"),
) + mutations(
    "rcm_mcore/sampling/request.py",
    "tests/test_fp8.py",
    (' | {"fp8_forwards": False}', "", "test_samples_are_made_without[None]"),
)  # fmt: skip

GATHER = mutations(
    "rcm_mcore/training/gather.py",
    "tests/test_gather.py",
    ("            ddp.module.register_forward_pre_hook(lambda *_: self.wait())", "            pass",
     "test_the_training_is_the_same[dp2]"),
    ("        if not self._overlap:\n", "", "test_an_update_gathers_once_and_other_networks_need_not_wait[dp2]"),
    (" + self._ddp.expert_parallel_bucket_groups", "", "test_an_update_gathers_once_and_other_networks_need_not_wait[dp2]"),
) + mutations(
    "rcm_mcore/training/optim.py",
    "tests/test_gather.py",
    ('the weights too are there then."""\n        self.weights.wait()\n', 'the weights too are there then."""\n',
     "test_the_training_is_the_same[dp2]"),
)  # fmt: skip

# Every table of this file.
MUTATIONS = [mutation for name, table in list(globals().items()) if name.isupper() for mutation in table]
