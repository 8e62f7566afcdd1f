"""Mistakes that were easy to make (mutations.py). Of pipeline stages, data, conversion, training, sampling and Slurm."""

from mutation import mutations

PIPELINE = mutations(
    "rcm_mcore/models/common/dit.py",
    "tests/test_training.py",
    ("param.allreduce = False", "param.allreduce = True", "test_equals_one_rank[pp2]"),
) + mutations(
    "rcm_mcore/training/pipeline.py",
    "tests/test_training.py",
    ("if not targets_follow_output(term):", "if True:", "test_equals_one_rank[pp2]"),
) + mutations(
    "rcm_mcore/parallel/stages.py",
    "tests/test_parallel.py",
    ("network(*call, chunk=chunk)", "network(*call)", "test_equals_one_rank[2-wan pp2-vpp2 45 none]"),
    ("dual.unstack(self.value, 0)", "dual.unstack(self.value.flip(0), 0)", "test_equals_one_rank[2-wan pp2 45 none]"),
) + mutations(
    "rcm_mcore/training/estimate.py",
    "tests/test_estimate.py",
    ("(len(trained) + distill)", "len(trained)", "test_states_of_14b_are_those_of_the_design[mesh0-179-0]"),
)  # fmt: skip

WORKERS = mutations(
    "rcm_mcore/data/workers.py",
    "tests/test_data_workers.py",
    ("samples[0] // self._dp_size % workers)", "0)", "test_batches_are_those_of_a_thread"),
    ("if v % size == rank}", "if v % size == 0}", "test_a_run_goes_on_with_other_processes"),
    ("if self.bad_samples > max(before, self._limit):", "if False:", "test_bad_samples_are_logged_here_and_counted_together"),
    ("logger.handle(record)", "pass", "test_bad_samples_are_logged_here_and_counted_together"),
    ("self._waits = message.shard, time.monotonic() - message.seconds", "pass", "test_a_shard_that_gives_nothing_is_named"),
    ("(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)", "()", "test_signals_are_the_training_s"),
    ("            one.process.kill()\n        end", "            pass\n        end",
     "test_a_shard_that_gives_nothing_is_named"),
    ("    os._exit(0)\n", "    pass\n", "test_processes_end_with_a_training_that_is_killed"),
    ("stdout=2", "stdout=write", "test_what_a_process_prints_does_not_reach_the_samples"),
    ("max(before, self._limit)", "self._limit", "test_bad_samples_of_before_are_forgiven"),
) + mutations(
    "rcm_mcore/data/loader.py",
    "tests/test_data_workers.py",
    ('"bad_samples": self._processes.bad_samples}', "}", "test_bad_samples_are_logged_here_and_counted_together"),
    ("state=self._state)", "state=self._readers.state() | {'samples': 0})", "test_a_run_goes_on_with_other_processes"),
)  # fmt: skip

