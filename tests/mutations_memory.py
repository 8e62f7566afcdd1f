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
)  # fmt: skip

# Every table of this file.
MUTATIONS = [mutation for name, table in list(globals().items()) if name.isupper() for mutation in table]
