"""Mistakes that were easy to make (mutations.py). Of what is timed, and of what steps should cost."""

from mutation import mutations

MUTATIONS = (
    mutations(
        "rcm_mcore/training/timeline.py",
        "tests/test_benchmark_step.py",
        ('("prepare_and_clip", "step", "update_ema")', '("step",)', "test_spans_of_a_student_step"),
        ("if self._open is None:", "if False:", "test_spans_of_a_student_step"),
        ("            setattr(owner, name, function)", "            pass", "test_spans_of_a_student_step"),
        (
            "_Step(start=moment(on_gpu=self._on_gpu)), False",
            "_Step(start=moment(on_gpu=self._on_gpu)), True",
            "test_spans_of_a_student_step",
        ),
        ('"rollout with graph" if has_graph else "rollout"', '"rollout"', "test_spans_of_other_steps"),
    )
    + mutations(
        "rcm_mcore/training/passes.py",
        "tests/test_benchmark_step.py",
        ("if name not in ungated and not error", "if name not in ungated and error", "test_the_check_passes_in_every_dtype"),
        (".max()))", ".min()))", "test_the_check_fails"),
        ("dtype=_EXACT[config.model.dtype]", "dtype=config.model.dtype", "test_the_check_fails"),
    )
    + mutations(
        "rcm_mcore/training/benchmark.py",
        "tests/test_benchmark_step.py",
        (
            'for name in ("seconds", "data", "passes")}',
            'for name in ("data", "passes")}',
            "test_a_step_is_that_of_the_slowest_rank",
        ),
        (
            "first, *steps = [step for",
            "first, *steps = 2 * [step for",
            "test_a_kind_is_the_mean_of_its_steps_without_the_first",
        ),
        (
            "tangent=t) for t in (False, kind.startswith",
            "tangent=t) for t in (False, kind.endswith",
            "test_single_passes_have_their_flops",
        ),
    )
    + mutations(
        "rcm_mcore/training/baseline.py",
        "tests/test_benchmark_step.py",
        ("(rollout - 1, one.student_forward)", "(rollout, one.student_forward)", "test_the_public_network_by_arithmetic"),
        ("seconds * ranks / config", "seconds / config", "test_what_was_not_measured_has_no_baseline"),
        ("or tokens != TOKENS", "", "test_what_was_not_measured_has_no_baseline"),
    )
    + mutations(
        "rcm_mcore/training/cost.py",
        "tests/test_cost.py",
        ("rollout - 1 + again + 1", "rollout + again + 1", "test_passes_are_those_of_the_flops"),
        ("fill = max(fill, slot)", "fill = 0.0", "test_recorded_steps_are_predicted"),
        ("* needed.sent_tp / 2", "* needed.sent_tp", "test_recorded_steps_are_predicted"),
        ("self.gpus_per_node // stride", "self.gpus_per_node", "test_what_leaves_a_node_takes_its_links"),
        (
            "max((1 - links.ring_hidden) * travels, travels - kernels)",
            "(1 - links.ring_hidden) * travels",
            "test_a_ring_is_hidden_as_far_as_kernels_last",
        ),
        ("took - times * waits", "took", "test_efficiencies_come_out_of_a_row"),
        ('rollout - (kind == "student")', "rollout", "test_efficiencies_come_out_of_a_row"),
    )
)
