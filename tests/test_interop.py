"""Conversion of weights between file formats, against diffusers: its networks and its loader."""

import hashlib
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import launch
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from diffusers import AutoModel, CosmosTransformer3DModel, WanTransformer3DModel
from networks import MODELS, OFFICIAL, random_transformer, same

from rcm_mcore import interop
from rcm_mcore.interop import ReadOptions, WriteOptions, convert, loaded

SUFFIX = {"diffusers": "", "wan": ".pth", "cosmos": ".pt", "rcm": ".pt", "mcore": ""}
HEADS = ReadOptions(head_dim=32)  # 32 wide, which Wan's own files do not tell


def open_network(path, which):
    """Stands in for our checkpoints: one safetensors file and one JSON file."""
    return interop.open_tensors(path / f"{which}.safetensors"), json.loads((path / "model.json").read_text())


def write_network(path, weights, section, progress):
    path.mkdir()
    interop.save_tensors(path / "student.safetensors", weights, progress=progress)
    plus_one = {name: loaded(weight) + 1 for name, weight in weights.items()}
    interop.save_tensors(path / "ema.safetensors", plus_one)
    (path / "model.json").write_text(json.dumps(section))


FORMATS = {**interop.FORMATS, "mcore": interop.network_format(open_network, write_network)}


@pytest.fixture(scope="module")
def nets():
    return {kind: random_transformer(kind) for kind in MODELS}


@pytest.fixture(scope="module")
def sources(nets, tmp_path_factory):
    """Every network in every format of its family: diffusers' own folder, the others converted from it."""
    folder = tmp_path_factory.mktemp("sources")
    paths = {}
    for kind, net in nets.items():
        for form in ("diffusers", OFFICIAL[kind], "rcm", "mcore"):
            paths[kind, form] = folder / f"{kind}-{form}{SUFFIX[form]}"
            if form == "diffusers":
                net.save_pretrained(paths[kind, form])
            else:
                convert("diffusers", form, paths[kind, "diffusers"], paths[kind, form], formats=FORMATS)
    return paths


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def output(net):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 5, 2, 4, 6, generator=generator)
    text = torch.randn(1, 7, 24, generator=generator)
    with torch.no_grad():
        return net(x, torch.tensor([123.4]), text, return_dict=False)[0]


def head_dim(kind, form):
    return HEADS if kind.startswith("wan") and form in ("wan", "rcm", "rcm_dcp") else None


@pytest.mark.parametrize("direction", [
    f"{kind}, {a} to {b}"
    for kind in MODELS
    for a in ("diffusers", OFFICIAL[kind], "rcm", "mcore")
    for b in ("diffusers", OFFICIAL[kind], "rcm", "mcore")
    if kind == "wan" or a in ("rcm", OFFICIAL[kind]) or b == "mcore"
])  # fmt: skip
def test_every_direction_is_bit_exact(direction, nets, sources, tmp_path):
    """a -> b -> diffusers: config and tensors, as diffusers' own loader sees them."""
    kind, a, b = direction.replace(" to ", ", ").split(", ")
    there, back = tmp_path / f"there{SUFFIX[b]}", tmp_path / "back"
    summary = convert(a, b, sources[kind, a], there, formats=FORMATS, read=head_dim(kind, a))
    net = nets[kind]
    assert summary.tensors == len(net.state_dict())
    assert summary.bytes == 4 * summary.parameters == 4 * sum(p.numel() for p in net.parameters())
    convert(b, "diffusers", there, back, formats=FORMATS, read=head_dim(kind, b))
    read = type(net).from_pretrained(back)
    assert same(read.state_dict(), net.state_dict())
    plain = lambda config: json.dumps({k: v for k, v in config.items() if k[0] != "_"}, sort_keys=True)  # lists are tuples
    assert plain(read.config) == plain(net.config)


def test_the_network_computes_the_same(nets, sources, tmp_path):
    convert("rcm", "diffusers", sources["wan", "rcm"], tmp_path / "d", read=HEADS)
    # Copied first: from_pretrained maps the file, and weights at other alignments take other code paths in matmuls.
    fresh = random_transformer("wan", seed=2)
    assert not torch.equal(output(fresh), output(nets["wan"]))
    fresh.load_state_dict(WanTransformer3DModel.from_pretrained(tmp_path / "d").state_dict())
    assert torch.equal(output(fresh), output(nets["wan"]))


