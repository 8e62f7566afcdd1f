"""Conversion of Wan weights between formats, against diffusers: its network, its loader, its own converter."""

import dataclasses
import importlib.util
import json
import os
import re
import sys
import types
from pathlib import Path

import oracle
import pytest
import safetensors.torch
import torch
from diffusers import AutoModel, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from rcm_mcore import interop
from rcm_mcore.config import ModelConfig
from rcm_mcore.interop import WanShape, convert

# Sizes differ wherever they can, so that no two can be mixed up; the patch is the released one.
SHAPE = WanShape(
    num_layers=2,
    hidden_size=64,
    num_heads=2,
    ffn_hidden_size=96,
    in_channels=5,
    out_channels=5,
    text_dim=24,
    freq_dim=32,
)
SUFFIX = {"diffusers": "", "wan": ".pth", "rcm": ".pt", "mcore": ""}


def read_network(path, *, which="student"):
    """Stands in for our checkpoints: one safetensors file and one JSON file."""
    return safetensors.torch.load_file(path / f"{which}.safetensors"), json.loads((path / "model.json").read_text())


def write_network(path, tensors, model):
    path.mkdir()
    safetensors.torch.save_file(tensors, path / "student.safetensors")
    safetensors.torch.save_file({n: t + 1 for n, t in tensors.items()}, path / "ema.safetensors")
    (path / "model.json").write_text(json.dumps(model))


FORMATS = {**interop.FORMATS, "mcore": interop.network_format(read_network, write_network)}


def random_transformer(shape=SHAPE, seed=0):
    net = WanTransformer3DModel(
        patch_size=shape.patch_size,
        num_attention_heads=shape.num_heads,
        attention_head_dim=shape.head_dim,
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        text_dim=shape.text_dim,
        freq_dim=shape.freq_dim,
        ffn_dim=shape.ffn_hidden_size,
        num_layers=shape.num_layers,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return net


@pytest.fixture(scope="module")
def net():
    return random_transformer()


@pytest.fixture(scope="module")
def sources(net, tmp_path_factory):
    """The network in every format: diffusers' own folder, the others converted from it."""
    folder = tmp_path_factory.mktemp("sources")
    paths = {name: folder / f"{name}{SUFFIX[name]}" for name in FORMATS}
    net.save_pretrained(paths["diffusers"])
    for name in ("wan", "rcm", "mcore"):
        convert("diffusers", name, paths["diffusers"], paths[name], formats=FORMATS)
    return paths


@pytest.fixture
def hub(net):
    return interop.diffusers_to_hub(net.state_dict())


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def output(net):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, SHAPE.in_channels, 2, 4, 6, generator=generator)
    text = torch.randn(1, 7, SHAPE.text_dim, generator=generator)
    with torch.no_grad():
        return net(x, torch.tensor([123.4]), text, return_dict=False)[0]


def test_hub_names_are_the_official_ones(hub):
    block = ["modulation", "norm3.weight", "norm3.bias"]
    block += [f"ffn.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")]
    for attention in ("self_attn", "cross_attn"):
        block += [f"{attention}.{x}.{leaf}" for x in "qkvo" for leaf in ("weight", "bias")]
        block += [f"{attention}.norm_{x}.weight" for x in "qk"]
    names = {f"blocks.{i}.{name}" for i in (0, 1) for name in block} | {"head.modulation"}
    for stem in (
        "patch_embedding",
        "text_embedding.0",
        "text_embedding.2",
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
        "head.head",
    ):
        names |= {stem + ".weight", stem + ".bias"}
    assert set(hub) == names
    assert {name: tensor.shape for name, tensor in hub.items()} == interop.expected_shapes(SHAPE)
    assert interop.infer_shape(hub, head_dim=32) == SHAPE


@pytest.mark.parametrize(
    "shape, tensors, parameters",
    [
        (WanShape(num_layers=30, hidden_size=1536, num_heads=12, ffn_hidden_size=8960), 825, 1_418_996_800),
        (WanShape(num_layers=40, hidden_size=5120, num_heads=40, ffn_hidden_size=13824), 1095, 14_288_491_584),
    ],
)
def test_released_sizes(shape, tensors, parameters):
    sizes = interop.expected_shapes(shape)
    assert len(sizes) == tensors
    assert sum(size.numel() for size in sizes.values()) == parameters
    hub = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    assert interop.infer_shape(hub) == shape


