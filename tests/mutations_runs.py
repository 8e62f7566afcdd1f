"""Mistakes that were easy to make (mutations.py). Of what a run survives and tells."""

from mutation import mutations

SHEETS = (
    mutations(
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
            "            self._exchange_ema()\n        self.weights.start()\n",
            "            self._exchange_ema()\n",
            "test_so_is_one_of_data_parallel_ranks",
        ),
    )
    + mutations(
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
    + mutations(
        "rcm_mcore/training/loop.py",
        "tests/test_sheets.py",
        ("run.state.step % self.config.log.sheet_every == 0", "True", "test_a_sheet_is_written_every_so_many_steps"),
    )
    + mutations(
        "rcm_mcore/training/setup.py",
        "tests/test_sheets.py",
        ("    check_sheets(config)\n", "", "test_a_vae_that_cannot_decode_is_refused_at_the_start"),
    )
    + mutations(
        "rcm_mcore/data/media.py",
        "tests/test_sheets.py",
        ("columns = columns or min(", "columns = min(", "test_rows_are_prompts_and_columns_are_networks"),
    )
)

GUARDS = (
    mutations(
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
    + mutations(
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
    + mutations(
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
    + mutations(
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
    + mutations(
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
    mutations(
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
    + mutations(
        "rcm_mcore/training/stopwatch.py",
        "tests/test_throughput.py",
        ("            spans[-1][1].synchronize()\n", "            pass\n", "test_times_on_a_gpu_are_waited_for_once"),
    )
    + mutations(
        "rcm_mcore/distill/steps.py",
        "tests/test_steps.py",
        (
            "(fake - teacher).flatten(1).norm(dim=1).sum()",
            "(fake - generated).flatten(1).norm(dim=1).sum()",
            "test_distillation_step",
        ),
    )
    + mutations(
        "rcm_mcore/training/console.py",
        "tests/test_log.py",
        ('or line["step"] == self._total ', "", "test_lines_come_every_thirty_seconds_and_for_the_first_and_last_step"),
        ("now - self._last >= INTERVAL", "True", "test_lines_come_every_thirty_seconds_and_for_the_first_and_last_step"),
        ("maxlen=cycle", "maxlen=1", "test_a_line_says_what_is_done_and_when_the_run_ends"),
        ("* (seconds + saving)", "* seconds", "test_a_line_says_what_is_done_and_when_the_run_ends"),
    )
    + mutations(
        "rcm_mcore/training/log.py",
        "tests/test_log.py",
        ("                    file.truncate(size)\n", "", "test_a_full_disk_loses_no_line"),
        ('values["step"], None', 'values["step"], self._save_seconds', "test_a_save_is_in_the_next_line_alone"),
    )
    + mutations(
        "rcm_mcore/training/wandb_run.py",
        "tests/test_log.py",
        ('"g_norm": "norm/tangent"', '"g_norm": "norm/gradient"', "test_wandb_has_the_values_of_the_lines"),
        ('step=line["step"])', 'step=line["step"] - 1)', "test_wandb_has_the_values_of_the_lines"),
        ("text.replace(key, ", "text.replace(key[:0], ", "test_a_run_goes_on_without_wandb"),
        ("        except Exception as error:\n", "        except ValueError as error:\n", "test_a_run_goes_on_without_wandb"),
        ("self._thread.join(SECONDS + _MARGIN)", "self._thread.join()", "test_a_run_goes_on_without_wandb"),
        ("        except queue.Full:\n", "        except queue.Empty:\n", "test_lines_that_wandb_does_not_take_do_not_pile_up"),
    )
    + mutations(
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
    mutations(
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
    + mutations(
        "rcm_mcore/data/shards.py",
        "tests/test_data_faults.py",
        (
            'raise DamagedShard(f"{_one_line(error)} in {member.name}") from error',
            "raise",
            "test_a_shard_that_is_cut_in_the_middle_of_a_read_loses_its_rest",
        ),
    )
    + mutations(
        "rcm_mcore/data/loader.py",
        "tests/test_data_faults.py",
        ("            if seconds is None:\n", "            if True:\n", "test_many_slow_samples_are_no_stall"),
        ("min(_WARN_SECONDS, limit / 10)", "limit", "test_a_slow_shard_is_waited_for_and_named"),
    )
    + mutations(
        "rcm_mcore/data/text.py",
        "tests/test_security.py",
        (
            "from_pretrained(tokenizer_folder, local_files_only=True, trust_remote_code=False)",
            "from_pretrained(tokenizer_folder, local_files_only=True)",
            "test_a_tokenizer_that_brings_code_does_not_run_it",
        ),
        ("    os.replace(partial, weights)\n", "", "test_what_is_written_has_the_modes_of_the_umask"),
    )
    + mutations(
        "launch_slurm/launch.sh",
        "tests/test_security.py",
        ("""bash -c 'trap "" USR1 TERM; exec "$@"' bash "$@\"""", """bash -c "trap '' USR1 TERM; $*\"""",
         "test_words_of_a_command_line_are_never_run"),
    )
)  # fmt: skip

# Every table of this file.
MUTATIONS = [mutation for name, table in list(globals().items()) if name.isupper() for mutation in table]
