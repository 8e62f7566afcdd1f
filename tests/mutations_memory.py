"""Mistakes that were easy to make (mutations.py). Of what memory holds, and of its estimate."""

from mutation import mutations

OFFLOAD = mutations(
    "rcm_mcore/training/offload.py",
    "tests/test_offload.py",
    ("            if changed:\n", "            if True:\n", "test_what_is_read_only_is_not_copied_back"),
    ("            if changed:\n", "            if False:\n", "test_the_device_has_none_of_it_between_steps"),
    ("        x.untyped_storage().resize_(0)\n", "        pass\n", "test_the_device_has_none_of_it_between_steps"),
    ("if self._held[i % 2] == i:", "if self._held[i % 2] is not None:", "test_streamed_blocks_share_two_buffers"),
    ("        self._fetch(i)\n        torch.cuda", "        torch.cuda", "test_streamed_blocks_share_two_buffers"),
) + mutations(
    "rcm_mcore/training/optim.py",
    "tests/test_offload.py",
    ("self.offloaded.here(emas):", "self.offloaded.here(emas, changed=False):", "test_the_device_has_none_of_it_between_steps"),
    ("                        shard_of[main].copy_(main)\n", "                        pass\n",
     "test_the_device_has_none_of_it_between_steps"),
    ("here([main, ema]):", "here([main, ema], changed=False):", "test_the_device_has_none_of_it_between_steps"),
) + mutations(
    "rcm_mcore/training/networks.py",
    "tests/test_offload.py",
    ("offload_grad_buffers(synchronize=False, empty_cache=False)", "offload_grad_buffers()",
     "test_gradients_go_back_to_the_allocator_alone"),
    ("        self.ddp.offload_grad_buffers(synchronize=False, empty_cache=False)", "        pass",
     "test_gradients_go_back_to_the_allocator_alone"),
    ("restore_grad_buffers(synchronize=False)", "restore_grad_buffers()", "test_gradients_go_back_to_the_allocator_alone"),
)  # fmt: skip

ESTIMATE = mutations(
    "rcm_mcore/training/estimate.py",
    "tests/test_estimate.py",
    ("74 + 12 * ratio", "74 + 8 * ratio", "test_what_a_block_needs_is_what_a_pass_allocates"),
    ("max(60 + 4 * wide, 2 * forward) if model.compile else 2 * forward", "1.5 * forward",
     "test_what_a_block_needs_is_what_a_pass_allocates"),
    ("graph + 20, backward + 16", "graph, backward", "test_what_a_block_needs_is_what_a_pass_allocates"),
    ("2 * 4 + 2 * 2 + 2 * mesh.cp", "0", "test_measured_peaks_are_within_a_tenth"),
    ("distill and config.distill.carries_tangents", "distill and config.distill.consistency is not None",
     "test_methods_without_a_jvp_need_no_tangents"),
    ("        host=away +", "        host=", "test_what_is_offloaded_is_the_hosts"),
    ("optimizer=sum(state.values()) - away", "optimizer=sum(state.values())", "test_what_is_offloaded_is_the_hosts"),
    ("+ distill) - streamed", "+ distill)", "test_what_is_offloaded_is_the_hosts"),
) + mutations(
    "tools/suggest_mesh.py",
    "tests/test_estimate.py",
    ("        if found[recompute].total <= limit:\n", "        if True:\n",
     "test_the_tool_takes_the_cheapest_recompute_that_fits"),
) + mutations(
    "rcm_mcore/training/setup.py",
    "tests/test_estimate.py",
    ("    if copies + offloaded > available:\n", "    if copies > available:\n",
     "test_what_the_host_has_no_room_for_is_refused"),
)  # fmt: skip

# Every table of this file.
MUTATIONS = [mutation for name, table in list(globals().items()) if name.isupper() for mutation in table]