def test_diffusers_own_converter_agrees(net, hub):
    """Names and values, in the direction that diffusers can convert."""
    theirs = convert_wan_transformer_to_diffusers(dict(hub))  # empties its argument
    assert same(theirs, net.state_dict())
    assert same(interop.hub_to_diffusers(hub), theirs)


def test_rcm_names(hub):
    rcm = interop.hub_to_rcm(hub)
    assert {name.removeprefix("net.") for name in rcm} == hub.keys()
    assert all(name.startswith("net.") for name in rcm)
    patch = rcm["net.patch_embedding.weight"]
    for c, y, x in ((0, 0, 1), (3, 1, 0), (4, 1, 1)):  # [D, (c, t, h, w)]
        assert torch.equal(patch[:, c * 4 + y * 2 + x], hub["patch_embedding.weight"][:, c, 0, y, x])
    assert same(interop.rcm_to_hub(rcm), hub)


def test_mcore_names_and_layout():
    """Against the names written out in the oracle, and the rows of one head by hand."""
    model = oracle.small_model(dtype="float32")
    shape = WanShape(
        num_layers=2, hidden_size=128, num_heads=4, ffn_hidden_size=96, in_channels=4, out_channels=4, text_dim=24,
        freq_dim=32, text_len=10,
    )  # fmt: skip
    state = oracle.diffusers_wan(model, dtype=torch.float32).state_dict()
    hub = interop.diffusers_to_hub(state)
    ours = interop.hub_to_mcore(hub, shape)
    assert same(ours, oracle.names_of_ours(model, state))
    assert same(interop.mcore_to_hub(ours, shape), hub)
    d = shape.head_dim
    for head in range(4):
        for part, x in enumerate("qkv"):
            rows = slice((3 * head + part) * d, (3 * head + part + 1) * d)
            expected = hub[f"blocks.1.self_attn.{x}.weight"][head * d : (head + 1) * d]
            assert torch.equal(ours["blocks.1.self_attn.linear_qkv.weight"][rows], expected)


@pytest.mark.parametrize("a", FORMATS)
@pytest.mark.parametrize("b", FORMATS)
def test_every_direction_is_bit_exact(a, b, net, sources, tmp_path):
    """a -> b -> diffusers: the tensors, and what diffusers' network computes with them."""
    there, back = tmp_path / f"there{SUFFIX[b]}", tmp_path / "back"
    head_dim = {} if a in ("diffusers", "mcore") else {"head_dim": 32}
    summary = convert(a, b, sources[a], there, formats=FORMATS, **head_dim)
    assert (summary.shape, summary.tensors) == (SHAPE, 15 + 2 * 27)
    assert summary.bytes == 4 * summary.parameters == 4 * sum(p.numel() for p in net.parameters())
    convert(b, "diffusers", there, back, formats=FORMATS, head_dim=32)
    loaded = WanTransformer3DModel.from_pretrained(back)
    assert same(loaded.state_dict(), net.state_dict())
    # Copied first: from_pretrained maps the file, and weights at other alignments take other code paths in matmuls.
    fresh = random_transformer(seed=2)
    assert not torch.equal(output(fresh), output(net))
    fresh.load_state_dict(loaded.state_dict())
    assert torch.equal(output(fresh), output(net))


def test_channels_out_other_than_in(tmp_path):
    """No mcore network has them; the other formats can hold one."""
    shape = dataclasses.replace(SHAPE, out_channels=3)
    net = random_transformer(shape)
    net.save_pretrained(tmp_path / "a")
    assert convert("diffusers", "rcm", tmp_path / "a", tmp_path / "b.pt").shape == shape
    assert convert("rcm", "diffusers", tmp_path / "b.pt", tmp_path / "c", head_dim=32).shape == shape
    assert same(WanTransformer3DModel.from_pretrained(tmp_path / "c").state_dict(), net.state_dict())
    with pytest.raises(ValueError, match="in_channels=5, out_channels=3: must be equal"):
        convert("diffusers", "mcore", tmp_path / "a", tmp_path / "m", formats=FORMATS)
    assert not (tmp_path / "m").exists()


def test_model_section():
    model = interop.model_of_shape(SHAPE)
    section = ModelConfig(**model)
    assert (section.head_dim, section.text_dim, section.freq_dim, section.in_channels) == (32, 24, 32, 5)
    assert interop.shape_of_model(model) == SHAPE
    big = WanShape(num_layers=40, hidden_size=5120, num_heads=40, ffn_hidden_size=13824)
    assert interop.model_of_shape(big)["size"] == "14B"
    with pytest.raises(ValueError, match="model section lacks num_attention_heads"):
        interop.shape_of_model(drop(model, "num_attention_heads"))
    with pytest.raises(ValueError, match=r"model.eps=1e-05"):
        interop.shape_of_model(model | {"eps": 1e-5})