DATA = mutations(
    "rcm_mcore/data/readers.py",
    "tests/test_data.py",
    ("self._readers.get(k % self._config.readers)", "self._readers.get(k % 2)",
     "test_order_is_the_same_under_every_data_parallel_size"),
    ("shard, shard.skip(self.member)", "shard, shard.samples()", "test_resumed_is_unbroken"),
    ('if state["shards_digest"] != self._digest:', "if False:", "test_a_changed_set_of_shards_or_readers_is_refused"),
) + mutations(
    "rcm_mcore/data/loader.py",
    "tests/test_data.py",
    ("(self._samples + j) % self._dp_size", "j % self._dp_size", "test_order_continues_when_the_global_batch_changes"),
    ("len(self._ready) < self._prefetch)", "len(self._ready) <= self._prefetch)",
     "test_state_is_that_of_the_batch_consumed_not_of_those_prepared"),
) + mutations(
    "rcm_mcore/data/shards.py",
    "tests/test_shards.py",
    ("weights_only=True", "weights_only=False", "test_a_malicious_pickle_is_refused_not_run"),
    ("if not tensors[name].sum().isfinite()", "if tensors[name].sum().isnan()",
     "test_bad_samples_are_skipped_counted_and_logged"),
    ('if model.condition == "first_last" and sample.latent', 'if model.condition == "other" and sample.latent',
     "test_samples_without_what_an_image_network_takes_are_bad_and_fine_for_others"),
) + mutations(
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
) + mutations(
    "rcm_mcore/data/image.py",
    "tests/test_encode.py",
    ("video = frames.new_zeros(", "video = -frames.new_ones(",  # black, not grey
     "test_given_frames_are_what_wans_pipeline_prepares"),
    ("hidden_states[-2]", "hidden_states[-1]", "test_given_frames_are_what_wans_pipeline_prepares"),
) + mutations(
    "rcm_mcore/data/media_input.py",
    "tests/test_media_input.py",
    ("<= (time + now) / 2:", "< now:", "test_frames_are_the_nearest_in_time"),
) + mutations(
    "rcm_mcore/data/text.py",
    "tests/test_text.py",
    ('"t5": (T5EncoderModel, False)', '"t5": (T5EncoderModel, True)', "test_embeddings_are_the_pipelines"),
) + mutations(
    "rcm_mcore/sampling/synthesize.py",
    "tests/test_synthesize.py",
    ("sampler.latents(good, rows)", "sampler.latents(range(len(good)), rows)",
     "test_sample_i_is_what_the_sampler_makes_of_line_i"),
)  # fmt: skip

INTEROP = mutations(
    "rcm_mcore/interop/tables.py",
    "tests/test_interop_names.py",
    ("torch.stack([x.unflatten(0, (heads, -1)) for x in xs], dim=1).flatten(0, 2)", "torch.cat(xs)",
     "test_mcore_names_and_layout[cosmos]"),
    ("name.removeprefix(_PREFIXES[which])", 'name.replace("net.", "")', "test_shapes_and_network_are_found[wan]"),
    ("if which != \"student\" and not name.startswith(_PREFIXES[which]):", "if False:",
     "test_networks_of_a_training_checkpoint_by_prefix"),
) + mutations(
    "rcm_mcore/interop/wan_names.py",
    "tests/test_interop_names.py",
    ('"norm3": "norm2",', '"norm3": "norm3",', "test_diffusers_own_converter_agrees_on_wan[wan]"),
    ('"cross_attn.linear_kv_img": ("cross_attn.k_img", "cross_attn.v_img")',
     '"cross_attn.linear_kv_img": ("cross_attn.v_img", "cross_attn.k_img")', "test_mcore_names_of_images[wan image]"),
) + mutations(
    "rcm_mcore/interop/cosmos_names.py",
    "tests/test_interop_names.py",
    ('"mlp.layer1": "ff.net.0.proj",\n    "mlp.layer2": "ff.net.2",',
     '"mlp.layer1": "ff.net.2",\n    "mlp.layer2": "ff.net.0.proj",',
     "test_diffusers_own_converter_agrees_on_cosmos[cosmos]"),
    ("channels + 2: \"frames\"", "channels + 2: \"text\"", "test_shapes_and_network_are_found[cosmos frames]"),
) + mutations(
    "rcm_mcore/interop/files.py",
    "tests/test_interop_files.py",
    ('map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False',
     "test_pickle_that_runs_code_is_refused[True]"),
    ("tensor.storage_offset() * tensor.dtype.itemsize", "0", "test_what_torch_saves_is_read"),
) + mutations(
    "rcm_mcore/interop/destination.py",
    "tests/test_interop_files.py",
    ("        yield partial\n", "        partial = path\n        yield partial\n",
     "test_a_failed_write_leaves_nothing[failure0-diffusers out]"),
) + mutations(
    "rcm_mcore/interop/destination.py",
    "tests/test_interop.py",
    ("if _digest(file) != digest:", "if False:", "test_manifests"),
) + mutations(
    "rcm_mcore/interop/shipped/rcm_scheduler.py",
    "tests/test_interop_pipeline.py",
    ("s = [math.sin(t) / (math.sin(t) + math.cos(t)) for t in self._times(num_inference_steps)]",
     "s = [math.sin(t) for t in self._times(num_inference_steps)]", "test_wan_pipeline_equals_our_sampler[4]"),
    ("x0 = x0 + self.sigmas[i + 1] * noise", "x0 = (1 - self.sigmas[i + 1]) * x0 + self.sigmas[i + 1] * noise",
     "test_cosmos_pipeline_equals_our_sampler"),
)  # fmt: skip

