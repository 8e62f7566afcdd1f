"""Mistakes that were easy to make, each with the test that must notice (run by mutate.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """In `file`, `old` (found exactly once) becomes `new`; `test`, a pytest node id, must then fail."""

    file: str
    old: str
    new: str
    test: str

    def __str__(self) -> str:
        return f"{self.file}: {self.old!r} -> {self.new!r}  [{self.test}]"


def _mutations(file: str, test_file: str, *rows: tuple[str, str, str]) -> list[Mutation]:
    """Rows (old, new, test in `test_file`)."""
    return [Mutation(file, old, new, f"{test_file}::{test}") for old, new, test in rows]


DUAL = _mutations(
    "rcm_mcore/dual.py",
    "tests/test_dual.py",
    ("value, tangent = x.chunk(2, dim)", "tangent, value = x.chunk(2, dim)", "test_stack_and_unstack"),
    ("return Dual(value, tangent.detach())", "return Dual(value, tangent)", "test_a_tangent_that_has_a_graph_is_cut_off"),
    ("return Dual(out, out_dot.detach())", "return Dual(out, out_dot)", "test_a_tangent_that_has_a_graph_is_cut_off"),
    ("Dual(o, o_dot.detach())", "Dual(o, o_dot)", "test_a_tangent_that_has_a_graph_is_cut_off"),
    (
        "return Dual(out, out_dot.detach())",
        "return Dual(out.detach(), out_dot.detach())",
        "test_gradients_are_those_of_the_plain_call_and_tangents_have_no_graph",
    ),
    (  # tensors that are no Dual get themselves as tangent: a bias reaches the tangent rows
        """    where = [i for i, a in enumerate(args) if isinstance(a, Dual)]
    if not where:
        return fn(*args)
""",
        """    if not any(isinstance(a, Dual) for a in args):
        return fn(*args)
    args = tuple(a if isinstance(a, Dual) else Dual(a, a) for a in args)
    where = list(range(len(args)))