def test_mixed_dtypes_survive(net, tmp_path):
    """Dtypes are kept tensor by tensor through every format; each pair of neighbours is converted once."""
    state = {n: t.bfloat16() if ".attn" in n and "norm" not in n else t for n, t in net.state_dict().items()}
    interop.write_diffusers(tmp_path / "a", state, SHAPE)
    path, form = tmp_path / "a", "diffusers"
    for i, name in enumerate(("mcore", "rcm", "mcore", "wan", "diffusers")):
        target = tmp_path / f"{i}{SUFFIX[name]}"
        convert(form, name, path, target, head_dim=32, formats=FORMATS)
        path, form = target, name
    assert len({t.dtype for t in state.values()}) == 2
    assert same(interop.read_diffusers(path)[0], state)


@pytest.mark.parametrize("loader", [WanTransformer3DModel, AutoModel])
def test_diffusers_folder_loads(loader, net, sources, tmp_path):
    convert("rcm", "diffusers", sources["rcm"], tmp_path / "d", head_dim=32)
    loaded = loader.from_pretrained(str(tmp_path / "d"))
    assert isinstance(loaded, WanTransformer3DModel)
    assert same(loaded.state_dict(), net.state_dict())
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    theirs = json.loads((sources["diffusers"] / "config.json").read_text())
    assert config == theirs
    mode = (tmp_path / "d" / "config.json").stat().st_mode
    assert (tmp_path / "d" / "diffusion_pytorch_model.safetensors").stat().st_mode == mode


