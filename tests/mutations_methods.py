"""Mistakes that were easy to make (mutations.py). Of discrete consistency, finite differences, MeanFlow and stages."""

from mutation import mutations

GRID = mutations(
    "rcm_mcore/diffusion/trigflow.py",
    "tests/test_methods.py",
    ("math.sqrt(2) * torch.erfinv(2 * u - 1)", "torch.erfinv(2 * u - 1)", "test_the_grid_has_the_quantiles_of_the_times"),
    (
        "trig_time(distribution.shift * u / (1 + (distribution.shift - 1) * u))\n    return",
        "distribution.shift * u / (1 + (distribution.shift - 1) * u)\n    return",
        "test_times_are_equally_likely_in_every_cell_of_the_grid",
    ),
)

STEPS = mutations(
    "rcm_mcore/distill/steps.py",
    "tests/test_methods.py",
    ("t, t_next = grid[above], grid[above - 1]", "t, t_next = draws.t_g, grid[above - 1]", "test_discrete_step"),
    (
        "over_sample((t - t_next).cos()) * x_t - over_sample((t - t_next).sin()) * teacher",
        "x_t - over_sample(t - t_next) * teacher",  # Euler in TrigFlow time
        "test_discrete_step",
    ),
    ("target = denoised(ahead, t_next, ", "target = denoised(ahead, t, ",
     "test_discrete_consistency_tends_to_the_continuous_one"),
    (
        "target = torch.where(over_sample(t_next) == 0, ahead, target)",
        "pass",
        "test_given_frames_have_targets_down_to_the_data",
    ),
    ("torch.maximum(t - step, t / 2)", "(t - step).clamp_min(0.0)", "test_finite_differences_stay_within_time"),
    (", (t + step).clamp_max(math.pi / 2)", ", t + step", "test_finite_differences_stay_within_time"),
    ("(high - low) / over_sample(after - before)", "(high - low) / (2 * step)", "test_finite_differences_stay_within_time"),
    ("trig_velocity(student, x + over_sample(at - t) * x_dot, at)", "trig_velocity(student, x, at)",
     "test_finite_differences_tend_to_the_tangent"),
    ("over_sample(speed) * central_difference(", "central_difference(", "test_finite_differences_tend_to_the_tangent"),
    ("_present(by_difference)[rows]", "_present(by_difference)[: len(rows)]", "test_steps_with_bad_samples_of_both_kinds"),
    ("x, time = Dual(x_s[rows], velocity[rows])", "x, time = Dual(x_s[rows], -velocity[rows])", "test_mean_flow_step"),
    ("told = batch.condition._replace(end=end)", "told = batch.condition._replace(end=s)", "test_mean_flow_step"),
    ("told.rows(rows)))", "told.rows(rows)._replace(end=end[: len(rows)])))", "test_steps_without_a_bad_sample"),
    ("finite_samples(error) & known[rows]", "finite_samples(error)", "test_steps_without_a_bad_sample"),
    ("x_t[rows], t[rows])\n\n    out, rows = _finite_forward(run, len(t), roles)\n    metrics = _counters(out, rows, len(t))\n"
     "    if out is None:\n        return None, metrics\n    assert isinstance(out, Tensor)",
     "x_t[rows], t[rows]).detach().requires_grad_()\n\n    out, rows = _finite_forward(run, len(t), roles)\n"
     "    metrics = _counters(out, rows, len(t))\n    if out is None:\n        return None, metrics\n"
     "    assert isinstance(out, Tensor)",
     "test_discrete_step"),
    ("discrete_tangent(ours, target[rows],", "discrete_tangent(ours, target[: len(rows)],", "test_steps_without_a_bad_sample"),
)  # fmt: skip

LOSSES = mutations(
    "rcm_mcore/distill/losses.py",
    "tests/test_methods.py",
    ("((t + t_next) / 2).cos() / (t - t_next)", "t.cos() / (t - t_next)", "test_the_step_from_pure_noise_is_learnt"),
    ("velocity - over_sample(s - end) * u_dot - u", "velocity + over_sample(s - end) * u_dot - u",
     "test_the_average_velocity_has_no_error"),
    ("velocity - over_sample(s - end) * u_dot - u", "velocity - over_sample(s) * u_dot - u",
     "test_empty_intervals_are_flow_matching_with_the_teacher"),
    ("error / over_sample(norm.square() + constant)", "error / over_sample(norm + constant)", "test_mean_flow_step"),
)  # fmt: skip

SAMPLER = mutations(
    "rcm_mcore/diffusion/samplers.py",
    "tests/test_methods.py",
    ("x = s[0] * noise.double()", "x = noise.double()", "test_average_velocities_are_sampled_exactly"),
    ("average(x, now, end).double()", "average(x, now, 0 * end).double()", "test_average_velocities_are_sampled_exactly"),
)

