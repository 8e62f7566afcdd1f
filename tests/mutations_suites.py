"""Mistakes that were easy to make (mutations.py). Of folders for the evaluators of GenEval and VBench."""

from mutation import mutations

MUTATIONS = (
    mutations(
        "rcm_mcore/sampling/suites.py",
        "tests/test_sample_benchmark.py",
        ("STRIDE * prompt.number + index)", "prompt.number)", "test_geneval_finds_its_pictures"),
        ('"samples", f"{index:04d}.png"', 'f"{index:04d}.png"', "test_geneval_finds_its_pictures"),
        (
            'f"{prompt.number:05d}", "metadata.jsonl"), prompt.line',
            '"metadata.jsonl"), prompt.line',
            "test_geneval_finds_its_pictures",
        ),
        ("max(first.count, prompt.count)", "first.count", "test_counts_of_the_suites"),
        ("first.dimensions | prompt.dimensions", "first.dimensions", "test_counts_of_the_suites"),
        ("len(longest.encode())", "len(longest)", "test_names_of_odd_prompts"),
        ("replace(prompt, text=line)", "replace(prompt, name=line)", "test_the_network_is_told_the_augmented_prompt"),
    )
    + mutations(
        "rcm_mcore/sampling/suite_folder.py",
        "tests/test_sample_benchmark.py",
        ("if changed and any(made):", "if False:", "test_another_request_is_refused"),
        ("for suite in SUITES.values() for file", "for suite in [self.suite] for file", "test_another_request_is_refused"),
        (
            "        os.replace(partial, file)",
            '        os.replace(partial, file)\n        (self._media / "log.txt").touch()',
            "test_vbench_finds_its_videos",
        ),
        ("if not self.file(d).is_file() and", "if", "test_after_a_rehearsal_the_rest_is_made"),
        ("others | of_file", "of_file", "test_dimensions_are_parts_of_all"),
        ("if not sampled and (", "if False and (", "test_a_run_tries_again_only_what_failed"),
        ("if draw.prompt in reasons:", "if False:", "test_the_manifest_says_how_and_what_failed"),
        (
            "media.suffix_of(trained[1]) != wants",
            "media.suffix_of(shape[1]) != wants",
            "test_a_network_of_the_other_kind_is_refused",
        ),
        ("media.write_media(partial,", "media.write_media(file,", "test_a_long_name_is_written"),
    )
    + mutations(
        "rcm_mcore/sampling/generate.py",
        "tests/test_sample_benchmark.py",
        ('not finite")\n            return', 'not finite")', "test_after_a_rehearsal_the_rest_is_made"),
    )
)
