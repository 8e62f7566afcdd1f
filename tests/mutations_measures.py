"""Mistakes that were easy to make (mutations.py). Of measures of quality and diversity, and of comparing videos."""

from mutation import mutations

SETS = mutations(
    "rcm_mcore/evaluation/metrics.py",
    "tests/test_metrics.py",
    ("inside / (k * len(generated))", "inside / len(generated)", "test_density_and_coverage_of_known_cases"),
    ("generated) <= radii[:, None]", "generated) < radii[:, None]", "test_density_and_coverage_of_known_cases"),
    ("held.any(1).sum()", "held.any(0).sum()", "test_density_and_coverage_of_known_cases"),
    ("zip(real.split(_ROWS_PER_CHUNK), _radii(real, k)", "zip(real.split(_ROWS_PER_CHUNK), _radii(real, k).flip(0)",
     "test_density_and_coverage_equal_sklearn"),
    ("/ (2 * bandwidth**2)", "/ bandwidth**2", "test_vendi_equals_scipy"),
    ("eigvalsh(kernel / len(features))", "eigvalsh(kernel / kernel.trace().sqrt())", "test_vendi_counts_different_samples"),
    ("pow(1 / (1 - q))", "pow(1 / q)", "test_vendi_equals_scipy"),
    (".clamp_min(0)  # rounding makes", "  # rounding makes", "test_vendi_counts_different_samples"),
    ("if len(sizes) > 1:", "if False:", "test_bad_input"),
    ("float(np.median(torch.cat(distances).cpu().numpy()))", "float(torch.cat(distances).median())",
     "test_median_distance_is_that_of_all_pairs_within_groups"),
    ("if len(rows) >= size", "if len(rows) >= 1", "test_rows_per_group"),
)  # fmt: skip

TIME = mutations(
    "rcm_mcore/evaluation/temporal.py",
    "tests/test_temporal.py",
    ("power[:-1].sum() + power[1:].sum()", "2 * power.sum()", "test_closed_forms"),
    ("if pairs > 0 else pairs", "", "test_closed_forms"),
    ("video.flatten(1).double()", "video.flatten(1)", "test_videos_are_measured_apart_in_float64"),
    ("right=True).double() / len(z)", "right=True) / len(z)", "test_wasserstein_equals_scipy"),
    ("(shares[0] - shares[1]).abs()", "(shares[0] - shares[1])", "test_wasserstein_sees_what_the_mean_does_not"),
)  # fmt: skip

INTERVALS = mutations(
    "rcm_mcore/evaluation/intervals.py",
    "tests/test_intervals.py",
    ("std(ddof=1)", "std()", "test_run_interval_equals_scipy"),
    ("(1 + confidence) / 2, len(runs) - 1)", "(1 + confidence) / 2, len(runs))", "test_run_interval_equals_scipy"),
    ("range(1 + odd, freedom, 2)", "range(1, freedom, 2)", "test_run_interval_equals_scipy"),
    ("labels = range(len(values)) if clusters is None else clusters", "labels = range(len(values))",
     "test_bootstrap_draws_whole_clusters"),
    ("np.repeat(starts[draw], lengths) + within", "np.repeat(starts[draw], lengths)",
     "test_clusters_of_different_sizes_keep_all_their_samples"),
    ("if len(members) < 2:", "if len(values) < 2:", "test_bad_input"),
    ("default_rng(seed)", "default_rng()",
     "test_bootstrap_of_the_mean_is_near_the_normal_interval"),
)  # fmt: skip

FOLDERS = mutations(
    "rcm_mcore/evaluation/extractor.py",
    "tests/test_extractor.py",
    ("if not run_code:", "if False:", "test_a_program_that_is_not_trusted_is_not_even_read"),
    ("len(features) != len(videos)", "False", "test_another_output_is_refused"),
    ("self._network.features(videos.mean(1))", "self._network.features(videos[:, 0])", "test_networks_of_ours"),
) + mutations(
    "rcm_mcore/data/video_folder.py",
    "tests/test_video_folder.py",
    ("int(number or 0)", "number", "test_every_kind_gives_the_same_frames"),
    ("(folders - {name.parent for name in files})", "folders", "test_listing"),
    ("allow_pickle=False", "allow_pickle=True", "test_what_cannot_be_used"),
    ("if not (low >= 0 and high <= 1):", "if low < 0 or high > 1:", "test_what_cannot_be_used"),
    ('r"[-/]\\d+$"', 'r"-.*$"', "test_groups_from_names"),
) + mutations(
    "rcm_mcore/lab/folders.py",
    "tests/test_compare_videos.py",
    ("part.stat().st_mtime_ns", "0", "test_the_cache_is_used_for_the_same_and_for_nothing_else"),
    ('"extractor": extractor.sha256,', '"extractor": "",', "test_the_cache_is_used_for_the_same_and_for_nothing_else"),
    ("    if batch:\n        flush()", "", "test_the_measures_are_those_of_the_features"),
    ("        if not skip_bad:\n            raise", "        if False:\n            raise", "test_videos_that_cannot_be_read"),
    ("order[len(order) // 2 :]", "order", "test_the_first_row_is_one_half_of_the_real_against_the_other"),
    ("median_distance(real.features[kept[0]]", "median_distance(2 * real.features[kept[0]]",
     "test_the_measures_are_those_of_the_features"),
    ("videos.transpose(1, 2)", "videos.transpose(1, 3)", "test_the_measures_are_those_of_the_features"),
)  # fmt: skip

MUTATIONS = [mutation for name, table in list(globals().items()) if name.isupper() for mutation in table]