@pytest.mark.parametrize("kind", ["wan", "cosmos frames"])
@pytest.mark.parametrize("layout", ["the folder", "model", "iter"])
def test_training_checkpoints_of_rcm(kind, layout, nets, sources, tmp_path):
    """A folder as torch's distributed checkpoint writes it, with counters, and of iterations the newest."""
    rcm = {name: weight.load() for name, weight in interop.open_tensors(sources[kind, "rcm"]).items()}
    state = dict(rcm)
    for i, prefix in enumerate(("net_ema.", "net_fake_score."), start=1):
        state |= {prefix + name.removeprefix("net."): tensor + i for name, tensor in rcm.items()}
    state |= {"net.accum_video_sample_counter": torch.tensor(7), "net.blocks.0.self_attn._extra_state": b"x"}
    place = {"the folder": "d", "model": "d/model", "iter": "d/iter_000000200/model"}[layout]
    dcp.save(state, checkpoint_id=tmp_path / place, no_dist=True)
    if layout == "iter":
        dcp.save({"net.old": torch.zeros(1)}, checkpoint_id=tmp_path / "d/iter_000000100/model", no_dist=True)
    for i, which in enumerate(("student", "ema", "fake_score")):
        read = ReadOptions(which=which, head_dim=32)
        convert("rcm_dcp", "diffusers", tmp_path / "d", tmp_path / which, read=read)
        got = {name: weight.load() for name, weight in interop.read_diffusers(tmp_path / which)[0].items()}
        assert same(got, {name: tensor + i for name, tensor in nets[kind].state_dict().items()})
    with pytest.raises(ValueError, match=r"format 'rcm_dcp': it can only be read"):
        convert("diffusers", "rcm_dcp", tmp_path / "ema", tmp_path / "back")
    for file in (tmp_path / place).glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot be read"):
        convert("rcm_dcp", "wan" if kind == "wan" else "cosmos", tmp_path / "d", tmp_path / "half.pt", read=HEADS)
    assert not (tmp_path / "half.pt").exists()


def test_training_checkpoint_of_two_ranks(nets, sources, tmp_path):
    """Every tensor in pieces, some of unequal length."""
    launch.torchrun(2, launch.HERE / "ranks_dcp.py", sources["wan", "rcm"], tmp_path / "run/iter_000000500/model")
    assert len(list((tmp_path / "run/iter_000000500/model").glob("*.distcp"))) == 2
    convert("rcm_dcp", "diffusers", tmp_path / "run", tmp_path / "d", read=ReadOptions(which="ema", head_dim=32))
    want = {name: tensor + 1 for name, tensor in nets["wan"].state_dict().items()}
    assert same(interop.read_diffusers(tmp_path / "d")[0], want)


def test_mixed_dtypes_survive(nets, tmp_path):
    """Dtypes are kept tensor by tensor through every format; each pair of neighbours is converted once."""
    state = {n: t.bfloat16() if ".attn" in n and "norm" not in n else t for n, t in nets["wan"].state_dict().items()}
    interop.write_diffusers(tmp_path / "a", state, MODELS["wan"])
    path, form = tmp_path / "a", "diffusers"
    for i, name in enumerate(("mcore", "rcm", "mcore", "wan", "diffusers")):
        target = tmp_path / f"{i}{SUFFIX[name]}"
        convert(form, name, path, target, read=head_dim("wan", form), formats=FORMATS)
        path, form = target, name
    assert len({t.dtype for t in state.values()}) == 2
    assert same(interop.read_diffusers(path)[0], state)


@pytest.mark.parametrize("loader", [WanTransformer3DModel, AutoModel])
def test_diffusers_folder_loads(loader, nets, sources, tmp_path):
    convert("rcm", "diffusers", sources["wan", "rcm"], tmp_path / "d", read=HEADS)
    net = loader.from_pretrained(str(tmp_path / "d"))
    assert isinstance(net, WanTransformer3DModel)
    assert same(net.state_dict(), nets["wan"].state_dict())
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config == json.loads((sources["wan", "diffusers"] / "config.json").read_text())