""",
        "test_bias_reaches_the_primal_alone",
    ),
    ("unstack(fn(torch.cat(x, dim)), dim)", "Dual(fn(x.primal), fn(x.tangent))", "test_linear_calls_once_and_equals_jvp"),
)

TRIGFLOW = _mutations(
    "rcm_mcore/diffusion/trigflow.py",
    "tests/test_trigflow.py",
    ("t.cos() * x0 + t.sin() * eps", "t.sin() * x0 + t.cos() * eps", "test_velocity_of_the_true_endpoints"),
    ("over_sample(t.double())", "over_sample(t)", "test_diffuse_is_float64_and_scales_the_rectified_flow_state"),
    ("((t.cos() - t.sin()) * x", "((t.sin() - t.cos()) * x", "test_velocity_of_gaussian_data"),
    ("v.to(x.dtype)) / (t.cos() + t.sin())", "v.to(x.dtype))", "test_velocity_of_gaussian_data"),
    ("t.cos() * x - t.sin() * trig", "t.cos() * x + t.sin() * trig", "test_velocity_of_gaussian_data"),
    ("return x / (t.cos() + t.sin())", "return x", "test_velocity_of_gaussian_data"),
    (  # the tangent of the state's scale is forgotten
        "    v = network(rowwise(_to_rf_state, x, t)",
        "    v = network(rowwise(_to_rf_state, x, getattr(t, 'primal', t))",
        "test_tangent_equals_jvp_and_central_difference",
    ),
    ("torch.atan2(s, 1 - s)", "torch.atan2(s, 1 + s)", "test_time_maps_are_inverses"),
    ("t.sin() / (t.sin() + t.cos())", "t.sin()", "test_time_maps_reproduce_the_published_table"),
    ("torch.randn((), generator", "torch.rand((), generator", "test_lognormal_times"),
    ("math.atan(math.exp(float(log_sigma)))", "math.exp(float(log_sigma))", "test_lognormal_times"),
    ("1 + (distribution.shift - 1) * u)", "1 + distribution.shift * u)", "test_shifted_times"),
)

SAMPLERS = _mutations(
    "rcm_mcore/diffusion/samplers.py",
    "tests/test_samplers.py",
    ("math.sin(times[0]) * next(draws)", "next(draws)", "test_few_step_equals_a_loop_in_rectified_flow_time"),
    ("next(draws).to(x0), x0.new_full", "0 * next(draws), x0.new_full", "test_few_step_equals_the_stock_stochastic_scheduler"),
    ("        if i > 0:", "        if i > 1:", "test_few_step_equals_a_loop_in_rectified_flow_time"),
    ("s = rf_time(at)\n", "s = at\n", "test_few_step_equals_a_loop_in_rectified_flow_time"),
    ("velocity(x / scale, s).double()", "velocity(x, s).double()", "test_few_step_of_gaussian_data"),
    ("steps - 1 > len(mid_times)", "steps > len(mid_times)", "test_few_step_times"),
    ("*mid_times[: steps - 1]", "*mid_times[1 - steps :]", "test_few_step_times"),
    ("a >= b for a, b", "a > b for a, b", "test_repeated_mid_times_are_allowed"),
    ("1 + (shift - 1) * u)", "1 + shift * u)", "test_shifted_sigmas"),
    ("(s_next - s) * velocity(x, x.new_full((len(x),), s))", "(s_next - s) * velocity(x, x.new_full((len(x),), s_next))",
     "test_euler_equals_the_stock_scheduler"),
    ("flow_shift=shift", "flow_shift=1.0", "test_unipc_equals_a_direct_use_of_the_scheduler"),
    ("float(sigma)))", "float(timestep) / 1000))", "test_unipc_equals_a_direct_use_of_the_scheduler"),
)  # fmt: skip

LOSSES = _mutations(
    "rcm_mcore/distill/losses.py",
    "tests/test_losses.py",
    ("flatten(1).all(1)", "flatten(1).any(1)", "test_finite_samples"),
    ("return g - (r if", "return g + (r if", "test_consistency_tangent"),
    ("(r if scale_tangent else 1.0)", "(1.0 if scale_tangent else r)", "test_consistency_tangent"),
    ("torch.sqrt(1 - r**2 * sin**2)", "torch.sqrt(1 - r * sin**2)", "test_consistency_tangent"),
    ("- r * cos * sin * x_t", "- cos * sin * x_t", "test_consistency_tangent"),
    ("over_sample(norm + constant)", "over_sample(norm**2 + constant)", "test_normalize_tangent"),
    ("trig.detach() + g", "trig + g", "test_consistency_loss_has_gradient_minus_2_g"),
    (".abs().flatten(1).mean(1)", ".abs().flatten(1).sum(1)", "test_score_distillation_loss"),
    ("clamp_min(1e-5)", "clamp_min(1e-6)", "test_score_distillation_weight_is_at_least_1e_5"),
    ("(fake - teacher) / over", "(teacher - fake) / over", "test_score_distillation_loss"),
    ("(generated.detach() - teacher)", "(generated - teacher)", "test_score_distillation_loss"),
    (
        "grad = torch.where(over_sample(finite_samples(grad)), grad, 0.0)",
        "grad = grad.nan_to_num()",
        "test_score_distillation_gives_no_gradient_where_a_prediction_is_not_finite",
    ),
    ("t.cos() * eps - t.sin() * generated", "t.cos() * eps + t.sin() * generated",
     "test_score_target_is_the_denoising_loss_without_its_singularity"),
)  # fmt: skip

PHASES = _mutations(
    "rcm_mcore/distill/phases.py",
    "tests/test_phases.py",
    ("1 + own % config.rollout_max_steps", "1 + step % config.rollout_max_steps", "test_phases_equal_a_loop_with_counters"),
    ("1 + own % config.rollout_max_steps", "1 + done % config.rollout_max_steps", "test_phases_equal_a_loop_with_counters"),
    ("step - after + done if student", "done if student", "test_phases_equal_a_loop_with_counters"),
    ("step - config.tangent_warmup if scm else step", "step - config.tangent_warmup", "test_phases_equal_a_loop_with_counters"),
    ("-(-after // config.student_every)", "after // config.student_every", "test_phases_equal_a_loop_with_counters"),
    ("min(1.0, step / config.tangent_warmup)", "step / config.tangent_warmup", "test_scm_keeps_ramping_to_one"),
    ("own_step=own, scm=scm, dmd=True", "own_step=own, scm=True, dmd=True", "test_phases_equal_a_loop_with_counters"),
    ("for step in range(steps)]", "for step in range(steps + 1)]", "test_phases_equal_a_loop_with_counters"),
)

SCHEDULES = _mutations(
    "rcm_mcore/training/schedule.py",
    "tests/test_phases.py",
    ("min(config.warmup_start_lr, peak)", "config.warmup_start_lr", "test_warm_up_never_starts_above_the_peak"),
    ("* step / config.warmup_steps", "* (step + 1) / config.warmup_steps", "test_warm_up_is_linear_then_constant"),
    ("total - 1 - config.warmup_steps", "total - config.warmup_steps", "test_linear_decay_ends_on_the_last_step"),
    ("max(1, total - 1 -", "max(1, total - 1 + 0 *", "test_cosine_decay"),
    ("min(1.0, (step - config.warmup_steps)", "max(0.0, (step - config.warmup_steps)",
     "test_rates_stay_at_the_end_beyond_the_last_step"),
    ("(1 - config.min_lr_ratio) * share", "share", "test_cosine_decay"),
) + _mutations(
    "rcm_mcore/distill/ema.py",
    "tests/test_phases.py",
    ("power_gamma(length) + 1.0", "power_gamma(length)", "test_ema_averages_with_the_power_profile"),
    ("1.0 / (step + 1)", "1.0 / (step + 2)", "test_ema_averages_with_the_power_profile"),
    (".real.max()", ".real.min()", "test_gamma_is_the_largest_root"),
    ("[1.0, 7.0, 16.0 - length**-2, 12.0 - length**-2]", "[1.0, 7.0, 16.0 - length**-2, 12.0]",
     "test_gamma_of_the_published_lengths"),
)  # fmt: skip

DRAWS = _mutations(
    "rcm_mcore/parallel/random.py",
    "tests/test_draws.py",
    (  # noise drawn by place on this rank
        "step=step, slot=s)) for s in slots",
        "step=step, slot=i)) for i, s in enumerate(slots)",
        "test_the_split_over_ranks_changes_nothing",
    ),
    ("{purpose}/{seed}/{step}/{slot}", "{purpose}/{seed}/{slot}", "test_step_and_seed_change_every_draw"),
    ("{purpose}/{seed}/{step}/{slot}", "{purpose}/{step}/{slot}", "test_step_and_seed_change_every_draw"),
    ("{purpose}/{seed}/{step}/{slot}", "{seed}/{step}/{slot}", "test_no_two_uses_share_their_noise"),
    ("{purpose}/{seed}/{step}/{slot}", "{purpose}/{seed}{step}{slot}", "test_generators_differ_by_every_part_of_their_name"),
) + _mutations(
    "rcm_mcore/distill/draws.py",
    "tests/test_draws.py",
    ("torch.minimum(levels[-1], fresh)", "fresh", "test_rollout_levels_start_at_pure_noise_and_never_rise"),
    ("torch.minimum(levels[-1], fresh)", "torch.maximum(levels[-1], fresh)", "test_a_fixed_list_of_levels_is_honoured"),
    ("distill.rollout_times[k - 1]", "distill.rollout_times[k]", "test_a_fixed_list_of_levels_is_honoured"),
    ("u < rate for u", "u > rate for u", "test_share_of_dropped_samples"),
    ('stacked = ("rollout_times", "rollout_noise")', 'stacked = ("rollout_noise",)', "test_rows_are_those_of_the_samples"),
    ("    if phase.scm:", "    if True:", "test_a_phase_draws_what_it_needs"),
    ('gaussian("noise-d")', 'gaussian("noise-g")', "test_no_two_uses_share_their_noise"),
    ('times("time-d", distill.time_d)', 'times("time-d", distill.time_g)', "test_times_follow_their_distributions"),
    ('gaussian(f"rollout-{k}")', 'gaussian("rollout")', "test_no_two_uses_share_their_noise"),
    ('times("time", config.pretrain.time)', 'times("time", distill.time_d)', "test_share_of_dropped_samples"),
)

STEPS = _mutations(
    "rcm_mcore/distill/steps.py",
    "tests/test_steps.py",
    ("speed = t.cos() * t.sin()", "speed = torch.ones_like(t)", "test_consistency_step"),
    ("Dual(t[rows], speed[rows])", "Dual(t[rows], 0 * speed[rows])", "test_consistency_step"),
    ("warmup=phase.warmup", "warmup=1.0", "test_consistency_step"),
    ("scale_tangent=distill.scale_tangent", "scale_tangent=True", "test_consistency_step"),
    ("x_t, t)\n    speed =", "x_t.float().double(), t)\n    speed =", "test_consistency_step"),
    ("distill.scm_weight * loss / len(t)", "distill.scm_weight * loss / len(rows)",
     "test_consistency_step_without_a_bad_sample"),
    ("primal(teacher)[rows]\n", "primal(teacher)[: len(rows)]\n", "test_consistency_step_with_bad_samples_of_both_kinds"),
    ("torch.where(over_sample(usable), g, 0.0), distill", "g, distill", "test_consistency_step_without_a_bad_sample"),
    ("torch.where(usable, gap, 0.0).sum()", "gap.sum()", "test_consistency_step_without_a_bad_sample"),
    ("if bool(good.all()):", "if True:", "test_consistency_step_without_a_bad_sample"),
    ("run(rows) if len(rows) else None", "run(rows)", "test_no_loss_when_every_sample_is_bad"),
    ("dist.ReduceOp.MIN", "dist.ReduceOp.MAX", "test_ranks_of_a_model_agree_on_what_they_leave_out"),
    ("usable = _agree(finite_samples(g), roles)", "usable = finite_samples(g)",
     "test_ranks_of_a_model_agree_on_what_they_leave_out"),
    ("good = _agree(finite_samples(primal(out)), roles)", "good = finite_samples(primal(out))",
     "test_ranks_of_a_model_agree_on_what_they_leave_out"),
    ("draws.eps_d[rows], t)", "draws.eps_d[: len(rows)], t)", "test_distillation_step_with_bad_samples_of_both_kinds"),
    ("denoised(x_t, t, trig_velocity(conditioned(roles.fake_score, condition), x_t, t))",
     "trig_velocity(conditioned(roles.fake_score, condition), x_t, t)", "test_distillation_step"),
    ("distill.dmd_weight * loss / count", "distill.dmd_weight * loss", "test_distillation_step"),
    ("    loss = torch.where(usable[rows], losses, 0.0).sum()\n    return loss / len(t), metrics | {\"loss_critic\"",
     "    loss = losses.sum()\n    return loss / len(t), metrics | {\"loss_critic\"", "test_critic_step_without_a_bad_sample"),
    ("    loss = torch.where(usable[rows], losses, 0.0).sum()\n    return loss / len(t), metrics | {\"loss\"",
     "    loss = losses.sum()\n    return loss / len(t), metrics | {\"loss\"", "test_pretrain_step_without_a_bad_sample"),
    ("score_target(generated, eps, t)[rows]", "score_target(generated, eps, t)[: len(rows)]",
     "test_critic_step_with_bad_samples_of_both_kinds"),
    ("score_target(generated, eps, t)[rows]", "generated[rows]", "test_critic_step"),
    ("generated = torch.where(over_sample(usable), generated, 0.0)", "pass", "test_critic_step_without_a_bad_sample"),
    ("    with torch.no_grad():\n        generated = rollout", "    with torch.enable_grad():\n        generated = rollout",
     "test_critic_step"),
    ("roles.negative, condition.text))", "condition.text, condition.text))", "test_pretrain_step"),
    ("(eps - latents)[rows]", "(latents - eps)[rows]", "test_pretrain_step"),
    ("/ (eps[0].numel() * share)", "/ (eps.numel() * share)", "test_pretrain_step"),
    ("/ (eps[0].numel() * share)", "/ eps[0].numel()", "test_means_are_over_frames_that_are_not_given"),
    ("teacher, share=share)", "teacher)", "test_means_are_over_frames_that_are_not_given"),
) + _mutations(
    "rcm_mcore/distill/roles.py",
    "tests/test_steps.py",
    ("unconditional + guidance *", "conditional + guidance *", "test_distillation_step"),
    ("conditional, unconditional = network", "unconditional, conditional = network", "test_consistency_step"),
) + _mutations(
    "rcm_mcore/distill/rollout.py",
    "tests/test_steps.py",
    ("with torch.no_grad():", "with torch.enable_grad():", "test_distillation_step"),
    ("noise[k + 1], times[k + 1]", "noise[k], times[k + 1]", "test_distillation_step"),
    ("noise[k + 1], times[k + 1]", "noise[k + 1], times[k]", "test_critic_step"),
    ("range(len(times) - 1)", "range(len(times) - 2)", "test_critic_step"),
)  # fmt: skip

OPTIM = _mutations(
    "rcm_mcore/training/optim.py",
    "tests/test_optim.py",
    ('math.sqrt(1 - beta2 ** group["step"])', "math.sqrt(1 - beta2)", "test_equals_adamw_with_beta1_zero"),
    ('1 - lr * group["weight_decay"]', '1 - group["weight_decay"]', "test_equals_adamw_with_beta1_zero"),
    ("grads, grads, 1 - beta2", "grads, grads, 1", "test_equals_adamw_with_beta1_zero"),
    ('torch._foreach_add_(denominators, group["eps"])', "pass", "test_equals_adamw_with_beta1_zero"),
    ("if not params:\n                continue", "pass", "test_groups_count_their_own_steps"),
)

WAN = _mutations(
    "rcm_mcore/models/wan/model.py",
    "tests/test_networks.py",
    ("if self.model.bf16_time:", "if True:", "test_output_equals_diffusers"),
    ("TIME_SCALE * s", "TIME_SCALE * s.detach()", "test_tangent_equals_jvp_of_diffusers"),
    ("mask[:, -1, -1] = 1", "mask[:, 0, -1] = 1", "test_output_equals_diffusers[wan-first_last]"),
    ("torch.cat([x, mask, condition.latents.to(x.dtype)], 1)", "torch.cat([x, condition.latents.to(x.dtype), mask], 1)",
     "test_output_equals_diffusers[wan-image]"),
    ("IMAGE_EPS = 1e-5", "IMAGE_EPS = 1e-6", "test_output_equals_diffusers[wan-image]"),
) + _mutations(
    "rcm_mcore/models/common/blocks.py",
    "tests/test_networks.py",
    ("None if image is None else image.grad", "None", "test_gradients_equal_diffusers[wan-image-full]"),
) + _mutations(
    "rcm_mcore/models/cosmos/block.py",
    "tests/test_networks.py",
    ("torch.where(given, x[1], x[0])", "torch.where(given, x[0], x[1])", "test_output_equals_diffusers[cosmos-frames]"),
) + _mutations(
    "rcm_mcore/models/cosmos/model.py",
    "tests/test_networks.py",
    ("given.to(x.dtype).expand_as(padding), padding]", "padding, padding]", "test_output_equals_diffusers[cosmos-frames]"),
    ("x = torch.where(given, condition.latents.to(x.dtype), x)", "pass",
     "test_output_equals_diffusers[cosmos-frames]"),
) + _mutations(
    "rcm_mcore/models/common/dit.py",
    "tests/test_networks.py",
    ("zip(positions, widths, bases)", "zip((positions[0], positions[2], positions[1]), widths, bases)",
     "test_output_equals_diffusers"),
    ("torch.where(frames_given(condition, x), exact.to(v.dtype), v)", "v", "test_given_frames_are_denoised_to_themselves"),
) + _mutations(
    "rcm_mcore/models/common/layers.py",
    "tests/test_networks.py",
    (  # the bias is added to the tangent rows as well
        "rowwise(ew.add, apply(self.linear_qkv, u), self.linear_qkv.bias)",
        "dual.linear(lambda z: ew.add(z, self.linear_qkv.bias), apply(self.linear_qkv, u))",
        "test_tangent_equals_jvp_of_diffusers",
    ),
) + _mutations(
    "rcm_mcore/models/common/attention.py",
    "tests/test_wan.py",
    (  # the cache of the one-pass dual is ignored
        "known = None if cache is None or cache.out is None or cache.lse is None else (cache.out, cache.lse)",
        "known = None",
        "test_one_pass_keeps_no_tangent_and_calls_attention_once",
    ),
) + _mutations(
    "kernels/rcm_kernels/blockwise.py",
    "tests/test_networks.py",
    (  # lse_dot * out is not taken off out_dot
        ".addcmul_(A, rest, value=-1)",
        ".addcmul_(A, self.c.view(lse.shape))",
        "test_tangent_equals_jvp_of_diffusers",
    ),
)  # fmt: skip

PARALLEL = _mutations(
    "rcm_mcore/parallel/sequence.py",
    "tests/test_parallel.py",
    ("        dist.all_reduce(grad, group=ctx.group)\n", "", "test_equals_one_rank[2-wan tp2 72 none]"),  # identity backward
    ("tensor_parallel_output_grad=False", "tensor_parallel_output_grad=True", "test_equals_one_rank[2-wan tp2-sp 72 none]"),
) + _mutations(
    "rcm_mcore/models/common/layers.py",
    "tests/test_parallel.py",
    ("= config.sequence_parallel  #", "= False  #", "test_equals_one_rank[2-wan tp2-sp 72 none]"),  # e.g. on the modulation
    ("text_config.sequence_parallel = False", "text_config.sequence_parallel = config.sequence_parallel",
     "test_equals_one_rank[2-wan tp2-sp 72 none]"),
    (  # RMSNorm of q and k over this rank's heads alone
        "    if group.size() == 1:\n        return sums\n",
        "    if True:\n        scaled = [group.size() * x for x in (sums if isinstance(sums, Dual) else (sums,))]\n"
        "        return Dual(*scaled) if isinstance(sums, Dual) else scaled[0]\n",
        "test_equals_one_rank[2-wan tp2 72 none]",
    ),
) + _mutations(
    "rcm_mcore/models/wan/model.py",
    "tests/test_parallel.py",
    ("param.sequence_parallel = False  #", "param.sequence_parallel = True  #", "test_equals_one_rank[2-wan tp2-sp 72 none]"),
    ("            whole += self.img_emb.parameters()\n", "",
     "test_equals_one_rank[2-wan-first_last tp2-sp 45 one_pass]"),
)  # fmt: skip

KERNELS = _mutations(
    "kernels/rcm_kernels/blockwise.py",
    "tests/test_attention.py",
    ("            torch.add(self.c.view(lse.shape), rest, out=lse_dot)", "            lse_dot.zero_()",
     "test_blocks_merge_to_the_whole_but_not_without_lse_dot"),
    ("for x in (self.l, self.A, self.r, self.B):", "for x in (self.l, self.A, self.r):",
     "test_jvp_equals_forward_mode_in_many_tiles"),
    ("            highest = torch.maximum(highest, self.highest)\n", "", "test_logits_of_ten_thousand"),
    (".sub_(mean_tile)", "", "test_gradients_equal_autograd"),
    ("    return max(TILE_MIN_QUERIES, limits[\"scores\"] // (q.shape[0] * q.shape[2] * keys)), keys",
     "    return q.shape[1], keys", "test_memory_does_not_grow_with_the_square"),
) + _mutations(
    "kernels/rcm_kernels/attention.py",
    "tests/test_attention.py",
    ("        ctx.mark_non_differentiable(lse)\n", "", "test_lse_carries_no_gradient"),
    ("return *flash_attention_backward(dout, *ctx.saved_tensors, scale=ctx.scale), None",
     "return *flash_attention_backward(dout, *ctx.saved_tensors), None", "test_gradients_equal_autograd"),
)  # fmt: skip

PORTABLE = _mutations(
    "kernels/rcm_kernels/portable_kernel.py",
    "tests/test_kernels.py",
    ("S = tl.where((columns < keys)[None, :], S, float(\"-inf\"))", "pass", "TestJvp::test_within_the_budget"),
    ("T * shrink[:, None] + back[:, None] * O", "T * shrink[:, None]", "TestJvp::test_a_mean_that_wanders_along_the_keys"),
    ("r * shrink + back * l_before + tl.sum(H, 1)", "r * shrink + tl.sum(H, 1)", "TestJvp::test_strides_and_scales"),
    ("        O *= shrink[:, None]\n", "", "TestJvp::test_rising_scores"),
    ("center = (c * l_before + tl.sum(P * S_dot, 1)) / l", "center = c", "TestJvp::test_sharp_attention"),
    ("            S_dot *= scale\n", "", "TestJvp::test_within_the_budget"),
    ("tl.store(lse_dot + at, c + rest", "tl.store(lse_dot + at, rest", "TestJvp::test_lse_dot_is_the_finite_difference_of_lse"),
) + _mutations(
    "kernels/rcm_kernels/portable.py",
    "tests/test_kernels.py",
    ("V_TANGENT=v_dot is not None", "V_TANGENT=k_dot is not None", "TestJvp::test_within_the_budget"),
) + _mutations(
    "kernels/rcm_kernels/backends.py",
    "tests/test_backends.py",
    ("        if reason is not None:\n            raise", "        if False:\n            raise",
     "test_a_backend_asked_for_by_name_never_gives_way"),
    ("    wanted = _wanted[function]\n    if wanted != AUTO:", "    wanted = AUTO\n    if wanted != AUTO:",
     "test_a_choice_is_followed_and_taken_back"),
)  # fmt: skip

RING = _mutations(
    "rcm_mcore/parallel/ring.py",
    "tests/test_ring.py",
    ("yield tuple(x[:, :count] for x in block)\n", "yield tuple(block)\n", "test_equals_one_rank[2-passed on-21-out]"),
    ("wide_out=group is not None", "wide_out=False", "test_blocks_whose_lse_dot_differ_lose_no_digits[4-out_dot]"),
    ("total[:, : part.shape[1]] += part", "total[:, : part.shape[1]] = part", "test_equals_one_rank[2-passed on-24-dk]"),
    ("(group.rank() - step) % group.size()", "(group.rank() + step) % group.size()",
     "test_equals_one_rank[4-passed on-21-out]"),
) + _mutations(
    "rcm_mcore/parallel/shared_memory.py",
    "tests/test_ring.py",
    ("theirs((rank - step) % size)", "theirs((rank + step) % size)", "test_equals_one_rank[4-shared-21-out]"),
    ("(peers.group.rank() + self.step) % size", "(peers.group.rank() - self.step) % size",
     "test_equals_one_rank[4-shared-24-dk]"),
    ("part[:, x.shape[1] :].zero_()", "pass", "test_equals_one_rank[4-shared-21-gradient of padding]"),
) + _mutations(
    "kernels/rcm_kernels/merge.py",
    "tests/test_ring.py",
    ("weight * (rate - lse_dot)", "weight * rate", "test_equals_one_rank[2-passed on-24-out_dot]"),
    ("(weights * torch.stack(lse_dots)).sum(0)", "lse_dots[0]", "test_equals_one_rank[2-passed on-24-lse_dot]"),
) + _mutations(
    "kernels/rcm_kernels/merge_kernel.py",
    "tests/test_merge.py",
    ("mask=here, other=0.0) - rate)", "mask=here, other=0.0))", "test_the_kernel_equals_pytorch[dtype0-16]"),
    ("- highest) / total", "- highest)", "test_the_kernel_equals_pytorch[dtype0-16]"),
) + _mutations(
    "rcm_mcore/parallel/exchange.py",
    "tests/test_parallel.py",
    ("ctx.join, ctx.split)", "ctx.split, ctx.join)", "test_equals_one_rank[2-wan cp2-all_to_all 72 none]"),
) + _mutations(
    "rcm_mcore/models/common/dit.py",
    "tests/test_parallel.py",
    (".chunk(self.cp_group.size())[self.cp_group.rank()]", ".chunk(self.cp_group.size())[0]",
     "test_equals_one_rank[2-wan cp2-ring 72 none]"),
    ("given = self._scatter((frame[:, None] < condition.frames)[..., None])",
     "given = (frame[:, None] < condition.frames)[..., None][: self.hidden_shape(x)[0]]",
     "test_equals_one_rank[2-cosmos-frames cp2-ring 45 one_pass]"),
    ("self._gather(rows)[:tokens]", "self._gather(rows).roll(1, 0)[:tokens]", "test_equals_one_rank[2-wan cp2-ring 45 none]"),
) + _mutations(
    "rcm_mcore/parallel/ring.py",
    "tests/test_parallel.py",
    ("yield tuple(x[:, :tokens] for x in own)", "yield own", "test_equals_one_rank[2-wan tp2-sp 45 none]"),
) + _mutations(
    "rcm_mcore/training/setup.py",
    "tests/test_training.py",
    ("reads=mesh.reads", "reads=True", "test_equals_one_rank[cp2]"),
)  # fmt: skip

PIPELINE = _mutations(
    "rcm_mcore/models/common/dit.py",
    "tests/test_training.py",
    ("param.allreduce = False", "param.allreduce = True", "test_equals_one_rank[pp2]"),
) + _mutations(
    "rcm_mcore/training/pipeline.py",
    "tests/test_training.py",
    ("if not targets_follow_output(term):", "if True:", "test_equals_one_rank[pp2]"),
) + _mutations(
    "rcm_mcore/parallel/stages.py",
    "tests/test_parallel.py",
    ("network(*call, chunk=chunk)", "network(*call)", "test_equals_one_rank[2-wan pp2-vpp2 45 none]"),
    ("dual.unstack(self.value, 0)", "dual.unstack(self.value.flip(0), 0)", "test_equals_one_rank[2-wan pp2 45 none]"),
) + _mutations(
    "rcm_mcore/training/estimate.py",
    "tests/test_estimate.py",
    ("(trained + distill)", "trained", "test_states_of_14b_are_those_of_the_design[mesh0-179-0]"),
)  # fmt: skip

DATA = _mutations(
    "rcm_mcore/data/readers.py",
    "tests/test_data.py",
    ("self._readers.get(k % self._config.readers)", "self._readers.get(k % 2)",
     "test_order_is_the_same_under_every_data_parallel_size"),
    ("shard, shard.skip(self.member)", "shard, shard.samples()", "test_resumed_is_unbroken"),
    ('if state["shards_digest"] != self._digest:', "if False:", "test_a_changed_set_of_shards_or_readers_is_refused"),
) + _mutations(
    "rcm_mcore/data/loader.py",
    "tests/test_data.py",
    ("(self._samples + j) % self._dp_size", "j % self._dp_size", "test_order_continues_when_the_global_batch_changes"),
    ("len(self._ready) < self._prefetch)", "len(self._ready) <= self._prefetch)",
     "test_state_is_that_of_the_batch_consumed_not_of_those_prepared"),
) + _mutations(
    "rcm_mcore/data/shards.py",
    "tests/test_shards.py",
    ("weights_only=True", "weights_only=False", "test_a_malicious_pickle_is_refused_not_run"),
    ("if not finite.all()", "if torch.isnan(tensor).any()", "test_bad_samples_are_skipped_counted_and_logged"),
    ('if model.condition == "first_last" and sample.latent', 'if model.condition == "other" and sample.latent',
     "test_samples_without_what_an_image_network_takes_are_bad_and_fine_for_others"),
) + _mutations(
    "rcm_mcore/data/build.py",
    "tests/test_encode.py",
    ("return [block for block in self.blocks[rank::world_size] if self._finished(block) is None]",
     "return [block for block in self.blocks if self._finished(block) is None][rank::world_size]",
     "test_any_number_of_ranks_writes_the_same"),  # dealt anew while others finish theirs
    ('f"shard_{block:06d}.tar"', 'f"shard_{len(list(self.root.rglob(\'*.tar\'))):06d}.tar"',
     "test_any_number_of_ranks_writes_the_same"),
    ("return record if whole else None", "return record",
     "test_a_complete_folder_is_left_alone_and_a_lost_or_cut_shard_is_written_anew"),
    ("if missing or any(record is None for record in records):", "if missing:", "test_any_number_of_ranks_writes_the_same"),
) + _mutations(
    "rcm_mcore/data/image.py",
    "tests/test_encode.py",
    ("video = frames.new_zeros(", "video = -frames.new_ones(",  # black, not grey
     "test_given_frames_are_what_wans_pipeline_prepares"),
    ("hidden_states[-2]", "hidden_states[-1]", "test_given_frames_are_what_wans_pipeline_prepares"),
) + _mutations(
    "rcm_mcore/data/media_input.py",
    "tests/test_media_input.py",
    ("<= (time + now) / 2:", "< now:", "test_frames_are_the_nearest_in_time"),
) + _mutations(
    "rcm_mcore/data/text.py",
    "tests/test_text.py",
    ('"t5": (T5EncoderModel, False)', '"t5": (T5EncoderModel, True)', "test_embeddings_are_the_pipelines"),
) + _mutations(
    "rcm_mcore/sampling/synthesize.py",
    "tests/test_synthesize.py",
    ("sampler.latents(good, rows)", "sampler.latents(range(len(good)), rows)",
     "test_sample_i_is_what_the_sampler_makes_of_line_i"),
)  # fmt: skip

INTEROP = _mutations(
    "rcm_mcore/interop/tables.py",
    "tests/test_interop_names.py",
    ("torch.stack([x.unflatten(0, (heads, -1)) for x in xs], dim=1).flatten(0, 2)", "torch.cat(xs)",
     "test_mcore_names_and_layout[cosmos]"),
    ("name.removeprefix(_PREFIXES[which])", 'name.replace("net.", "")', "test_shapes_and_network_are_found[wan]"),
    ("if which != \"student\" and not name.startswith(_PREFIXES[which]):", "if False:",
     "test_networks_of_a_training_checkpoint_by_prefix"),
) + _mutations(
    "rcm_mcore/interop/wan_names.py",
    "tests/test_interop_names.py",
    ('"norm3": "norm2",', '"norm3": "norm3",', "test_diffusers_own_converter_agrees_on_wan[wan]"),
    ('"cross_attn.linear_kv_img": ("cross_attn.k_img", "cross_attn.v_img")',
     '"cross_attn.linear_kv_img": ("cross_attn.v_img", "cross_attn.k_img")', "test_mcore_names_of_images[wan image]"),
) + _mutations(
    "rcm_mcore/interop/cosmos_names.py",
    "tests/test_interop_names.py",
    ('"mlp.layer1": "ff.net.0.proj",\n    "mlp.layer2": "ff.net.2",',
     '"mlp.layer1": "ff.net.2",\n    "mlp.layer2": "ff.net.0.proj",',
     "test_diffusers_own_converter_agrees_on_cosmos[cosmos]"),
    ("channels + 2: \"frames\"", "channels + 2: \"text\"", "test_shapes_and_network_are_found[cosmos frames]"),
) + _mutations(
    "rcm_mcore/interop/files.py",
    "tests/test_interop_files.py",
    ('map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False',
     "test_pickle_that_runs_code_is_refused[True]"),
    ("tensor.storage_offset() * tensor.dtype.itemsize", "0", "test_what_torch_saves_is_read"),
) + _mutations(
    "rcm_mcore/interop/destination.py",
    "tests/test_interop_files.py",
    ("        yield partial\n", "        partial = path\n        yield partial\n",
     "test_a_failed_write_leaves_nothing[failure0-diffusers out]"),
) + _mutations(
    "rcm_mcore/interop/destination.py",
    "tests/test_interop.py",
    ("if _digest(file) != digest:", "if False:", "test_manifests"),
) + _mutations(
    "rcm_mcore/interop/shipped/rcm_scheduler.py",
    "tests/test_interop_pipeline.py",
    ("s = [math.sin(t) / (math.sin(t) + math.cos(t)) for t in self._times(num_inference_steps)]",
     "s = [math.sin(t) for t in self._times(num_inference_steps)]", "test_wan_pipeline_equals_our_sampler[4]"),
    ("x0 = x0 + self.sigmas[i + 1] * noise", "x0 = (1 - self.sigmas[i + 1]) * x0 + self.sigmas[i + 1] * noise",
     "test_cosmos_pipeline_equals_our_sampler"),
)  # fmt: skip

TRAINING = _mutations(
    "rcm_mcore/training/networks.py",
    "tests/test_training.py",
    ("trained.ddp.no_sync if finalize else contextlib.nullcontext", "trained.ddp.no_sync",
     "test_equals_one_rank[dp2-overlap-warmup]"),
    ("run if finalize else None", "run", "test_equals_one_rank[tp2-sp]"),  # two a step
) + _mutations(
    "rcm_mcore/training/optim.py",
    "tests/test_training.py",
    ("optimizer.tp_group = groups.tp\n", "optimizer.tp_group = groups.dp\n", "test_equals_one_rank[tp2]"),
)  # fmt: skip

RESUME = (
    _mutations(
        "rcm_mcore/training/state.py",
        "tests/test_resume.py",
        ("one.steps = state.own_steps[one.name]", "pass", "test_resumed_on_the_same_mesh_is_bit_equal"),
    )
    + _mutations(
        "rcm_mcore/training/state.py",
        "tests/test_resume.py",
        ("one.optimizer.set_steps(one.steps)", "pass", "test_resumed_on_the_same_mesh_is_bit_equal"),
        ("tuple(a + b for a, b in zip(start, offset))", "offset", "test_resumed_on_the_same_mesh_is_bit_equal"),
        (" and mesh.tp_group.rank()", "", "test_resumed_on_the_same_mesh_is_bit_equal"),
        (
            "crc32(name.encode()) % holders.size()",
            "sorted(n for n, _ in one.net.named_parameters()).index(name) % holders.size()",
            "test_data_parallel_stages_save_what_one_rank_does",
        ),
    )
    + _mutations(
        "rcm_mcore/training/setup.py",
        "tests/test_resume.py",
        (
            "total_steps=critic_steps, has_ema=False",
            "total_steps=critic_steps, has_ema=True",
            "test_each_step_changes_its_own_network_and_the_student_alone_has_an_ema",
        ),
    )
    + _mutations(
        "rcm_mcore/checkpoint/folder.py",
        "tests/test_checkpoint.py",
        ("if _crc32(path / name) != crc:", "if False:", "test_a_damaged_newest_is_passed_over_loudly"),
    )
    + _mutations(
        "rcm_mcore/checkpoint/folder.py",
        "tests/test_saver.py",
        ("if not keep_every or s % keep_every", "if True", "test_what_keep_every_divides_stays"),
        ("_try_to_remove(doomed)", "shutil.rmtree(doomed)", "test_what_cannot_be_removed_does_not_fail_a_save"),
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "test_two_runs_cannot_share_a_folder"),
    )
    + _mutations(
        "rcm_mcore/training/saver.py",
        "tests/test_saver.py",
        ("pieces = self._host.copy(pieces)", "pass", "test_a_checkpoint_holds_the_state_of_its_step"),
        ("if last or self._failed_before:", "if last:", "test_one_failed_save_is_forgiven_and_two_are_not"),
        ("if last or self._failed_before:", "if self._failed_before:", "test_the_last_save_must_succeed"),
        ("            self._failed_before = False\n", "", "test_one_failed_save_is_forgiven_and_two_are_not"),
        ("            self._thread.join()\n", "            pass\n", "test_a_save_waits_for_the_one_before"),
    )
    + _mutations(
        "rcm_mcore/interop/dcp.py",
        "tests/test_saver.py",
        ("        if first < last:\n", "        if first <= last:\n", "test_a_range_is_made_of_few_boxes"),
        ("zlib.crc32(data, self.crc)", "zlib.crc32(data)", "test_a_checkpoint_is_whole"),
        ("raise self._error from None", "pass", "test_a_disk_that_is_full_in_the_middle_of_a_tensor_is_called_so"),
    )
)

VAE = _mutations(
    "rcm_mcore/data/vae.py",
    "tests/test_vae.py",
    ("self._std + self._mean", "self._std", "test_decode_is_the_text_pipelines"),
    ("latents.to(self.device, torch.float32) * self._std", "latents.float()", "test_decode_is_the_text_pipelines"),
    ("(mode.float() - self._mean) / self._std", "mode.float() / self._std - self._mean", "test_encode_is_the_video_pipelines"),
    ("latent_dist.mode()", "latent_dist.sample()", "test_encode_is_the_video_pipelines"),
    ("self.model.use_tiling = False", "self.model.use_tiling = self.tiled", "test_tiles_are_for_decoding_alone"),
    ("    if wrong:\n", "    if False:\n", "test_folders_that_cannot_be_used"),
)

SAMPLE = (
    _mutations(
        "rcm_mcore/sampling/sampler.py",
        "tests/test_sample.py",
        ("seed=s, step=0, slots=[i])", "seed=s, step=0, slots=[0])", "test_samples_of_several_seeds"),
        ("seed=s, step=0, slots=[i])", "seed=0, step=0, slots=[i])", "test_samples_of_several_seeds"),
    )
    + _mutations(
        "rcm_mcore/sampling/sampler.py",
        "tests/test_sample_given.py",
        ("told[draw.given] for draw in batch", "told[mine[0].given] for draw in batch", "test_a_teacher_is_the_image_pipeline"),
        (
            "self._encoder.token_counts(different)",
            "map(len, self._encoder.encode(different))",
            "test_a_prompt_that_the_encoder_would_cut_is_refused",
        ),
    )
    + _mutations(
        "rcm_mcore/sampling/given.py",
        "tests/test_sample_given.py",
        ("files[number % len(files)]", "files[0]", "test_files_of_prompts"),
        ("frames=torch.tensor([first.shape[2]])", "frames=torch.tensor([1])", "test_a_student_is_the_video_pipeline"),
        ("latents[:, :, : first.shape[2]] = first", "pass", "test_a_student_is_the_video_pipeline"),
        (
            "(rows, width) != (model.image_len",
            "False and (rows, width) != (model.image_len",
            "test_an_image_encoder_of_another_size_is_refused",
        ),
    )
    + _mutations(
        "rcm_mcore/data/image.py",
        "tests/test_sample_given.py",
        (
            "rows = image_encoder.encode(frames)",
            "rows = image_encoder.encode(frames.flip(0))",
            "test_first_and_last_frame_are_the_image_pipelines",
        ),
    )
    + _mutations(
        "rcm_mcore/data/media_input.py",
        "tests/test_sample_given.py",
        ("size) for frame in last]", "size) for frame in reversed(last)]", "test_a_student_is_the_video_pipeline"),
    )
    + _mutations(
        "rcm_mcore/sampling/folder.py",
        "tests/test_sample_given.py",
        ("{path: _sha256(Path(path)) for path", '{path: "" for path', "test_a_picture_that_has_changed_is_refused"),
    )
    + _mutations(
        "rcm_mcore/sampling/folder.py",
        "tests/test_sample.py",
        ("if sections[name].get(field) != value:", "if False:", "test_another_request_is_refused"),
        ("not self._part(d).is_file()]", "True]", "test_a_killed_run_leaves_complete_files_and_goes_on"),
    )
    + _mutations(
        "rcm_mcore/sampling/generate.py",
        "tests/test_sample.py",
        ("background.put(draw, row)", "finisher(draw, row)", "test_decoding_goes_on_beside_the_next_batch"),
    )
    + _mutations(
        "rcm_mcore/sampling/background.py",
        "tests/test_sample.py",
        (">= self._ahead", ">= 99", "test_background_is_bounded_and_raises"),
        ("while self._pending and error is None:", "while False:", "test_background_is_bounded_and_raises"),
    )
    + _mutations(
        "rcm_mcore/data/media.py",
        "tests/test_media.py",
        ("dst_colorspace=_BT709, ", "", "test_an_mp4_decodes_to_the_video"),
        ("        partial.unlink(missing_ok=True)\n", "", "test_a_write_that_fails_leaves_nothing"),
    )
)

SLURM = (
    _mutations(
        "rcm_mcore/training/loop.py",
        "tests/test_signals.py",
        ("dist.ReduceOp.MAX)", "dist.ReduceOp.MIN)", "test_every_rank_saves_the_same_step_and_stops"),
        (
            "        if run.state.step != self.saver.saved_step:\n            self._save()\n        while",
            "        while",
            "test_every_rank_saves_the_same_step_and_stops",
        ),
    )
    + _mutations(
        "rcm_mcore/train.py",
        "tests/test_train_cli.py",
        (" or under_torchrun else", " else", "test_a_run_that_was_asked_to_stop_exits_with_75"),
    )
    + _mutations(
        "rcm_mcore/requeue.py",
        "tests/test_launch_slurm.py",
        ('and earlier[-1]["step"] == attempt["step"]', "", "test_two_failures_at_the_same_step_end_the_job"),
        ('and earlier[-1]["exit_code"] ', "", "test_two_failures_at_the_same_step_end_the_job"),
        ('if line["job"] == job]', "]", "test_two_failures_at_the_same_step_end_the_job"),
        ('len({line["saved"] for line in last}) == 1', "True", "test_attempts_without_a_new_checkpoint_end_the_job"),
    )
    + _mutations(
        "launch_slurm/launch.sh",
        "tests/test_launch_slurm.py",
        ('trap "" USR1 TERM; ', "", "test_arguments_reach_the_trainer_as_they_are"),
        ('-m rcm_mcore.train "$@"', "-m rcm_mcore.train $*", "test_arguments_reach_the_trainer_as_they_are"),
        ("$verdict == 75", "$verdict != 0", "test_two_failures_at_the_same_step_end_the_job"),
    )
)

SHEETS = (
    _mutations(
        "rcm_mcore/training/optim.py",
        "tests/test_sheets.py",
        ("                ema.copy_(kept)\n", "", "test_an_error_under_the_ema_puts_the_weights_back"),
        (
            "        finally:\n            self._exchange_ema()",
            "        finally:\n            pass",
            "test_an_error_under_the_ema_puts_the_weights_back",
        ),
        ("                main.copy_(ema)\n", "", "test_samples_are_those_of_the_sampler"),
        ("        self._copy_main_params_to_model_params()\n", "", "test_samples_are_those_of_the_sampler"),
        (
            "            self._exchange_ema()\n        self._share_weights()\n",
            "            self._exchange_ema()\n",
            "test_so_is_one_of_data_parallel_ranks",
        ),
    )
    + _mutations(
        "rcm_mcore/training/sheets.py",
        "tests/test_sheets.py",
        ('f"sheet-{k}"', '"sheet-0"', "test_samples_are_those_of_the_sampler"),
        ("slots=[i])", "slots=[0])", "test_samples_are_those_of_the_sampler"),
        ("config.distill.guidance)", "1.0)", "test_a_teacher_is_sampled_with_guidance_and_what_is_given"),
        (
            "config.data.given_frames[i % len(config.data.given_frames)]",
            "1",
            "test_a_teacher_is_sampled_with_guidance_and_what_is_given",
        ),
        ("made[i] + self._columns(i)", "self._columns(i) + made[i]", "test_samples_are_those_of_the_sampler"),
        ("owner = i % mesh.dp_size", "owner = 0", "test_every_mesh_makes_the_same_samples"),
        (".nan_to_num(0.0)", "", "test_colours_are_scaled_and_what_is_not_finite_is_grey"),
        ("except Exception as error:  #", "except ValueError as error:  #", "test_a_full_disk_does_not_end_the_run"),
        ('run_log.image("samples", path)', "pass", "test_cells_show_what_the_vae_decodes"),
        ('" ".join(prompt.split())', "prompt", "test_cells_show_what_the_vae_decodes"),
    )
    + _mutations(
        "rcm_mcore/training/loop.py",
        "tests/test_sheets.py",
        ("run.state.step % self.config.log.sheet_every == 0", "True", "test_a_sheet_is_written_every_so_many_steps"),
    )
    + _mutations(
        "rcm_mcore/training/setup.py",
        "tests/test_sheets.py",
        ("    check_sheets(config)\n", "", "test_a_vae_that_cannot_decode_is_refused_at_the_start"),
    )
    + _mutations(
        "rcm_mcore/data/media.py",
        "tests/test_sheets.py",
        ("columns = columns or min(", "columns = min(", "test_rows_are_prompts_and_columns_are_networks"),
    )
)

GUARDS = (
    _mutations(
        "rcm_mcore/training/preflight.py",
        "tests/test_guards.py",
        ("_digest(path.read_bytes())", "_digest(path.name.encode())", "test_facts_are_versions_sources_and_every_field"),
        ("2 * counts[0][1] > len(values)", "2 * counts[0][1] >= len(values)", "test_without_a_majority_all_ranks_are_named"),
        ("abs(clock - median) > MAX_SKEW", "clock - median > MAX_SKEW", "test_a_clock_that_is_off_is_named"),
        ("statistics.median_high(", "statistics.median(", "test_a_rate_below_the_others_is_named"),
        ("if rate < SLOW * median", "if not rate >= SLOW * median", "test_a_rate_below_the_others_is_named"),
        (".any(1).sum())", ".all(1).sum())", "test_one_wrong_element_of_a_product_is_seen"),
        ("    if wrong:\n", "    if False:\n", "test_a_rank_that_computes_wrongly_is_refused_on_both"),
    )
    + _mutations(
        "rcm_mcore/training/watchdog.py",
        "tests/test_guards.py",
        ("min(now - last, 2 * tick)", "now - last", "test_a_suspended_process_has_not_stalled"),
        ("max(self.seconds, 60.0 * patience_minutes)", "self.seconds", "test_a_slow_run_that_moves_is_left_alone"),
        ("if self._beat is not seen:", "if False:", "test_a_slow_run_that_moves_is_left_alone"),
        (
            "self._beat, 0.0, False\n            elif",
            "self._beat, 0.0, True\n            elif",
            "test_a_run_that_moves_again_goes_on",
        ),
        ("all_threads=True", "all_threads=False", "test_a_stall_is_written_down_and_ends_the_process"),
        ("os._exit(EXIT_STALLED)", "os._exit(1)", "test_a_stall_is_written_down_and_ends_the_process"),
        (  # in the watchdog's own thread, which a dead file system then stops
            'threading.Thread(target=self._write, args=(seen,), name="watchdog-writer", daemon=True).start()',
            "self._write(seen)",
            "test_a_file_system_that_hangs_does_not_keep_a_hung_run",
        ),
    )
    + _mutations(
        "rcm_mcore/training/stragglers.py",
        "tests/test_guards.py",
        ("statistics.median_low(", "statistics.median(", "test_slow_ranks"),
        ("math.isfinite(x) and x > ratio", "x > ratio", "test_slow_ranks"),
        (" and x > median + floor", "", "test_slow_ranks"),
        ("self._first = True", "self._first = False", "test_times_are_means_of_the_steps_since_the_last_report_but_the_first"),
        (
            "waited if self.mesh.reads else math.nan",
            "waited",
            "test_a_rank_that_is_handed_its_samples_does_not_wait_for_the_loader",
        ),
    )
    + _mutations(
        "rcm_mcore/training/networks.py",
        "tests/test_guards.py",
        (  # the time of a step would hold the wait for the slow rank: all are equally slow
            """        if before is not None:
            before()
        # The schedules hand over what they ran, which may be chunks of the network.
        finalize_model_grads([trained.ddp], *args, **kwargs)