TRAINING = mutations(
    "rcm_mcore/training/networks.py",
    "tests/test_training.py",
    ("trained.ddp.no_sync if finalize else contextlib.nullcontext", "trained.ddp.no_sync",
     "test_equals_one_rank[dp2-overlap-warmup]"),
    ("run if finalize else None", "run", "test_equals_one_rank[tp2-sp]"),  # two a step
) + mutations(
    "rcm_mcore/training/optim.py",
    "tests/test_training.py",
    ("optimizer.tp_group = groups.tp\n", "optimizer.tp_group = groups.dp\n", "test_equals_one_rank[tp2]"),
)  # fmt: skip

RESUME = (
    mutations(
        "rcm_mcore/training/state.py",
        "tests/test_resume.py",
        ("one.steps = state.own_steps[one.name]", "pass", "test_resumed_on_the_same_mesh_is_bit_equal"),
    )
    + mutations(
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
    + mutations(
        "rcm_mcore/training/setup.py",
        "tests/test_resume.py",
        (
            "total_steps=critic_steps, has_ema=False",
            "total_steps=critic_steps, has_ema=True",
            "test_each_step_changes_its_own_network_and_the_student_alone_has_an_ema",
        ),
    )
    + mutations(
        "rcm_mcore/checkpoint/folder.py",
        "tests/test_checkpoint.py",
        ("if _crc32(path / name) != crc:", "if False:", "test_a_damaged_newest_is_passed_over_loudly"),
    )
    + mutations(
        "rcm_mcore/checkpoint/folder.py",
        "tests/test_saver.py",
        ("if not keep_every or s % keep_every", "if True", "test_what_keep_every_divides_stays"),
        ("_try_to_remove(doomed)", "shutil.rmtree(doomed)", "test_what_cannot_be_removed_does_not_fail_a_save"),
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "test_two_runs_cannot_share_a_folder"),
    )
    + mutations(
        "rcm_mcore/training/saver.py",
        "tests/test_saver.py",
        ("pieces = self._host.copy(pieces)", "pass", "test_a_checkpoint_holds_the_state_of_its_step"),
        ("if last or self._failed_before:", "if last:", "test_one_failed_save_is_forgiven_and_two_are_not"),
        ("if last or self._failed_before:", "if self._failed_before:", "test_the_last_save_must_succeed"),
        ("            self._failed_before = False\n", "", "test_one_failed_save_is_forgiven_and_two_are_not"),
        ("            self._thread.join()\n", "            pass\n", "test_a_save_waits_for_the_one_before"),
    )
    + mutations(
        "rcm_mcore/interop/dcp.py",
        "tests/test_saver.py",
        ("        if first < last:\n", "        if first <= last:\n", "test_a_range_is_made_of_few_boxes"),
        ("zlib.crc32(data, self.crc)", "zlib.crc32(data)", "test_a_checkpoint_is_whole"),
        ("raise self._error from None", "pass", "test_a_disk_that_is_full_in_the_middle_of_a_tensor_is_called_so"),
    )
)

