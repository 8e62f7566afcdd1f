"""Mistakes that were easy to make (mutations.py). Of what is said about low precision."""

from mutation import mutations

EMULATION = mutations(
    "rcm_mcore/models/wan/rounded.py",
    "tests/test_benchmark_tangent.py",
    ("return high + (x - high).to(torch.bfloat16).to(x.dtype) if", "return high if", "test_formats"),
    ("zip(x, formats)))", "zip(x, formats[::-1])))", "test_formats"),
    ("tangents: Any = [parts[1] if len(parts) == 2 else None", "tangents: Any = [parts[0] if len(parts) == 2 else None",
     "test_blocks_that_do_not_round_are_those_of_the_network[float64-1e-12]"),
    ("_halves(rounded(x, r.attention))", "_halves(x)",
     "test_every_rounding_alone_costs_something_and_less_than_all[attention]"),
    ("else products[0], self.roundings.products)", "else products[0], WIDE)",
     "test_every_rounding_alone_costs_something_and_less_than_all[products]"),
    ("narrow = DTYPES.get(r.modulation, block.modulation.dtype)", "narrow = block.modulation.dtype",
     "test_blocks_that_round_in_modulation_err_more"),
    ("q, k = (self._rms(x, norm.weight) for x, norm in ((q, attn.norm_q), (k, attn.norm_k)))",
     "q, k = (self._rms(x, norm.weight) for x, norm in ((q, attn.norm_k), (k, attn.norm_q)))",
     "test_blocks_that_do_not_round_are_those_of_the_network[float64-1e-12]"),
)  # fmt: skip

ERRORS = mutations(
    "rcm_mcore/distill/tangent_error.py",
    "tests/test_benchmark_tangent.py",
    ("over_sample(speed) * self.teacher", "self.teacher", "test_point_direction_and_g_are_those_of_a_consistency_step"),
    ("Dual(self.t, speed)", "Dual(self.t, speed / speed)", "test_point_direction_and_g_are_those_of_a_consistency_step"),
    ("problem.teacher, problem.x_t, t=t", "problem.x_t, problem.teacher, t=t",
     "test_point_direction_and_g_are_those_of_a_consistency_step"),
    ("return min(rows", "return max(rows", "test_the_tangent_is_that_of_the_direction"),
    ("speed * central_difference(", "central_difference(", "test_the_tangent_is_that_of_the_direction"),
    ("problem.teacher, h)", "problem.teacher, h / 2)", "test_a_difference_has_the_step_of_training"),
    ("error(x.tangent, y.tangent) for", "error(x.tangent, y.primal) for",
     "test_blocks_that_do_not_round_are_those_of_the_network[float64-1e-12]"),
    ("- reference.double()).norm() / reference.double().norm()", "- reference.double()).norm() / x.double().norm()",
     "test_errors_are_relative_to_the_reference"),
    ("((x, still[1]), (still[0], t))", "((x, t), (still[0], t))", "test_parts_of_the_tangent_add_up"),
    ("        net.blocks.update(blocks)", "        pass", "test_the_network_is_itself_again_after_an_emulation"),
) + mutations(
    "tools/benchmark_tangent.py",
    "tests/test_benchmark_tangent.py",
    ("param.copy_(full.to(torch.bfloat16))", "param.copy_(full)", "test_random_weights_are_the_same_in_every_dtype"),
    ("if not wrong <= TOLERANCE", "if not wrong <= 1.0", "test_an_emulation_of_something_else_is_an_error"),
    ("full[outliers] *= scaling.outlier", "full[outliers] *= 1.0", "test_random_weights_have_the_traits_that_are_asked_for"),
    ("full *= scaling.growth **", "full *= 1.0 **", "test_random_weights_have_the_traits_that_are_asked_for"),
    ("passed = scaling.fast_time +", "passed = 1.0 +", "test_random_weights_have_the_traits_that_are_asked_for"),
)  # fmt: skip

# Every table of this file.
MUTATIONS = [mutation for name, table in list(globals().items()) if name.isupper() for mutation in table]
