"""Mistakes that were easy to make (mutations.py). Of the laboratory: who runs where, and what is compared with what."""

from mutation import mutations

REPORT = mutations(
    "rcm_mcore/lab/results.py",
    "tests/test_lab.py",
    ("runs[seed][name] - others[seed][name]", "runs[seed][name] - others[min(others)][name]",
     "test_differences_are_of_the_same_seed"),
    ("others = {row.against for row in own}", "others = {order[0].name}", "test_variants_of_scm_are_compared_with_scm"),
    ("row.name != row.against and row.against in found", "row.against in found", "test_differences_are_of_the_same_seed"),
    ("for label, runs in known.items() if len(runs) > 1}", "for label, runs in known.items()}",
     "test_differences_are_of_the_same_seed"),
    ('if not name.endswith(("Euler 1", "Euler 2"))', "if True", "test_a_trade_off_leaves_out_the_teacher_of_one_and_two_steps"),
    ('row.name if len(stages) == 1 else f"{row.name}, stage {i}"', "row.name", "test_logs_of_stages"),
)  # fmt: skip

ROWS = mutations(
    "rcm_mcore/lab/rows.py",
    "tests/test_lab.py",
    ('"bf16_time": True}, against="sCM")', '"bf16_time": True})', "test_variants_of_scm_are_compared_with_scm"),
    ('against="rCM" if row.name == "rCM" else "rCM, 3x"', 'against="rCM"', "test_rows_by_name_and_group"),
    ("if row.times == 1]", "]", "test_rows_by_name_and_group"),
)

GPUS = mutations(
    "rcm_mcore/lab/scene_task.py",
    "tests/test_lab.py",
    ("(batch % ranks or config.data.readers % (ranks", "(batch % ranks or 0 % (ranks",
     "test_the_teacher_of_scenes_is_trained_on_all_gpus_that_divide_its_batch"),
    ('fields=[f"pretrain.network={root}/frames_run"]', "fields=[]",
     "test_the_teacher_of_scenes_is_trained_on_all_gpus_that_divide_its_batch"),
    ("< steps:  # torchrun", "< 0:  # torchrun", "test_a_stage_that_was_stopped_is_not_done"),
    ('.exists()) and not (root / "frames_run").exists():', ".exists()) and False:",
     "test_scenes_of_an_earlier_version_are_refused"),
    ("shutil.copyfile(shared / name, partial)", "continue", "test_scenes_are_judged_by_the_networks_of_the_example"),
) + mutations(
    "tools/lab.py",
    "tests/test_lab.py",
    ("visible[i % count] if count > 1", "visible[0] if count > 1", "test_jobs_are_dealt_to_the_gpus"),
    ('os.environ["CUDA_VISIBLE_DEVICES"] = gpu', "pass", "test_a_job_sees_its_gpu"),
    ('0 if task == "plane" else torch.cuda.device_count()', "torch.cuda.device_count()", "test_jobs_are_dealt_to_the_gpus"),
    ("has_baselines = min(map(len, read_baselines(root).values()), default=0) >= args.seeds",
     "has_baselines = bool(read_baselines(root))", "test_what_is_there_is_not_done_again"),
) + mutations(
    "rcm_mcore/lab/videos.py",
    "tests/test_lab.py",
    ('"--standalone", f"--nproc-per-node={ranks}"] if ranks > 1', '"--standalone", "--nproc-per-node=1"] if ranks > 1',
     "test_a_run_on_two_ranks"),
    ('if show and " INFO step " in line:', "if False:", "test_a_run_on_two_ranks"),
    ("row.times * task.updates // len(row.plan), None", "task.updates // len(row.plan), None",
     "test_longer_rows_have_three_times_the_updates"),
    ('"updates": row.times * task.updates', '"updates": task.updates', "test_longer_rows_have_three_times_the_updates"),
) + mutations(
    "rcm_mcore/lab/plane_task.py",
    "tests/test_lab.py",
    ("updates = row.times * pretraining", "updates = pretraining", "test_longer_rows_have_three_times_the_updates"),
    ("steps=pretraining, width", "steps=updates, width", "test_longer_rows_have_three_times_the_updates"),
)  # fmt: skip

SAMPLER = mutations(
    "rcm_mcore/sampling/sampler.py",
    "tests/test_sample.py",
    ("if self._joined and dist.is_initialized():", "if False:", "test_samplers_leave_nothing_behind"),
)

MUTATIONS = [*REPORT, *ROWS, *GPUS, *SAMPLER]