VAE = mutations(
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
    mutations(
        "rcm_mcore/sampling/sampler.py",
        "tests/test_sample.py",
        ("seed=s, step=0, slots=[i])", "seed=s, step=0, slots=[0])", "test_samples_of_several_seeds"),
        ("seed=s, step=0, slots=[i])", "seed=0, step=0, slots=[i])", "test_samples_of_several_seeds"),
    )
    + mutations(
        "rcm_mcore/sampling/sampler.py",
        "tests/test_sample_given.py",
        ("told[draw.given] for draw in batch", "told[mine[0].given] for draw in batch", "test_a_teacher_is_the_image_pipeline"),
        (
            "self._text_encoder().token_counts(prompts)",
            "map(len, self._text_encoder().encode(prompts))",
            "test_a_prompt_that_the_encoder_would_cut_is_refused",
        ),
    )
    + mutations(
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
    + mutations(
        "rcm_mcore/data/image.py",
        "tests/test_sample_given.py",
        (
            "rows = image_encoder.encode(frames)",
            "rows = image_encoder.encode(frames.flip(0))",
            "test_first_and_last_frame_are_the_image_pipelines",
        ),
    )
    + mutations(
        "rcm_mcore/data/media_input.py",
        "tests/test_sample_given.py",
        ("size) for frame in last]", "size) for frame in reversed(last)]", "test_a_student_is_the_video_pipeline"),
    )
    + mutations(
        "rcm_mcore/sampling/folder.py",
        "tests/test_sample_given.py",
        ("{path: _sha256(Path(path)) for path", '{path: "" for path', "test_a_picture_that_has_changed_is_refused"),
    )
    + mutations(
        "rcm_mcore/sampling/folder.py",
        "tests/test_sample.py",
        ("if sections[name].get(field) != value:", "if False:", "test_another_request_is_refused"),
        ("not self._part(d).is_file()]", "True]", "test_a_killed_run_leaves_complete_files_and_goes_on"),
    )
    + mutations(
        "rcm_mcore/sampling/generate.py",
        "tests/test_sample.py",
        ("background.put(draw, row)", "finisher(draw, row)", "test_decoding_goes_on_beside_the_next_batch"),
    )
    + mutations(
        "rcm_mcore/sampling/background.py",
        "tests/test_sample.py",
        (">= self._ahead", ">= 99", "test_background_is_bounded_and_raises"),
        ("while self._pending and error is None:", "while False:", "test_background_is_bounded_and_raises"),
    )
    + mutations(
        "rcm_mcore/data/media.py",
        "tests/test_media.py",
        ("dst_colorspace=_BT709, ", "", "test_an_mp4_decodes_to_the_video"),
        ("        partial.unlink(missing_ok=True)\n", "", "test_a_write_that_fails_leaves_nothing"),
    )
)

SLURM = (
    mutations(
        "rcm_mcore/training/loop.py",
        "tests/test_signals.py",
        ("dist.ReduceOp.MAX)", "dist.ReduceOp.MIN)", "test_every_rank_saves_the_same_step_and_stops"),
        (
            "        if run.state.step != self.saver.saved_step:\n            self._save()\n        while",
            "        while",
            "test_every_rank_saves_the_same_step_and_stops",
        ),
    )
    + mutations(
        "rcm_mcore/train.py",
        "tests/test_train_cli.py",
        (" or under_torchrun else", " else", "test_a_run_that_was_asked_to_stop_exits_with_75"),
    )
    + mutations(
        "rcm_mcore/requeue.py",
        "tests/test_launch_slurm.py",
        ('and earlier[-1]["step"] == attempt["step"]', "", "test_two_failures_at_the_same_step_end_the_job"),
        ('and earlier[-1]["exit_code"] ', "", "test_two_failures_at_the_same_step_end_the_job"),
        ('if line["job"] == job]', "]", "test_two_failures_at_the_same_step_end_the_job"),
        ('len({line["saved"] for line in last}) == 1', "True", "test_attempts_without_a_new_checkpoint_end_the_job"),
    )
    + mutations(
        "launch_slurm/launch.sh",
        "tests/test_launch_slurm.py",
        ('trap "" USR1 TERM; ', "", "test_arguments_reach_the_trainer_as_they_are"),
        ('-m rcm_mcore.train "$@"', "-m rcm_mcore.train $*", "test_arguments_reach_the_trainer_as_they_are"),
        ("$verdict == 75", "$verdict != 0", "test_two_failures_at_the_same_step_end_the_job"),
    )
)

# Every table of this file.
MUTATIONS = [mutation for name, table in list(globals().items()) if name.isupper() for mutation in table]
