"""Configuration: what is accepted, and what an error says about what is not."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from launch import environment

from rcm_mcore.config import (
    ConfigError,
    MeshConfig,
    ModelConfig,
    chunks_of_stages,
    layers_of_stages,
    load_config,
    parse_config,
    parse_model,
    resolve_mesh,
    to_yaml,
    tokens_per_sample,
    validate_mesh,
)

TREE = {
    "model": {"size": "tiny"},
    "mesh": {"tp": 2, "sp": True},
    "train": {"objective": "pretrain", "steps": 10, "global_batch_size": 8, "micro_batch_size": 4},
    "data": {"shards": "shards/*.tar", "latent_shape": [32, 2, 4, 4]},
    "checkpoint": {"dir": "run"},
}


def changed(path, value):
    tree = yaml.safe_load(yaml.safe_dump(TREE))
    *parents, leaf = path.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    return tree


def test_resolved_config_reads_back_the_same():
    config = parse_config(changed("model.num_layers", 5))
    assert config.model.num_layers == 5 and config.model.hidden_size == 192
    assert parse_config(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    "section, count, digits",
    [
        (dict(size="1.3B"), 1_418_996_800, 10),
        (dict(size="14B"), 14_288_491_584, 11),
        (dict(size="14B", condition="image"), 16_394_878_784, 11),
        (dict(size="14B", condition="first_last"), 16_394_878_784 + 514 * 1280, 11),
        (dict(family="cosmos", size="0.6B"), 597_500_000, 4),
        (dict(family="cosmos", size="2B"), 1_956_400_000, 5),
        (dict(family="cosmos", size="14B"), 14_265_000_000, 5),
        (dict(family="cosmos", size="2B", condition="frames"), 1_956_400_000 + 4 * 2048, 5),
    ],
)
def test_named_sizes_are_the_released_ones(mesh, monkeypatch, section, count, digits):
    """Parameter counts of architectures.md A.0 and B.0, to as many digits as it gives."""
    import torch

    from rcm_mcore.models import build_model

    model = parse_model(section)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    with torch.device("meta"):
        net = build_model(model, MeshConfig(), mesh.groups, seed=None)
    assert f"{sum(p.numel() for p in net.parameters()):.{digits - 1}e}" == f"{count:.{digits - 1}e}"


def test_sizes_and_conditions_of_a_family():
    assert parse_model(dict(family="cosmos", size="14B", condition="frames")).rope_ratios == (20 / 24, 2.0, 2.0)
    assert parse_model(dict(family="cosmos", size="2B", condition="frames")).rope_ratios == (1.0, 3.0, 3.0)
    assert parse_model(dict(family="cosmos", size="2B")).text_dim == 1024
    with pytest.raises(ConfigError, match=r"model.size=1.3B: model.family=cosmos has the sizes tiny, 0.6B, 2B, 14B"):
        parse_model(dict(family="cosmos", size="1.3B"))
    with pytest.raises(ConfigError, match=r"model.condition=frames: model.family=wan takes text, image, first_last"):
        parse_model(dict(size="1.3B", condition="frames"))
    with pytest.raises(ConfigError, match=r"model.patch_size=\[2, 2, 2\]: model.condition=frames needs tokens of one frame"):
        parse_model(dict(family="cosmos", size="2B", condition="frames", patch_size=[2, 2, 2]))
    with pytest.raises(ConfigError, match=r"model.rope_ratios=\[1.0, 0.0, 4.0\]: every entry must be positive"):
        parse_model(dict(family="cosmos", size="2B", rope_ratios=[1, 0, 4]))


def test_given_frames_leave_one_to_generate():
    tree = {**TREE, "model": {"family": "cosmos", "size": "tiny", "condition": "frames"}}
    frames = tree["data"]["latent_shape"][1]
    assert parse_config({**tree, "data": {**tree["data"], "given_frames": [0, frames - 1]}}).data.given_frames == (
        0,
        frames - 1,
    )
    for given in ([], [frames], [-1]):
        with pytest.raises(ConfigError, match=r"data.given_frames=\[.*\]: each must lie between 0 and"):
            parse_config({**tree, "data": {**tree["data"], "given_frames": given}})
    shape = [tree["data"]["latent_shape"][0], 1, *tree["data"]["latent_shape"][2:]]
    with pytest.raises(ConfigError, match=r"model.condition=first_last needs two frames"):
        parse_config(
            {**TREE, "model": {"size": "tiny", "condition": "first_last"}, "data": {**TREE["data"], "latent_shape": shape}}
        )


def test_overrides(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(TREE))
    config = load_config(
        path, ["optim.lr=1e-5", "mesh.sp=false", "data.shards=[a.tar, b.tar]", "distill.negative_embedding=null"]
    )
    assert config.optim.lr == 1e-5 and not config.mesh.sp and config.data.shards == ("a.tar", "b.tar")


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("modle", {}, "unknown key modle: did you mean model?"),
        ("model.num_layer", 3, "unknown key model.num_layer: did you mean model.num_layers?"),
        ("optim.learning", 3, "unknown key optim.learning: known: lr, "),
        ("model.size", "13B", "model.size=13B: model.family=wan has the sizes tiny, 1.3B, 14B"),
        ("distill.rollout_times", [1.5, 0.0, 1.0], "distill.rollout_times=[1.5, 0.0, 1.0]: TrigFlow times lie above 0"),
        ("model.num_layers", "three", "model.num_layers='three': must be a whole number, not a string"),
        ("model.num_layers", True, "model.num_layers=True: must be a whole number, not true/false"),
        ("model.num_layers", 0, "model.num_layers=0: must be at least 1"),
        ("mesh.sp", 1, "mesh.sp=1: must be true or false, not a whole number"),
        ("optim.lr", "fast", "optim.lr='fast': must be a number, not a string"),
        ("optim.lr", 0, "optim.lr=0.0: must be positive"),
        ("optim.ema_length", 0.5, "optim.ema_length=0.5: must lie in (0, 0.28)"),
        ("train", 3, "train=3: must be a section with fields, not a whole number"),
        ("data.latent_shape", [32, 2, 4], "data.latent_shape=[32, 2, 4]: must have 4 entries"),
        ("data.latent_shape", [16, 2, 4, 4], "16 channels, but model.in_channels=32"),
        ("data.latent_shape", [32, 2, 5, 4], "H=5 is not a multiple of the patch 2"),
        ("data.shards", [], "data.shards is empty"),
        ("model.hidden_size", 191, "model.hidden_size=191 is not a multiple of model.num_attention_heads=6"),
        ("train.objective", "distill", "distill.teacher is empty"),
        ("train.steps", None, "train.steps=None: must be a whole number, not nothing"),
    ],
)  # fmt: skip
def test_bad_values_are_named(path, value, message):
    with pytest.raises(ConfigError) as error:
        parse_config(changed(path, value))
    assert message in str(error.value)


INTERVAL = "students of meanflow are told the interval, and no other networks"
TANGENT = "they are of the tangent of rcm and scm; leave them at 0 and jvp"


@pytest.mark.parametrize(
    "interval, distill, message",
    [
        (True, {}, f"model.interval=true with train.objective=distill, distill.method=rcm: {INTERVAL}"),
        (True, {"method": "dcm"}, f"distill.method=dcm: {INTERVAL}"),
        (False, {"method": "meanflow"}, f"distill.method=meanflow: {INTERVAL}"),
        (False, {"method": "dcm", "tangent_warmup": 3}, "tangent_warmup=3, distill.tangent=jvp with distill.method=dcm"),
        (False, {"method": "dcm", "tangent": "finite_difference"}, TANGENT),
        (True, {"method": "meanflow", "tangent_warmup": 1}, TANGENT),
        (True, {"method": "meanflow", "tangent": "finite_difference"}, "distill.method=meanflow: they are of the tangent"),
        (False, {"method": "dcm", "discrete_steps": 0}, "distill.discrete_steps=0: must be at least 1"),
        (True, {"method": "meanflow", "instant_share": 1.5}, "distill.instant_share=1.5: must lie in [0, 1]"),
        (True, {"method": "meanflow", "instant_share": float("nan")}, "distill.instant_share=nan: must lie in [0, 1]"),
        (False, {"difference_step": 0.0}, "distill.difference_step=0.0: must lie in (0, pi / 4)"),
        (False, {"difference_step": 0.8}, "distill.difference_step=0.8: must lie in (0, pi / 4)"),
        (False, {"difference_step": float("nan")}, "distill.difference_step=nan: must lie in (0, pi / 4)"),
        (False, {"method": "mcd"}, "distill.method='mcd': must be one of "),
        (False, {"student_weights": "fake_score"}, "distill.student_weights='fake_score': must be one of "),
    ],
)  # fmt: skip
def test_methods_that_make_no_sense_are_named(interval, distill, message):
    tree = changed("train.objective", "distill") | {"model": {"size": "tiny", "interval": interval}}
    with pytest.raises(ConfigError) as error:
        parse_config(tree | {"distill": {"teacher": "t", **distill}})
    assert message in str(error.value)


def test_an_interval_is_of_a_distillation():
    tree = changed("model.interval", True) | {"distill": {"method": "meanflow"}}
    with pytest.raises(ConfigError, match=r"model\.interval=true with train\.objective=pretrain, distill\.method=meanflow"):
        parse_config(tree)


@pytest.mark.parametrize("method", ["scm", "dcm", "meanflow", "dmd", "rcm"])
def test_only_score_distillation_has_a_fake_score(method):
    tree = changed("train.objective", "distill") | {"model": {"size": "tiny", "interval": method == "meanflow"}}
    tree = tree | {"distill": {"teacher": "t", "method": method}}
    tree["train"] = tree["train"] | {"offload": ["teacher", "fake_score"]}
    if method in ("dmd", "rcm"):
        assert parse_config(tree).distill.has_fake_score
    else:
        with pytest.raises(ConfigError, match=rf"train\.offload=.*no fake_score .*{method}.* it has ema, student, teacher"):
            parse_config(tree)


def test_missing_fields_are_listed():
    tree = changed("train", {"objective": "pretrain"})
    with pytest.raises(ConfigError, match=r"missing: train.steps, train.global_batch_size, train.micro_batch_size"):
        parse_config(tree)
    with pytest.raises(ConfigError, match=r"missing: model.size \(one of tiny, 1.3B, 14B\)"):
        parse_config(changed("model", {}))


@pytest.mark.parametrize(
    "override, message",
    [("optim.lr", "write section.field=value"), ("mesh.tp.x=1", "tp is a value, not a section"), ("a=[", "not valid YAML")],
)
def test_bad_overrides(tmp_path, override, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(TREE))
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load_config(tmp_path / "list.yaml")


WAN_1_3B = ModelConfig(size="1.3B", num_layers=30, hidden_size=1536, num_attention_heads=12, ffn_hidden_size=8960)


@pytest.mark.parametrize(
    "mesh, world, tokens, message",
    [
        (MeshConfig(tp=8), 8, None, r"mesh.tp=8 must divide model.num_attention_heads=12 .*: use one of \[1, 2, 4\]"),
        (MeshConfig(tp=0), 8, None, "mesh.tp=0: must be at least 1"),
        (MeshConfig(tp=4), 6, None, "mesh.tp=4 does not divide the 6 ranks"),
        (MeshConfig(sp=True), 1, None, "mesh.sp=true with mesh.tp=1"),
        (MeshConfig(cp=0), 8, None, "mesh.cp=0: must be at least 1"),
        (MeshConfig(cp=8), 8, 6, "mesh.cp=8 exceeds the 6 tokens of a sample: use at most 6"),
        (
            MeshConfig(tp=2, cp=3),
            8,
            None,
            r"mesh.cp=3 with mesh.tp=2 does not divide the 8 ranks .*: use mesh.cp in \[1, 2, 4\]",
        ),
        (
            MeshConfig(cp=8, cp_mode="all_to_all"),
            8,
            None,
            r"mesh.cp=8 .* must divide the 12 heads .*: use mesh.cp in \[1, 2, 3, 4, 6, 12\], or mesh.cp_mode=ring",
        ),
        (
            MeshConfig(cp=8, cp_mode="two_level", cp_inner=8),
            8,
            None,
            r"mesh.cp_inner=8 .* and mesh.cp=8 and divide it and the 12 heads .*: use one of \[2, 4\]",
        ),
        (MeshConfig(cp=8, cp_mode="two_level", cp_inner=3), 8, None, r"mesh.cp_inner=3 .*: use one of \[2, 4\]"),
        (MeshConfig(cp=5, cp_mode="two_level"), 5, None, "mesh.cp_inner=None .*: none does; use mesh.cp_mode=ring"),
        (MeshConfig(cp=2, cp_mode="two_level"), 2, None, "none does; use mesh.cp_mode=ring or all_to_all"),
        (MeshConfig(timeout_minutes=float("nan")), 1, None, "mesh.timeout_minutes=nan"),
        (MeshConfig(pp=31), 31, None, "mesh.pp=31: must lie between 1 and model.num_layers=30"),
        (
            MeshConfig(tp=2, pp=4),
            12,
            None,
            r"mesh.pp=4 with mesh.tp=2 and mesh.cp=1 does not divide the 12 ranks .*: use mesh.pp in \[1, 2, 3, 6\]",
        ),
        (
            MeshConfig(pp=4, vpp=8),
            4,
            None,
            "mesh.vpp=8 with mesh.pp=4 makes 32 chunks .*: use mesh.vpp of at most 7",
        ),
        (MeshConfig(vpp=2), 1, None, "mesh.vpp=2 with mesh.pp=1: chunks of layers are interleaved over 2 or more stages"),
        (MeshConfig(pp=2, vpp=0), 2, None, "mesh.vpp=0 with mesh.pp=2"),
        (MeshConfig(cp=4, cp_inner=2), 4, None, "mesh.cp_inner=2 is for mesh.cp_mode=two_level, not auto"),
        (MeshConfig(timeout_minutes=0), 1, None, "mesh.timeout_minutes=0: must be a positive number"),
    ],
)
def test_bad_meshes_are_named(mesh, world, tokens, message):
    with pytest.raises(ValueError, match=message):
        validate_mesh(WAN_1_3B, mesh, world, tokens=tokens)


WAN_14B = ModelConfig(size="14B", num_layers=40, hidden_size=5120, num_attention_heads=40, ffn_hidden_size=13824)


@pytest.mark.parametrize(
    "model, mesh, ranks_per_node, wanted, reason",
    [
        (WAN_1_3B, MeshConfig(), 8, ("ring", 1), "one rank holds all tokens"),
        (WAN_14B, MeshConfig(cp=8), 8, ("ring", 1), r"ring \(the ranks are within a node.*40 heads .* 8 ranks a node"),
        (WAN_14B, MeshConfig(tp=2, cp=4), 8, ("ring", 1), "20 heads"),
        (WAN_14B, MeshConfig(tp=2, cp=8), 8, ("two_level", 4), r"two_level, 4 ranks exchange heads \(fewest transfers"),
        (WAN_1_3B, MeshConfig(cp=16), 8, ("two_level", 4), "4 ranks exchange heads"),
        (WAN_14B, MeshConfig(cp=16), 8, ("two_level", 8), "8 ranks exchange heads"),
        (WAN_14B, MeshConfig(tp=8, cp=4), 8, ("ring", 1), r"ring \(no number of ranks within a node divides the heads"),
        (WAN_14B, MeshConfig(cp=8, cp_mode="ring"), 8, ("ring", 1), r"ring \(as configured"),
        (WAN_14B, MeshConfig(cp=8, cp_mode="all_to_all"), 8, ("all_to_all", 8), r"all_to_all \(as configured"),
        (WAN_14B, MeshConfig(cp=16, cp_mode="two_level"), 8, ("two_level", 8), r"8 ranks exchange heads \(as configured"),
        (WAN_14B, MeshConfig(cp=8, cp_mode="two_level", cp_inner=2), 8, ("two_level", 2), "as configured"),
        (WAN_14B, MeshConfig(cp=4, cp_mode="two_level"), 1, ("two_level", 2), "as configured"),
    ],
)
def test_mode_of_context_parallelism(model, mesh, ranks_per_node, wanted, reason):
    validate_mesh(model, mesh, mesh.tp * mesh.cp, tokens=32_760)
    resolved, why = resolve_mesh(model, mesh, ranks_per_node=ranks_per_node)
    assert (resolved.cp_mode, resolved.cp_inner) == wanted
    assert re.search(reason, why)


@pytest.mark.parametrize(
    "layers, stages, wanted",
    [(30, 4, [7, 8, 8, 7]), (40, 4, [10] * 4), (5, 4, [1, 1, 2, 1]), (30, 1, [30]), (3, 3, [1] * 3), (31, 4, [7, 8, 8, 8])],
)
def test_layers_of_stages(layers, stages, wanted):
    """The first stage, which embeds, and then the last, which has the head, are the lighter ones."""
    ranges = layers_of_stages(layers, stages)
    assert sorted(len(r) for r in ranges) == sorted(wanted) and [len(r) for r in ranges] == wanted
    assert [i for r in ranges for i in r] == list(range(layers))


@pytest.mark.parametrize("layers, stages, chunks", [(40, 4, 2), (30, 4, 2), (5, 2, 2), (30, 1, 1)])
def test_chunks_of_stages(layers, stages, chunks):
    """Through the first chunk of every stage, then through the second of every stage."""
    ranges = chunks_of_stages(layers, stages, chunks)
    assert len(ranges) == stages and all(len(stage) == chunks for stage in ranges)
    assert [i for chunk in range(chunks) for stage in ranges for i in stage[chunk]] == list(range(layers))


def test_mesh_gives_data_parallel_size():
    assert validate_mesh(WAN_1_3B, MeshConfig(tp=2, sp=True), 8, tokens=32_760) == 4
    assert tokens_per_sample(WAN_1_3B, (16, 21, 60, 104)) == 32_760


def test_validation_is_quick_and_imports_no_torch(tmp_path):
    """A second at most, so that a mistake costs nothing; torch alone takes longer to import on a busy machine."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(TREE))
    code = f"""
import sys
from rcm_mcore.config import load_config, validate_mesh
config = load_config({str(path)!r})
validate_mesh(config.model, config.mesh, 2)
assert "torch" not in sys.modules and "megatron" not in sys.modules
"""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
    print(f"validated in {time.monotonic() - start:.2f} s")


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("*/*.yaml")))
def test_examples_are_sound(path):
    world = {"digits": 2, "scenes": 1}.get(Path(path).parts[0], 8)
    config = load_config(EXAMPLES / path)
    tokens = tokens_per_sample(config.model, config.data.latent_shape)
    dp = validate_mesh(config.model, config.mesh, world, tokens=tokens)
    assert config.train.global_batch_size % (dp * config.train.micro_batch_size) == 0
