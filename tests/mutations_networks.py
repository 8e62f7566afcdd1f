"""Mistakes that were easy to make (mutations.py). Of networks, kernels and losses."""

from mutation import mutations

DUAL = mutations(
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
        return fn(*args, **options)
""",
        """    if not any(isinstance(a, Dual) for a in args):
        return fn(*args, **options)
    args = tuple(a if isinstance(a, Dual) else Dual(a, a) for a in args)
    where = list(range(len(args)))
""",
        "test_bias_reaches_the_primal_alone",
    ),
    ("return Dual(value, fn(x.tangent))", "return unstack(fn(stack(x)))", "test_linear_copies_nothing_and_equals_jvp"),
    (  # a graph for the tangent
        "    with torch.no_grad():\n        return Dual(value, fn(x.tangent))",
        "    return Dual(value, fn(x.tangent))",
        "test_a_tangent_that_has_a_graph_is_cut_off",
    ),
)

TRIGFLOW = mutations(
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
    (
        "s = distribution.shift * u / (1 + (distribution.shift - 1) * u)",
        "s = distribution.shift * u / (1 + distribution.shift * u)",
        "test_shifted_times",
    ),
)

SAMPLERS = mutations(
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

LOSSES = mutations(
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

PHASES = mutations(
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

SCHEDULES = mutations(
    "rcm_mcore/training/schedule.py",
    "tests/test_phases.py",
    ("min(config.warmup_start_lr, peak)", "config.warmup_start_lr", "test_warm_up_never_starts_above_the_peak"),
    ("* step / config.warmup_steps", "* (step + 1) / config.warmup_steps", "test_warm_up_is_linear_then_constant"),
    ("total - 1 - config.warmup_steps", "total - config.warmup_steps", "test_linear_decay_ends_on_the_last_step"),
    ("max(1, total - 1 -", "max(1, total - 1 + 0 *", "test_cosine_decay"),
    ("min(1.0, (step - config.warmup_steps)", "max(0.0, (step - config.warmup_steps)",
     "test_rates_stay_at_the_end_beyond_the_last_step"),
    ("(1 - config.min_lr_ratio) * share", "share", "test_cosine_decay"),
) + mutations(
    "rcm_mcore/distill/ema.py",
    "tests/test_phases.py",
    ("power_gamma(length) + 1.0", "power_gamma(length)", "test_ema_averages_with_the_power_profile"),
    ("1.0 / (step + 1)", "1.0 / (step + 2)", "test_ema_averages_with_the_power_profile"),
    (".real.max()", ".real.min()", "test_gamma_is_the_largest_root"),
    ("[1.0, 7.0, 16.0 - length**-2, 12.0 - length**-2]", "[1.0, 7.0, 16.0 - length**-2, 12.0]",
     "test_gamma_of_the_published_lengths"),
)  # fmt: skip

DRAWS = mutations(
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
) + mutations(
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

STEPS = mutations(
    "rcm_mcore/distill/steps.py",
    "tests/test_steps.py",
    ("speed = t.cos() * t.sin()", "speed = torch.ones_like(t)", "test_consistency_step"),
    ("Dual(t[rows], speed[rows])", "Dual(t[rows], 0 * speed[rows])", "test_consistency_step"),
    ("warmup=phase.warmup", "warmup=1.0", "test_consistency_step"),
    ("scale_tangent=distill.scale_tangent", "scale_tangent=True", "test_consistency_step"),
    ("x_t, t)\n    speed =", "x_t.float().double(), t)\n    speed =", "test_consistency_step"),
    ("distill.scm_weight * loss / count", "distill.scm_weight * loss / len(out)",
     "test_consistency_step_without_a_bad_sample"),
    ("primal(teacher)[rows]\n", "primal(teacher)[: len(rows)]\n", "test_consistency_step_with_bad_samples_of_both_kinds"),
    ("distill.scale_tangent\n    )\n    usable = _agree(finite_samples(g), roles)",
     "distill.scale_tangent\n    )\n    usable = _agree(t[rows] >= 0, roles)", "test_consistency_step_without_a_bad_sample"),
    ("torch.where(usable, gap, 0.0).sum()", "gap.sum()", "test_consistency_step_without_a_bad_sample"),
    ("if bool(good.all()):", "if True:", "test_consistency_step_without_a_bad_sample"),
    ("run(rows) if len(rows) else None", "run(rows)", "test_no_loss_when_every_sample_is_bad"),
    ("dist.ReduceOp.MIN", "dist.ReduceOp.MAX", "test_ranks_of_a_model_agree_on_what_they_leave_out"),
    ("distill.scale_tangent\n    )\n    usable = _agree(finite_samples(g), roles)",
     "distill.scale_tangent\n    )\n    usable = finite_samples(g)",
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
) + mutations(
    "rcm_mcore/distill/roles.py",
    "tests/test_steps.py",
    ("unconditional + guidance *", "conditional + guidance *", "test_distillation_step"),
    ("conditional, unconditional = network", "unconditional, conditional = network", "test_consistency_step"),
) + mutations(
    "rcm_mcore/distill/rollout.py",
    "tests/test_steps.py",
    ("with torch.no_grad():", "with torch.enable_grad():", "test_distillation_step"),
    ("noise[k + 1], times[k + 1]", "noise[k], times[k + 1]", "test_distillation_step"),
    ("noise[k + 1], times[k + 1]", "noise[k + 1], times[k]", "test_critic_step"),
    ("range(len(times) - 1)", "range(len(times) - 2)", "test_critic_step"),
)  # fmt: skip

OPTIM = mutations(
    "rcm_mcore/training/optim.py",
    "tests/test_optim.py",
    ('torch.full((), float(group["step"])', "torch.full((), 1.0", "test_equals_adamw_with_beta1_zero"),
    (
        'weight_decay=group["weight_decay"],\n            eps',
        "weight_decay=0.0,\n            eps",
        "test_equals_adamw_with_beta1_zero",
    ),
    ("beta1=0.0,", "beta1=0.5,", "test_equals_adamw_with_beta1_zero"),
    ('eps=group["eps"],', "eps=0.1,", "test_equals_adamw_with_beta1_zero"),
    ("if not params:\n                continue", "pass", "test_groups_count_their_own_steps"),
)

WAN = mutations(
    "rcm_mcore/models/wan/model.py",
    "tests/test_networks.py",
    ("if self.model.bf16_time:", "if True:", "test_output_equals_diffusers"),
    ("TIME_SCALE * s", "TIME_SCALE * s.detach()", "test_tangent_equals_jvp_of_diffusers"),
    ("mask[:, -1, -1] = 1", "mask[:, 0, -1] = 1", "test_output_equals_diffusers[wan-first_last]"),
    ("torch.cat([x, mask, condition.latents.to(x.dtype)], 1)", "torch.cat([x, condition.latents.to(x.dtype), mask], 1)",
     "test_output_equals_diffusers[wan-image]"),
    ("IMAGE_EPS = 1e-5", "IMAGE_EPS = 1e-6", "test_output_equals_diffusers[wan-image]"),
) + mutations(
    "rcm_mcore/models/common/blocks.py",
    "tests/test_networks.py",
    ("None if image is None else image.grad", "None", "test_gradients_equal_diffusers[wan-image-full]"),
) + mutations(
    "rcm_mcore/models/common/elementwise.py",
    "tests/test_networks.py",
    ("torch.where(given, x[1], x[0])", "torch.where(given, x[0], x[1])", "test_output_equals_diffusers[cosmos-frames]"),
) + mutations(
    "rcm_mcore/models/cosmos/model.py",
    "tests/test_networks.py",
    ("given.to(x.dtype).expand_as(padding), padding]", "padding, padding]", "test_output_equals_diffusers[cosmos-frames]"),
    ("x = torch.where(given, condition.latents.to(x.dtype), x)", "pass",
     "test_output_equals_diffusers[cosmos-frames]"),
) + mutations(
    "rcm_mcore/models/common/dit.py",
    "tests/test_networks.py",
    ("zip(positions, widths, bases)", "zip((positions[0], positions[2], positions[1]), widths, bases)",
     "test_output_equals_diffusers"),
    ("torch.where(frames_given(condition, x), exact.to(v.dtype), v)", "v", "test_given_frames_are_denoised_to_themselves"),
) + mutations(
    "rcm_mcore/models/common/layers.py",
    "tests/test_networks.py",
    (  # the bias is added to the tangent rows as well
        "qkv, positions = apply(self.linear_qkv, u),",
        "qkv, positions = dual.linear(lambda z: z + self.linear_qkv.bias, apply(self.linear_qkv, u)),",
        "test_tangent_equals_jvp_of_diffusers",
    ),
) + mutations(
    "rcm_mcore/models/common/attention.py",
    "tests/test_wan.py",
    (  # the cache of the one-pass dual is ignored
        "known = None if cache is None or cache.out is None or cache.lse is None else (cache.out, cache.lse)",
        "known = None",
        "test_one_pass_keeps_no_tangent_and_calls_attention_once",
    ),
    ("cache is not None and known is None", "False", "test_selective_recompute_does_not_repeat_the_self_attention"),
) + mutations(
    "kernels/rcm_kernels/blockwise.py",
    "tests/test_networks.py",
    (  # lse_dot * out is not taken off out_dot
        ".addcmul_(A, rest, value=-1)",
        ".addcmul_(A, self.c.view(lse.shape))",
        "test_tangent_equals_jvp_of_diffusers",
    ),
)  # fmt: skip

PARALLEL = mutations(
    "rcm_mcore/parallel/sequence.py",
    "tests/test_parallel.py",
    ("        dist.all_reduce(grad, group=ctx.group)\n", "", "test_equals_one_rank[2-wan tp2 72 none]"),  # identity backward
    ("tensor_parallel_output_grad=False", "tensor_parallel_output_grad=True", "test_equals_one_rank[2-wan tp2-sp 72 none]"),
    ("        work.wait()\n        del sent", "        del sent", "test_equals_one_rank[2-wan tp2-sp 72 one_pass]"),
) + mutations(
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
) + mutations(
    "rcm_mcore/models/common/linears.py",
    "tests/test_parallel.py",
    ("if group.size() > 1 and isinstance(layer, RowParallelLinear)", "if False", "test_equals_one_rank[2-wan tp2 72 one_pass]"),
) + mutations(
    "rcm_mcore/dual.py",
    "tests/test_fused.py",
    ("*map(_laid_out_alike, args)", "*args", "test_halves_of_one_buffer"),
) + mutations(
    "rcm_mcore/models/wan/model.py",
    "tests/test_parallel.py",
    ("param.sequence_parallel = False  #", "param.sequence_parallel = True  #", "test_equals_one_rank[2-wan tp2-sp 72 none]"),
    ("            whole += self.img_emb.parameters()\n", "",
     "test_equals_one_rank[2-wan-first_last tp2-sp 45 one_pass]"),
)  # fmt: skip

KERNELS = mutations(
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
) + mutations(
    "kernels/rcm_kernels/attention.py",
    "tests/test_attention.py",
    ("        ctx.mark_non_differentiable(lse)\n", "", "test_lse_carries_no_gradient"),
    ("return *flash_attention_backward(dout, *ctx.saved_tensors, scale=ctx.scale), None",
     "return *flash_attention_backward(dout, *ctx.saved_tensors), None", "test_gradients_equal_autograd"),
)  # fmt: skip

PORTABLE = mutations(
    "kernels/rcm_kernels/portable_kernel.py",
    "tests/test_kernels.py",
    ("S = tl.where((columns < keys)[None, :], S, float(\"-inf\"))", "pass", "TestJvp::test_within_the_budget"),
    ("T * shrink[:, None] + back[:, None] * O", "T * shrink[:, None]", "TestJvp::test_a_mean_that_wanders_along_the_keys"),
    ("r * shrink + back * l_before + tl.sum(H, 1)", "r * shrink + tl.sum(H, 1)", "TestJvp::test_strides_and_scales"),
    ("        O *= shrink[:, None]\n", "", "TestJvp::test_rising_scores"),
    ("center = (c * l_before + tl.sum(P * S_dot, 1)) / l", "center = c", "TestJvp::test_sharp_attention"),
    ("            S_dot *= scale\n", "", "TestJvp::test_within_the_budget"),
    ("tl.store(lse_dot + at, c + rest", "tl.store(lse_dot + at, rest", "TestJvp::test_lse_dot_is_the_finite_difference_of_lse"),
) + mutations(
    "kernels/rcm_kernels/portable.py",
    "tests/test_kernels.py",
    ("V_TANGENT=v_dot is not None", "V_TANGENT=k_dot is not None", "TestJvp::test_within_the_budget"),
) + mutations(
    "kernels/rcm_kernels/backends.py",
    "tests/test_backends.py",
    ("        if reason is not None:\n            raise", "        if False:\n            raise",
     "test_a_backend_asked_for_by_name_never_gives_way"),
    ("    wanted = _wanted[function]\n    if wanted != AUTO:", "    wanted = AUTO\n    if wanted != AUTO:",
     "test_a_choice_is_followed_and_taken_back"),
)  # fmt: skip

RING = mutations(
    "rcm_mcore/parallel/ring.py",
    "tests/test_ring.py",
    ("yield tuple(x[:, :count] for x in block)\n", "yield tuple(block)\n", "test_equals_one_rank[2-passed on-21-out]"),
    ("wide_out=group is not None", "wide_out=False", "test_blocks_whose_lse_dot_differ_lose_no_digits[4-out_dot]"),
    ("total[:, : part.shape[1]] += part", "total[:, : part.shape[1]] = part", "test_equals_one_rank[2-passed on-24-dk]"),
    ("(group.rank() - step) % group.size()", "(group.rank() + step) % group.size()",
     "test_equals_one_rank[4-passed on-21-out]"),
) + mutations(
    "rcm_mcore/parallel/shared_memory.py",
    "tests/test_ring.py",
    ("theirs((rank - step) % size)", "theirs((rank + step) % size)", "test_equals_one_rank[4-shared-21-out]"),
    ("(peers.group.rank() + self.step) % size", "(peers.group.rank() - self.step) % size",
     "test_equals_one_rank[4-shared-24-dk]"),
    ("part[:, x.shape[1] :].zero_()", "pass", "test_equals_one_rank[4-shared-21-gradient of padding]"),
) + mutations(
    "kernels/rcm_kernels/merge.py",
    "tests/test_ring.py",
    ("weight * (rate - lse_dot)", "weight * rate", "test_equals_one_rank[2-passed on-24-out_dot]"),
    ("(weights * torch.stack(lse_dots)).sum(0)", "lse_dots[0]", "test_equals_one_rank[2-passed on-24-lse_dot]"),
) + mutations(
    "kernels/rcm_kernels/merge_kernel.py",
    "tests/test_merge.py",
    ("mask=here, other=0.0) - rate)", "mask=here, other=0.0))", "test_the_kernel_equals_pytorch[dtype0-16]"),
    ("- highest) / total", "- highest)", "test_the_kernel_equals_pytorch[dtype0-16]"),
) + mutations(
    "rcm_mcore/parallel/exchange.py",
    "tests/test_parallel.py",
    ("ctx.join, ctx.split)", "ctx.split, ctx.join)", "test_equals_one_rank[2-wan cp2-all_to_all 72 none]"),
) + mutations(
    "rcm_mcore/models/common/dit.py",
    "tests/test_parallel.py",
    (".chunk(self.cp_group.size())[self.cp_group.rank()]", ".chunk(self.cp_group.size())[0]",
     "test_equals_one_rank[2-wan cp2-ring 72 none]"),
    ("given = self._scatter((frame[:, None] < condition.frames)[..., None])",
     "given = (frame[:, None] < condition.frames)[..., None][: self.hidden_shape(x)[0]]",
     "test_equals_one_rank[2-cosmos-frames cp2-ring 45 one_pass]"),
    ("self._gather(rows)[:tokens]", "self._gather(rows).roll(1, 0)[:tokens]", "test_equals_one_rank[2-wan cp2-ring 45 none]"),
) + mutations(
    "rcm_mcore/parallel/ring.py",
    "tests/test_parallel.py",
    ("yield tuple(x[:, :tokens] for x in own)", "yield own", "test_equals_one_rank[2-wan tp2-sp 45 none]"),
) + mutations(
    "rcm_mcore/training/setup.py",
    "tests/test_training.py",
    ("reads=mesh.reads", "reads=True", "test_equals_one_rank[cp2]"),
)  # fmt: skip

# Every table of this file.
MUTATIONS = [mutation for name, table in list(globals().items()) if name.isupper() for mutation in table]