DRAWS = mutations(
    "rcm_mcore/distill/draws.py",
    "tests/test_draws.py",
    ("torch.where(instant, one, torch.minimum(one, other))", "torch.where(instant, one, other)",
     "test_intervals_end_before_they_begin"),
    ('times("time-end", distill.time_g)', 'times("time-end", distill.time_d)', "test_intervals_end_before_they_begin"),
    ("torch.where(instant, one, torch.maximum(one, other))", "torch.maximum(one, other)",
     "test_intervals_end_before_they_begin"),
    ('generator("instant", seed=seed, step=step, slot=s)', 'generator("instant", seed=seed, step=step, slot=s - slots[0])',
     "test_intervals_know_nothing_of_the_mesh"),
)  # fmt: skip

NETWORKS = [
    *mutations(
        "rcm_mcore/models/wan/model.py",
        "tests/test_interval.py",
        ("self._embed_number(s - end, self.interval_embedding)", "self._embed_number(end, self.interval_embedding)",
         "test_output_tangent_and_gradients_equal_diffusers"),
        ('name in ("head.head.weight", "interval_embedding.2.weight")', 'name == "head.head.weight"',
         "test_a_student_begins_as_its_teacher"),
        ("            self.mark_embedders(self.interval_embedding)\n", "", "test_its_parameters_are_counted"),
    ),
    *mutations(
        "rcm_mcore/models/cosmos/model.py",
        "tests/test_interval.py",
        ('name in ("head.head.weight", "interval_embedding.2.weight") or', 'name == "head.head.weight" or',
         "test_a_student_begins_as_its_teacher"),
        ("self._sinusoid(interval)", "self._sinusoid(2 * interval)", "test_output_tangent_and_gradients_equal_diffusers"),
        ("interval = None if end is None else s - end", "interval = None if end is None else end",
         "test_output_tangent_and_gradients_equal_diffusers"),
    ),
    *mutations(
        "rcm_mcore/models/common/dit.py",
        "tests/test_interval.py",
        ("end=condition.end), s)", "end=condition.end), Dual(s.primal, 2 * s.tangent) if isinstance(s, Dual) else s)",
         "test_tangent_equals_central_difference"),
    ),
    *mutations(
        "rcm_mcore/condition.py",
        "tests/test_interval.py",
        ('"end": (batch,) if model.interval else None', '"end": None if self.end is None else self.end.shape',
         "test_conditions_without_an_interval_are_refused"),
    ),
    *mutations(
        "rcm_mcore/training/networks.py",
        "tests/test_interval.py",
        ("if model.interval and seed is None:", "if False:", "test_a_student_begins_as_its_teacher"),
    ),
    *mutations(
        "rcm_mcore/checkpoint/network.py",
        "tests/test_interval.py",
        ("if new is not None and not any(name.startswith(new) for name in stored):", "if new is not None:",
         "test_a_student_begins_as_its_teacher"),
    ),
    *mutations(
        "rcm_mcore/training/estimate.py",
        "tests/test_interval.py",
        ("[0] * mesh.pp, interval_parameters(model)", "[0] * mesh.pp, 0", "test_its_parameters_are_counted"),
    ),
    *mutations(
        "rcm_mcore/interop/maps.py",
        "tests/test_interval.py",
        ("    if model.interval:\n        raise", "    if False:\n        raise", "test_no_other_format_takes_them"),
    ),
    *mutations(
        "rcm_mcore/config/schema.py",
        "tests/test_networks.py",
        ("difference_step: float = 1e-4", "difference_step: float = 1e-2",
         "test_differences_of_the_default_step_are_the_tangent"),
    ),
]  # fmt: skip

RUNS = [
    *mutations(
        "rcm_mcore/training/setup.py",
        "tests/test_method_runs.py",
        ('starts.get("student", starts["teacher"])(student_net)', 'starts["teacher"](student_net)',
         "test_a_stage_begins_with_the_student_of_another"),
        ("        if start and not resuming:\n", "        if False:\n", "test_pretraining_begins_with_another_network"),
        ('({"interval": False} if role == "teacher" else {})', "{}", "test_students_that_do_not_fit_are_refused"),
    ),
    *mutations(
        "rcm_mcore/sampling/request.py",
        "tests/test_method_runs.py",
        ('if model.interval != (config.sampler == "mean_flow"):', "if False:", "test_samplers_that_do_not_fit_are_refused"),
    ),
    *mutations(
        "rcm_mcore/training/throughput.py",
        "tests/test_throughput.py",
        ('by_hand = 2 if config.distill.consistency == "dcm"', 'by_hand = 1 if config.distill.consistency == "dcm"',
         "test_flops_of_other_consistency_terms_are_those_of_their_passes"),
        ("    times += interval if model.interval else 0\n", "", "test_flops_of_the_interval_are_those_that_torch_counts"),
    ),
    *mutations(
        "rcm_mcore/training/sheets.py",
        "tests/test_sheets.py",
        ("condition._replace(end=end))", "condition._replace(end=0 * end))", "test_students_of_meanflow_have_their_sampler"),
    ),
]  # fmt: skip

MUTATIONS = [*GRID, *STEPS, *LOSSES, *SAMPLER, *DRAWS, *NETWORKS, *RUNS]