def test_bfloat16_keeps_what_diffusers_keeps(sources, tmp_path):
    """diffusers loads our bfloat16 folders without changing a tensor: nothing rounded that it wants in float32."""
    for kind, net, islands in (("wan first_last", WanTransformer3DModel, True), ("cosmos", CosmosTransformer3DModel, False)):
        convert("diffusers", "diffusers", sources[kind, "diffusers"], tmp_path / kind, dtype=torch.bfloat16)
        written, _ = interop.read_diffusers(tmp_path / kind)
        read = net.from_pretrained(tmp_path / kind, torch_dtype=torch.bfloat16)
        assert same(written, read.state_dict())
        assert {t.dtype for t in written.values()} == {torch.bfloat16, *([torch.float32] if islands else [])}
        full, _ = interop.read_diffusers(sources[kind, "diffusers"])
        assert all(torch.equal(t.load(), full[n].load().to(t.dtype)) for n, t in written.items())
    convert("wan", "rcm", sources["wan", "wan"], tmp_path / "r.pt", dtype=torch.bfloat16, read=HEADS)
    assert {t.dtype for t in interop.open_tensors(tmp_path / "r.pt").values()} == {torch.bfloat16}


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_sharded_folder(form, nets, sources, tmp_path):
    write = WriteOptions(max_shard_bytes=100_000)
    convert("diffusers", form, sources["wan", "diffusers"], tmp_path / "d", write=write)
    files = sorted(path.name for path in (tmp_path / "d").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        with safetensors.safe_open(tmp_path / "d" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        tensors = safetensors.torch.load_file(tmp_path / "d" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100_000
    state = nets["wan"].state_dict()
    index = json.loads((tmp_path / "d" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    if form == "diffusers":
        assert same(WanTransformer3DModel.from_pretrained(tmp_path / "d").state_dict(), state)
    convert(form, "rcm", tmp_path / "d", tmp_path / "r.pt")  # the official config.json tells the width of a head
    assert same(interop.open_tensors(tmp_path / "r.pt"), interop.open_tensors(sources["wan", "rcm"]))
    (tmp_path / "d" / files[1]).unlink()
    with pytest.raises(ValueError, match=f"{files[1]}.*not in the folder"):
        convert(form, "rcm", tmp_path / "d", tmp_path / "again.pt")


def test_manifests(sources, tmp_path):
    """Written with everything, in sha256sum's form, and checked where a source has one."""
    convert("rcm", "diffusers", sources["wan", "rcm"], tmp_path / "d", read=HEADS)
    convert("diffusers", "wan", tmp_path / "d", tmp_path / "w.safetensors")
    weights = tmp_path / "w.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (tmp_path / "w.safetensors.sha256").read_text() == f"{digest}  w.safetensors\n"
    names = sorted(line.split("  ")[1] for line in (tmp_path / "d" / "SHA256SUMS").read_text().splitlines())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
    for path, source, form in (
        (weights, weights, "wan"),
        (tmp_path / "d" / "diffusion_pytorch_model.safetensors", tmp_path / "d", "diffusers"),
    ):
        content = bytearray(path.read_bytes())
        content[-7] ^= 1  # a bit of a weight: only a manifest can tell
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}: damaged"):
            convert(form, "rcm", source, tmp_path / "r.pt", read=HEADS)
    renamed = weights.rename(tmp_path / "v.safetensors")
    shutil.copy(tmp_path / "w.safetensors.sha256", tmp_path / "v.safetensors.sha256")
    with pytest.raises(ValueError, match=f"{renamed}: damaged"):
        convert("wan", "rcm", renamed, tmp_path / "r.pt", read=HEADS)
    renamed.rename(weights)
    (tmp_path / "v.safetensors.sha256").unlink()
    (tmp_path / "d" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        convert("diffusers", "rcm", tmp_path / "d", tmp_path / "r.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "w.safetensors", "w.safetensors.sha256"]
    weights.unlink()
    with pytest.raises(ValueError, match=r"w\.safetensors\.sha256: exists already"):
        convert("rcm", "wan", sources["wan", "rcm"], weights, read=HEADS)


def test_wrong_flags_and_sizes(sources, tmp_path):
    for arguments, options, message in (
        (("wan", "rcm", "wan"), {}, r"head width 128 does not divide the model width 64.*--head-dim"),
        (("diffusers", "rcm", "wan"), dict(read=ReadOptions(head_dim=16)), r"head_dim=16: .*32 wide"),
        (("rcm", "diffusers", "cosmos"), dict(read=ReadOptions(head_dim=16)), r"head_dim=16: .*32 wide"),
        (("wan", "rcm", "wan"), dict(read=ReadOptions(head_dim=0)), r"head_dim=0: must be at least 1"),
        (("wan", "rcm", "wan"), dict(read=ReadOptions(which="ema")), "--which ema: a wan source holds one network"),
        (("rcm", "wan", "wan"), dict(read=ReadOptions(which="ema")), "rcm.pt: holds no ema network; it holds: student"),
        (("diffusers", "wan", "cosmos"), {}, "a network of the family cosmos, wan files one of wan"),
        (("cosmos", "rcm", "wan"), {}, r"wan-wan.pth|no such file|family wan"),
        (("diffusers", "wan", "wan"), dict(write=WriteOptions(max_shard_bytes=0)), "max_shard_bytes=0"),
    ):
        a, b, kind = arguments
        source = sources[kind, a] if (kind, a) in sources else sources[kind, OFFICIAL[kind]]
        with pytest.raises(ValueError, match=message):
            convert(a, b, source, tmp_path / "x.pt", **options)
    assert not any(tmp_path.iterdir())


def test_command_line(tool, sources, tmp_path, monkeypatch, capsys):
    state = random_transformer("wan").state_dict()
    real = lambda path, weights, section, *, progress: write_network(path, weights, section, progress)
    fake = types.SimpleNamespace(open_network=lambda path, *, which: open_network(path, which), write_network=real)
    monkeypatch.setitem(sys.modules, "rcm_mcore.checkpoint", fake)
    run = lambda *arguments: tool.main([str(a) for a in arguments])
    d, m, e, b = (tmp_path / name for name in ("d", "m", "e.safetensors", "b.pt"))
    rcm, wan = sources["wan", "rcm"], sources["wan", "wan"]
    assert run("--from", "rcm", "--to", "diffusers", "--head-dim", 32, "--max-shard-gb", 0.0002, rcm, d) == 0
    count = sum(t.numel() for t in state.values())
    numbers = f"69 tensors, {count:,} parameters, {4 * count:,} bytes (wan text, 2 layers, width 64, 2 heads of 32)"
    assert capsys.readouterr().out.strip() == f"{d}: diffusers, {numbers}"
    assert len(list(d.glob("*.safetensors"))) > 1
    assert same(interop.read_diffusers(d)[0], state)
    assert run("--from", "diffusers", "--to", "mcore", d, m) == 0
    assert run("--from", "mcore", "--to", "wan", "--which", "ema", m, e) == 0
    ema = interop.hub_to_diffusers(interop.open_tensors(e))
    assert same(ema, {n: t + 1 for n, t in state.items()})
    assert run("--from", "mcore", "--to", "rcm", "--dtype", "bfloat16", m, b) == 0
    assert {t.dtype for t in interop.open_tensors(b).values()} == {torch.bfloat16}
    capsys.readouterr()
    for arguments, message in (
        (("--from", "rcm", "--to", "diffusers", "--head-dim", 32, rcm, d), "exists already"),
        (("--from", "wan", "--to", "rcm", wan, tmp_path / "x.pt"), "--head-dim"),
        (("--from", "wan", "--to", "rcm", "--head-dim", 32, "--which", "ema", wan, tmp_path / "x.pt"), "--which ema"),
        (("--from", "rcm", "--to", "wan", wan, tmp_path / "x.pt"), f"{wan}: patch_embedding"),
        (("--from", "mcore", "--to", "wan", tmp_path / "absent", tmp_path / "x.pt"), "absent"),
        (("--from", "diffusers", "--to", "diffusers", "--steps", 2, d, tmp_path / "x"), "--steps: only with --pipeline"),
        (("--from", "diffusers", "--to", "diffusers", "--pipeline", d, d, tmp_path / "x"), "no model_index.json"),
    ):
        assert run(*arguments) == 2
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err
    for wrong in (("--from", "onnx", "--to", "wan"), ("--from", "wan", "--to", "rcm_dcp")):
        with pytest.raises(SystemExit) as caught:
            run(*wrong, d, tmp_path / "x.pt")
        assert caught.value.code == 2
    assert not (tmp_path / "x.pt").exists() and not (tmp_path / "x").exists()
