"""Mistakes that were easy to make (mutations.py). Of the laboratory's codec, and of what its reader is taught and says."""

from mutation import mutations

CODEC = (
    mutations(
        "rcm_mcore/lab/codec.py",
        "tests/test_lab_codec.py",
        ("[:, :, GROUP - 1 :]", "[:, :, : 1 - GROUP]", "test_pixels_are_where_they_were"),
        (".repeat_interleave(side**2)", ".repeat(side**2)", "test_training_starts_from_principal_components"),
        ("(rows * scale).view_as", "rows.view_as", "test_training_starts_from_principal_components"),
        (".clamp(0.0, 1.0)", "", "test_videos_are_clamped"),
        ("torch.random.fork_rng(", "torch.random.fork_rng(enabled=False, ", "test_training_depends_on_the_seed_alone"),
    )
    + mutations(
        "rcm_mcore/lab/blocks.py",
        "tests/test_lab_codec.py",
        (
            "[padded[:, :-2], padded[:, 1:-1], padded[:, 2:]]",
            "[padded[:, 1:-1]] * 3",
            "test_a_group_of_frames_sees_its_neighbours_alone",
        ),
    )
    + mutations(
        "rcm_mcore/lab/stream.py",
        "tests/test_lab_codec.py",
        (
            "key = (seed, PURPOSES.index(purpose), part)",
            "key = (seed, part)",
            "test_scenes_are_new_for_each_purpose_seed_and_part",
        ),
        ("rows = slice(start, start + size)", "rows = slice(0, size)", "test_batches_are_rendered_scenes"),
        (", part=part)", ")", "test_batches_are_rendered_scenes"),
    )
    + mutations(
        "rcm_mcore/lab/weights.py",
        "tests/test_lab_codec.py",
        (
            "partial = path.with_name",
            "partial = path or path.with_name",
            "test_a_file_that_cannot_be_completed_leaves_the_old_one",
        ),
        ('if metadata.get("format") != file_format:', "if not metadata:", "test_other_files_are_refused"),
    )
)

READER = (
    mutations(
        "rcm_mcore/lab/blocks.py",
        "tests/test_lab_reader.py",
        ("            optimizer.step()\n", "", "test_training_lowers_the_loss"),
    )
    + mutations(
        "rcm_mcore/lab/adherence.py",
        "tests/test_lab_reader.py",
        (
            "there = used & reading.present.gather(1, colour)",
            "there = used",
            "test_a_missing_object_has_none_of_its_attributes",
        ),
        (
            "reverse = front[rows, colour[:, far], colour[:, near]]",
            "reverse = front[rows, colour[:, near], colour[:, far]]",
            "test_each_mistake_counts_where_it_belongs",
        ),
        ("return expected[:, :-1]", "return expected[:, 1:]", "test_a_perfect_reading_is_all_right"),
        ("(part < 1)", "~(part >= 1)", "test_a_perfect_reading_is_all_right"),  # no order is not a wrong one
    )
    + mutations(
        "rcm_mcore/lab/reader_training.py",
        "tests/test_lab_reader.py",
        ("torch.where(other > 0, 2, one", "torch.where(one > 0, 2, other", "test_the_front_of_a_pair_is_that_of_the_prompt"),
        (
            "(distance < _APART).any(1), _IGNORED, 0",
            "(distance < _APART).any(1), 0, 0",
            "test_pairs_are_taught_where_it_can_be_seen",
        ),
        (
            "distance[..., 1, :, None] + distance[..., 0, None, :]",
            "distance[..., 0, :, None] + distance[..., 1, None, :]",
            "test_targets_are_what_scenes_are",
        ),
        ("[..., 1:].amax(1)", "[..., 1:].sum(1)", "test_targets_are_what_scenes_are"),
        ("videos = videos.clone()", "pass", "test_augmented_videos"),
        (" + 100 * (frame + change)", " + 100 * frame", "test_every_output_learns"),
        ("prompts[1:] + prompts[:1]", "prompts", "test_measured_on_held_out_scenes"),
    )
    + mutations(
        "rcm_mcore/lab/reader.py",
        "tests/test_lab_reader.py",
        ("8 * (where - where.mean(1, keepdim=True))", "8 * where", "test_moves_are_in_pixels"),
        ("== 1, state[:, pair] == 2", "== 2, state[:, pair] == 1", "test_reading_says_what_the_logits_say"),
        (
            "torch.cat([out.frame_features.mean(1),",
            "torch.cat([out.frame_features[:, 0],",
            "test_videos_and_frames_are_seen_one_by_one",
        ),
        ("raw.std(0).clamp_min(1e-6)", "raw.var(0).clamp_min(1e-6)", "test_features_are_standardised_over_real_videos"),
        ("reader.facts = facts", "pass", "test_a_file_holds_all_of_it"),
    )
)

MUTATIONS = CODEC + READER