def test_sharded_folder(net, tmp_path):
    state = net.state_dict()
    interop.write_diffusers(tmp_path / "d", state, SHAPE, max_shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "d").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        with safetensors.safe_open(tmp_path / "d" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        tensors = safetensors.torch.load_file(tmp_path / "d" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100_000
    index = json.loads((tmp_path / "d" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert same(WanTransformer3DModel.from_pretrained(tmp_path / "d").state_dict(), state)
    assert same(interop.read_diffusers(tmp_path / "d")[0], state)
    (tmp_path / "d" / files[1]).unlink()
    with pytest.raises(ValueError, match=f"{files[1]}.*not in the folder"):
        interop.read_diffusers(tmp_path / "d")


def test_pipeline_folder_and_official_folder(net, hub, tmp_path):
    net.save_pretrained(tmp_path / "pipeline" / "transformer")
    assert same(interop.read_diffusers(tmp_path / "pipeline")[0], net.state_dict())
    (tmp_path / "official").mkdir()
    safetensors.torch.save_file(hub, tmp_path / "official" / "diffusion_pytorch_model.safetensors")
    assert same(interop.load_tensors(tmp_path / "official"), hub)


def test_bfloat16_keeps_what_diffusers_keeps(sources, tmp_path):
    """diffusers loads our bfloat16 folder without changing a tensor: nothing rounded that it wants in float32."""
    convert("wan", "diffusers", sources["wan"], tmp_path / "d", dtype=torch.bfloat16, head_dim=32)
    written, _ = interop.read_diffusers(tmp_path / "d")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "d", torch_dtype=torch.bfloat16).state_dict()
    assert same(written, loaded)
    assert {t.dtype for t in written.values()} == {torch.bfloat16, torch.float32}
    full, _ = interop.read_diffusers(sources["diffusers"])
    assert all(torch.equal(t.to(full[n]) if t.dtype == torch.float32 else t, full[n].to(t)) for n, t in written.items())
    convert("wan", "rcm", sources["wan"], tmp_path / "r.pt", dtype=torch.bfloat16, head_dim=32)
    assert {t.dtype for t in interop.load_tensors(tmp_path / "r.pt").values()} == {torch.bfloat16}


def test_residue_of_wrappers_passes(hub, tmp_path):
    """What third-party rCM files are known to hold besides weights."""
    rcm = interop.hub_to_rcm(hub)
    odd = {n.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): t for n, t in rcm.items()}
    odd |= {"net.accum_sample_counter": torch.tensor(3), "net.blocks.0.self_attn._extra_state": None}
    assert odd.keys() & rcm.keys() != rcm.keys()
    torch.save({"model": odd}, tmp_path / "odd.pt")
    assert same(interop.rcm_to_hub(interop.load_tensors(tmp_path / "odd.pt")), hub)
    assert same(interop.wan_to_hub(hub | {"blocks.0.ffn.0._extra_state": torch.zeros(1)}), hub)
    with pytest.raises(ValueError, match=r"unknown.*counter"):
        interop.wan_to_hub(interop.hub_to_rcm(hub) | {"net.counter": torch.tensor(3)})
    with pytest.raises(ValueError, match=r"a second tensor for head.head.bias"):
        interop.wan_to_hub(hub | {"net.head.head.bias": hub["head.head.bias"]})


def test_views_are_written_without_their_storage(hub, tmp_path):
    big = torch.randn(100, 64, 24)
    hub["text_embedding.0.weight"] = big[7]
    hub["time_embedding.2.weight"] = torch.randn(64, 64).T
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"w{suffix}"
        interop.save_tensors(path, hub)
        assert same(interop.load_tensors(path), hub)
        assert path.stat().st_size < 1.2 * sum(t.nbytes for t in hub.values())


def test_old_torch_format_is_read(hub, tmp_path):
    torch.save(hub, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(interop.load_tensors(tmp_path / "old.pth"), hub)


def drop(tensors, *names):
    return {n: t for n, t in tensors.items() if n not in names}


TO_HUB = {
    "wan": (lambda hub: hub, interop.wan_to_hub),
    "rcm": (interop.hub_to_rcm, interop.rcm_to_hub),
    "diffusers": (interop.hub_to_diffusers, interop.diffusers_to_hub),
    "mcore": (lambda hub: interop.hub_to_mcore(hub, SHAPE), lambda t: interop.mcore_to_hub(t, SHAPE)),
}


@pytest.mark.parametrize("form", TO_HUB)
def test_unknown_and_missing_names_are_listed(form, hub):
    make, to_hub = TO_HUB[form]
    tensors = make(hub)
    bias = next(n for n in tensors if re.search(r"blocks\.1\.ffn\..*bias", n))
    broken = drop(tensors, bias) | {"blocks.0.ffn.net.7.weight": torch.zeros(1)}
    with pytest.raises(ValueError) as caught:
        to_hub(broken)
    assert f"in {form} names: unknown (1) blocks.0.ffn.net.7.weight" in str(caught.value)
    assert f"missing (1) {bias.removeprefix('net.')}" in str(caught.value)
    with pytest.raises(ValueError, match=rf"in {form} names: missing \(1\) {re.escape(bias.removeprefix('net.'))}$"):
        to_hub(drop(tensors, bias))
    many = tensors | {f"junk.{i}": torch.zeros(1) for i in range(50)}
    with pytest.raises(ValueError, match=r"unknown \(50\) junk.0, .*junk.19 and 30 more$"):
        to_hub(many)


def test_names_of_another_format_are_recognized(net, hub):
    with pytest.raises(ValueError, match="these look like diffusers names"):
        interop.wan_to_hub(net.state_dict())
    with pytest.raises(ValueError, match="these look like wan or rcm names"):
        interop.diffusers_to_hub(hub)
    with pytest.raises(ValueError, match="it is an rCM file"):
        interop.infer_shape(interop.wan_to_hub(interop.hub_to_rcm(hub)), head_dim=32)
    with pytest.raises(ValueError, match=r"must be \[width, channels x 4\] in an rCM file"):
        interop.rcm_to_hub(hub)


def test_absurd_block_index(hub):
    """It must not make a table of all the blocks that it pretends."""
    with pytest.raises(ValueError, match=r"blocks\.20000\.modulation") as caught:
        interop.wan_to_hub(hub | {"blocks.20000.modulation": torch.zeros(1)})
    missing = re.search(r"missing \((\d+)\)", str(caught.value))
    assert int(missing[1]) < 27 * 100


def test_another_size_is_named(net, hub, sources, tmp_path):
    other = dataclasses.replace(SHAPE, ffn_hidden_size=100)
    message = r"blocks.0.ffn.0.weight has \[96, 64\], expected \[100, 64\]"
    with pytest.raises(ValueError, match=message):
        interop.check_hub(hub, other)
    with pytest.raises(ValueError, match=r"linear_fc1.weight has \[96, 64\], expected \[100, 64\]"):
        interop.mcore_to_hub(interop.hub_to_mcore(hub, SHAPE), other)
    interop.write_diffusers(tmp_path / "d", net.state_dict(), other)  # config.json and weights contradict each other
    with pytest.raises(ValueError, match=f"{tmp_path}/d: .*{message}"):
        convert("diffusers", "wan", tmp_path / "d", tmp_path / "w.pth")
    hub["blocks.1.ffn.2.weight"] = torch.zeros(64, 97)
    with pytest.raises(ValueError, match=r"1 tensors differ in shape: blocks.1.ffn.2.weight has \[64, 97\]"):
        interop.infer_shape(hub, head_dim=32)
    with pytest.raises(ValueError, match=r"head width 128 does not divide the model width 64.*--head-dim"):
        convert("wan", "rcm", sources["wan"], tmp_path / "r.pt")
    with pytest.raises(ValueError, match=r"head_dim=16: .*32 wide"):
        convert("diffusers", "rcm", sources["diffusers"], tmp_path / "r.pt", head_dim=16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


def test_quantized_and_differing_dtypes(hub):
    name = "blocks.0.self_attn.q.weight"
    with pytest.raises(ValueError, match=f"{name} has dtype torch.int8"):
        interop.infer_shape(hub | {name: hub[name].to(torch.int8)}, head_dim=32)
    with pytest.raises(ValueError, match=f"{name} torch.bfloat16.*convert them to one dtype"):
        interop.hub_to_mcore(hub | {name: hub[name].bfloat16()}, SHAPE)


def test_image_to_video_is_refused(hub, tmp_path):
    with pytest.raises(ValueError, match=r"k_img.*image-to-video.*not supported yet"):
        interop.wan_to_hub(hub | {"blocks.0.cross_attn.k_img.weight": torch.zeros(64, 64)})
    with pytest.raises(ValueError, match=r"add_k_proj.*image-to-video.*not supported yet"):
        interop.diffusers_to_hub(interop.hub_to_diffusers(hub) | {"blocks.0.attn2.add_k_proj.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_dim": 1280}, "image-to-video"),
        ({"_class_name": "CosmosTransformer3DModel"}, "_class_name='CosmosTransformer3DModel'"),
        ({"eps": 1e-5}, "eps=1e-05: .* 1e-06"),
        ({"num_layers": "2"}, "num_layers='2': must be a whole number"),
        ({"patch_size": 2}, "sizes of the wrong type"),
        ({"patch_size": [1, 2]}, r"patch_size=\(1, 2\): must be three numbers"),
    ],
)
def test_config_that_is_no_text_to_video_wan(change, message, net, tmp_path):
    interop.write_diffusers(tmp_path / "d", net.state_dict(), SHAPE)
    config = interop.diffusers_config(SHAPE) | change
    (tmp_path / "d" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        interop.read_diffusers(tmp_path / "d")


class Hostile:
    """Unpickled without precaution, it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_that_runs_code_is_refused(new_format, hub, tool, tmp_path, capsys):
    marker, path = tmp_path / "ran", tmp_path / "hostile.pt"
    content = interop.hub_to_rcm(hub) | {"net.x": Hostile(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match="refused"):
        interop.load_tensors(path)
    assert tool.main(["--from", "rcm", "--to", "wan", str(path), str(tmp_path / "out.pth")]) == 2
    captured = capsys.readouterr()
    assert "wants to run code" in captured.err and "Traceback" not in captured.err
    assert not marker.exists() and not (tmp_path / "out.pth").exists()
    torch.load(path, weights_only=False)  # the plant works
    assert marker.exists()


def test_unreadable_sources(tmp_path, hub):
    cut = tmp_path / "cut.safetensors"
    safetensors.torch.save_file(hub, cut)
    cut.write_bytes(cut.read_bytes()[:-9])
    (tmp_path / "junk.pt").write_bytes(b"not a torch file")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"a": torch.zeros(1), "step": 3}, tmp_path / "mixed.pt")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "cut.safetensors": "cannot be read as safetensors",
        "junk.pt": "refused",
        "list.pt": "holds a list",
        "mixed.pt": "1 are none: step",
        "absent.pt": "no such file",
        "folder": "found none",
        "file.bin": "no such file",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            interop.load_tensors(tmp_path / name)
    with pytest.raises(ValueError, match=r"no config.json"):
        interop.read_diffusers(tmp_path / "folder")


def test_index_may_not_leave_the_folder(net, tmp_path):
    interop.write_diffusers(tmp_path / "d", net.state_dict(), SHAPE, max_shard_bytes=200_000)
    index = tmp_path / "d" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "proj_out.bias"
    safetensors.torch.save_file({name: torch.zeros(20)}, tmp_path / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="not in the folder"):
        interop.read_diffusers(tmp_path / "d")
    index.write_text(json.dumps({"weight_map": drop(content["weight_map"], name)}))
    with pytest.raises(ValueError, match=r"1 tensors are not in both index and files: \['proj_out.bias'\]"):
        interop.read_diffusers(tmp_path / "d")


def test_destinations(sources, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file.pth").write_text("x")
    for name, dst, message in (
        ("wan", "file.pth", "exists already"),
        ("diffusers", "full", "exists already"),
        ("wan", "empty", "give a name ending in .pt or .pth or .safetensors"),
        ("rcm", "x.safetensors", "give a name ending in .pt or .pth"),
        ("wan", "absent/x.pth", "absent does not exist"),
    ):
        with pytest.raises(ValueError, match=f"{dst}: .*{message}"):
            convert("diffusers", name, sources["diffusers"], tmp_path / dst)
    assert (tmp_path / "file.pth").read_text() == "x"
    convert("wan", "diffusers", sources["wan"], tmp_path / "empty", head_dim=32)
    assert (tmp_path / "empty" / "config.json").is_file()
    with pytest.raises(ValueError, match="format 'mcore': must be one of diffusers, wan, rcm"):
        convert("mcore", "wan", sources["mcore"], tmp_path / "y.pth")


@pytest.mark.parametrize("form", ["wan", "diffusers", "mcore"])
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_nothing(form, failure, sources, tmp_path, monkeypatch):
    """The writers fail after half of their bytes."""

    def half(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise failure("planted")

    monkeypatch.setattr(torch, "save", half)
    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises((OSError, failure), match="planted"):
        convert("wan", form, sources["wan"], tmp_path / f"out{SUFFIX[form]}", head_dim=32, formats=FORMATS)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tool, sources, tmp_path, monkeypatch, capsys):
    state = interop.read_diffusers(sources["diffusers"])[0]
    fake = types.SimpleNamespace(read_network=read_network, write_network=write_network)
    monkeypatch.setitem(sys.modules, "rcm_mcore.checkpoint", fake)
    run = lambda *arguments: tool.main([str(a) for a in arguments])
    d, m, e, b = (tmp_path / name for name in ("d", "m", "e.safetensors", "b.pt"))
    assert run("--from", "rcm", "--to", "diffusers", "--head-dim", 32, sources["rcm"], d) == 0
    count = sum(t.numel() for t in state.values())
    expected = f"{d}: diffusers, 69 tensors, {count:,} parameters, {4 * count:,} bytes (2 layers, width 64, 2 heads of 32)"
    assert capsys.readouterr().out.strip() == expected
    assert same(interop.read_diffusers(d)[0], state)
    assert run("--from", "diffusers", "--to", "mcore", d, m) == 0
    assert run("--from", "mcore", "--to", "wan", "--which", "ema", m, e) == 0
    plus_one = {n: t + 1 for n, t in state.items()}
    assert same(interop.hub_to_diffusers(interop.load_tensors(e)), plus_one)
    assert run("--from", "mcore", "--to", "rcm", "--dtype", "bfloat16", m, b) == 0
    assert {t.dtype for t in interop.load_tensors(b).values()} == {torch.bfloat16}
    capsys.readouterr()
    for arguments, message in (
        (("--from", "rcm", "--to", "diffusers", "--head-dim", 32, sources["rcm"], d), "exists already"),
        (("--from", "wan", "--to", "rcm", sources["wan"], tmp_path / "x.pt"), "--head-dim"),
        (("--from", "wan", "--to", "rcm", "--head-dim", 0, sources["wan"], tmp_path / "x.pt"), "head_dim=0"),
        (("--from", "wan", "--to", "rcm", "--which", "ema", sources["wan"], tmp_path / "x.pt"), "--which ema"),
        (("--from", "rcm", "--to", "wan", sources["wan"], tmp_path / "x.pt"), f"{sources['wan']}: patch_embedding"),
        (("--from", "mcore", "--to", "wan", tmp_path / "absent", tmp_path / "x.pt"), "absent"),
    ):
        assert run(*arguments) == 2
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err
    with pytest.raises(SystemExit) as caught:
        run("--from", "onnx", "--to", "wan", d, tmp_path / "x.pt")
    assert caught.value.code == 2
    assert not (tmp_path / "x.pt").exists()
