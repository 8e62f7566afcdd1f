"""Mistakes that were easy to make (mutations.py). Of the scenes of the laboratory: drawing, pictures, captions, shards."""

from mutation import mutations

MUTATIONS = (
    mutations(
        "rcm_mcore/lab/motion.py",
        "tests/test_scenes.py",
        ("gravity * first * RESTITUTION**rebound", "gravity * first * RESTITUTION", "test_impacts_are_those_of_a_simulation"),
        ("impact = impact + 2 * first * RESTITUTION**rebound", "impact = impact + 2 * first",
         "test_impacts_are_those_of_a_simulation"),
        ("(position - low).remainder(2 * span)", "(position - low).remainder(span)", "test_impacts_are_those_of_a_simulation"),
    )
    + mutations(
        "rcm_mcore/lab/scenes.py",
        "tests/test_scenes.py",
        # The number of objects is no longer uniform: scenes of three are refused more often.
        ("_draw_any(generator, objects[rows])", "_draw_any(generator, 1 + (objects[rows] - 1) * 0)",
         "test_prompts_are_distributed_as_stated"),
        ("(_alike(stated) | (is_heldout(stated) != heldout))", "(is_heldout(stated) != heldout)",
         "test_prompts_are_distributed_as_stated"),
        ("(_alike(stated) | (is_heldout(stated) != heldout))", "_alike(stated)",
         "test_held_out_combinations_are_not_drawn_unless_asked_for"),
        ("high[:, 1] -= _LEAST_FALL", "high[:, 1] -= 0 * _LEAST_FALL", "test_motions_show_in_every_video"),
        ("bound[:, axis] += sign * travel", "bound[:, axis] -= sign * travel", "test_objects_stay_on_the_canvas"),
        ("(radius[:, :-1] + _CLEAR", "(0 * radius[:, :-1] + _CLEAR", "test_what_the_prompt_says_can_be_seen"),
        ("clear = _plate_distance(last, place) >= _CLEAR * own[:, None]", "clear = _plate_distance(last, place) >= 0",
         "test_what_the_prompt_says_can_be_seen"),
        ("path[rows, slot] = last[chosen]", "path[rows, slot] = last[:: len(last) // len(rows)][: len(rows)]",
         "test_what_the_prompt_says_can_be_seen"),
    )
    + mutations(
        "rcm_mcore/lab/vocabulary.py",
        "tests/test_scenes.py",
        ("(hidden & (scenes.shape != UNUSED)).any(-1)", "hidden[..., 0]",
         "test_held_out_combinations_are_not_drawn_unless_asked_for"),
        ("not 1 <= len(found) <= OBJECTS", "not found", "test_other_texts_are_refused"),
    )
    + mutations(
        "rcm_mcore/lab/render.py",
        "tests/test_scenes.py",
        ("for slot in reversed(range(OBJECTS)):", "for slot in range(OBJECTS):", "test_front_objects_hide_those_behind"),
        ("pixel = torch.arange(CANVAS, device=device) + 0.5", "pixel = torch.arange(CANVAS, device=device) + 0.0",
         "test_shapes_cover_the_pixels_they_should"),
        ("torch.atan2(x, -y)", "torch.atan2(x, y)", "test_shapes_cover_the_pixels_they_should[star]"),
        ("bars, dots, dot = _BARS * radius, _DOTS * radius, _DOT * radius", "bars, dots, dot = 0 * x + _BARS * 64, _DOTS, _DOT",
         "test_textures_differ"),
    )
    + mutations(
        "rcm_mcore/lab/glyphs.py",
        "tests/test_scene_shards.py",
        ("(_standardised(cells) @ glyphs.T).abs()", "(_standardised(cells) @ glyphs.T)",
         "test_captions_are_read_on_every_real_video"),
        (".clamp_min(1e-4)", "", "test_what_is_not_there_is_not_read"),
        ("& (correlation >= at_least)", "", "test_what_is_not_there_is_not_read"),
        ("for dx in range(1 - _SHIFT, 2 + _SHIFT):", "for dx in range(1, 2):", "test_captions_are_read_through_noise_and_blur"),
    )
    + mutations(
        "rcm_mcore/lab/scene_text.py",
        "tests/test_scene_shards.py",
        ("bias[-offset if offset < 0 else _BUCKETS // 2 + offset, head] = _LOGIT", "bias[abs(offset), head] = _LOGIT",
         "test_rows_tell_what_belongs_together"),
        ("shape=any_of(SHAPES, OBJECTS),", "shape=any_of(SHAPES[:-9], OBJECTS),", "test_every_word_is_one_token"),
    )
    + mutations(
        "rcm_mcore/lab/scene_shards.py",
        "tests/test_scene_shards.py",
        ("draw_scenes(-(-len(items) // times), (job.seed, block))", "draw_scenes(-(-len(items) // times), job.seed)",
         "test_shards_hold_latents_and_text_rows_of_the_scenes"),
        ("torch.cat(latents.split(1, dim=2))", "latents.transpose(1, 2).flatten(0, 1)[:, :, None]",
         "test_shards_of_single_frames"),
        ("    if given is None:", "    if True:", "test_a_text_encoder_that_is_given"),
        ("digest.update(f\"{path.name} {path.stat().st_size} \".encode() + path.read_bytes())",
         "digest.update(b'' if path.name == 'spiece.model' else path.read_bytes())", "test_a_text_encoder_that_is_given"),
        ('arguments["text_encoder_sha256"] =', "_ =", "test_a_text_encoder_that_is_given"),
        ('if device == "cuda" else device', 'if False else device', "test_processes_are_dealt_to_the_gpus"),
        ("    shutil.rmtree(root / TEXT_ENCODER, ignore_errors=True)", "    pass",
         "test_what_is_lost_is_written_anew_and_nothing_else"),
        ("job.folder.pending(rank, job.processes)", "job.folder.pending(0, job.processes)",
         "test_several_processes_write_the_same"),
        ("digest.update(value.detach()", "(value.detach()", "test_what_is_lost_is_written_anew_and_nothing_else"),
    )
)  # fmt: skip