""",
            """        finalize_model_grads([trained.ddp], *args, **kwargs)
        if before is not None:
            before()
""",
            "test_a_slow_rank_is_named",
        ),
    )
    + _mutations(
        "rcm_mcore/config/schema.py",
        "tests/test_guards.py",
        (
            "if not 1 < self.straggler_ratio",
            "if not 1 <= self.straggler_ratio",
            "test_impossible_settings_are_refused_by_field",
        ),
    )
)

OPERATOR = (
    _mutations(
        "rcm_mcore/training/throughput.py",
        "tests/test_throughput.py",
        ("self_attention = 2 *", "self_attention = 1 *", "test_flops_are_those_that_torch_counts_in_diffusers_network"),
        (
            "+ 3 * model.num_layers * self",
            "+ 2 * model.num_layers * self",
            "test_flops_of_passes_are_those_that_torch_counts_in_ours",
        ),
        (
            "+ image * (model.image_dim**2 ",
            "+ image * (model.image_dim ",
            "test_flops_are_those_that_torch_counts_in_diffusers_network",
        ),
        ("else 2, phase", "else 1, phase", "test_flops_of_a_step_are_those_of_the_passes_it_asks_for"),
        (
            "(rollout + 1 + teacher + backward)",
            "(1 + teacher + backward)",
            "test_flops_of_a_step_are_those_of_the_passes_it_asks_for",
        ),
        (") / self.ranks / seconds", ") / seconds", "test_rates_of_a_step"),
    )
    + _mutations(
        "rcm_mcore/training/stopwatch.py",
        "tests/test_throughput.py",
        ("            spans[-1][1].synchronize()\n", "            pass\n", "test_times_on_a_gpu_are_waited_for_once"),
    )
    + _mutations(
        "rcm_mcore/distill/steps.py",
        "tests/test_steps.py",
        (
            "(fake - teacher).flatten(1).norm(dim=1).sum()",
            "(fake - generated).flatten(1).norm(dim=1).sum()",
            "test_distillation_step",
        ),
    )
    + _mutations(
        "rcm_mcore/training/console.py",
        "tests/test_log.py",
        ('or line["step"] == self._total ', "", "test_lines_come_every_thirty_seconds_and_for_the_first_and_last_step"),
        ("now - self._last >= INTERVAL", "True", "test_lines_come_every_thirty_seconds_and_for_the_first_and_last_step"),
        ("maxlen=cycle", "maxlen=1", "test_a_line_says_what_is_done_and_when_the_run_ends"),
        ("* (seconds + saving)", "* seconds", "test_a_line_says_what_is_done_and_when_the_run_ends"),
    )
    + _mutations(
        "rcm_mcore/training/log.py",
        "tests/test_log.py",
        ("                    file.truncate(size)\n", "", "test_a_full_disk_loses_no_line"),
        ('values["step"], None', 'values["step"], self._save_seconds', "test_a_save_is_in_the_next_line_alone"),
    )
    + _mutations(
        "rcm_mcore/training/wandb_run.py",
        "tests/test_log.py",
        ('"g_norm": "norm/tangent"', '"g_norm": "norm/gradient"', "test_wandb_has_the_values_of_the_lines"),
        ('step=line["step"])', 'step=line["step"] - 1)', "test_wandb_has_the_values_of_the_lines"),
        ("text.replace(key, ", "text.replace(key[:0], ", "test_a_run_goes_on_without_wandb"),
        ("        except Exception as error:\n", "        except ValueError as error:\n", "test_a_run_goes_on_without_wandb"),
        ("self._thread.join(SECONDS + _MARGIN)", "self._thread.join()", "test_a_run_goes_on_without_wandb"),
        ("        except queue.Full:\n", "        except queue.Empty:\n", "test_lines_that_wandb_does_not_take_do_not_pile_up"),
    )
    + _mutations(
        "rcm_mcore/evaluation/run_report.py",
        "tests/test_run_report.py",
        (
            "        except ValueError:\n            continue\n",
            "        except KeyError:\n            continue\n",
            "test_the_command_line",
        ),
        ("escape(cell)", "cell", "test_events_and_the_newest_sheets_are_shown"),
        ("<h1>{name}</h1>", "<h1>{root.name}</h1>", "test_the_page_stands_alone_and_holds_text_as_text"),
        ("reverse=True)[:_SHEETS]", "reverse=False)[:_SHEETS]", "test_events_and_the_newest_sheets_are_shown"),
        ("is_log = 0 < 10 * low < high", "is_log = False", "test_curves_go_through_the_values"),
        ('if x.get("phase") == phase), "seconds"', 'if x.get("phase")), "seconds"', "test_the_numbers_are_those_of_the_lines"),
    )
)

FAULTS = (
    _mutations(
        "rcm_mcore/data/readers.py",
        "tests/test_data_faults.py",
        ("                self.member = member\n", "", "test_a_hiccup_changes_nothing"),
        ("if tries > len(_PAUSES):", "if tries > 2:", "test_a_hiccup_changes_nothing"),
        (
            'raise DamagedShard(f"cannot be read, tried {tries} times: {error}") from error',
            "raise",
            "test_a_shard_that_cannot_be_read_is_skipped_counted_once_and_named",
        ),
    )
    + _mutations(
        "rcm_mcore/data/shards.py",
        "tests/test_data_faults.py",
        (
            'raise DamagedShard(f"{_one_line(error)} in {member.name}") from error',
            "raise",
            "test_a_shard_that_is_cut_in_the_middle_of_a_read_loses_its_rest",
        ),
    )
    + _mutations(
        "rcm_mcore/data/loader.py",
        "tests/test_data_faults.py",
        ("            if seconds is None:\n", "            if True:\n", "test_many_slow_samples_are_no_stall"),
        ("min(_WARN_SECONDS, limit / 10)", "limit", "test_a_slow_shard_is_waited_for_and_named"),
    )
    + _mutations(
        "rcm_mcore/data/text.py",
        "tests/test_security.py",
        (
            "from_pretrained(tokenizer_folder, local_files_only=True, trust_remote_code=False)",
            "from_pretrained(tokenizer_folder, local_files_only=True)",
            "test_a_tokenizer_that_brings_code_does_not_run_it",
        ),
        ("    os.replace(partial, weights)\n", "", "test_what_is_written_has_the_modes_of_the_umask"),
    )
    + _mutations(
        "launch_slurm/launch.sh",
        "tests/test_security.py",
        ("""bash -c 'trap "" USR1 TERM; exec "$@"' bash "$@\"""", """bash -c "trap '' USR1 TERM; $*\"""",
         "test_words_of_a_command_line_are_never_run"),
    )
)  # fmt: skip

# Every table of this file.
MUTATIONS = [mutation for name, table in list(globals().items()) if name.isupper() for mutation in table]
