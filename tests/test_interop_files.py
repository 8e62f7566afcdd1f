"""Files of weights: what is refused, that nothing is left half-written, and that no network is ever whole in memory."""

import errno
import json
import os
import weakref
import zipfile
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from networks import MODELS, random_transformer, same

from rcm_mcore import interop
from rcm_mcore.checkpoint import open_network, write_network
from rcm_mcore.interop import LazyTensor, ReadOptions, WriteOptions, convert, files
from rcm_mcore.interop.dcp import open_folder, read_index

HEADS = ReadOptions(head_dim=32)


@pytest.fixture(scope="module")
def net():
    return random_transformer("wan")


@pytest.fixture
def hub(net):
    return interop.diffusers_to_hub(net.state_dict())


@pytest.fixture(scope="module")
def sources(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    net.save_pretrained(folder / "diffusers")
    convert("diffusers", "wan", folder / "diffusers", folder / "wan.pth")
    convert("diffusers", "rcm", folder / "diffusers", folder / "rcm.pt")
    return {"diffusers": folder / "diffusers", "wan": folder / "wan.pth", "rcm": folder / "rcm.pt"}


def drop(tensors, *names):
    return {n: t for n, t in tensors.items() if n not in names}


def test_files_are_those_of_torch_and_safetensors(hub, tmp_path):
    """Read back by the libraries themselves, mapped or not; views, strides and odd dtypes too."""
    hub["text_embedding.0.weight"] = torch.randn(100, 64, 24)[7]
    hub["time_embedding.2.weight"] = torch.randn(64, 64).T
    hub |= {"odd": torch.randn(3).bfloat16(), "scalar": torch.tensor(2.5), "half": torch.randn(5).half()}
    interop.save_tensors(tmp_path / "w.safetensors", hub)
    interop.save_tensors(tmp_path / "w.pt", hub)
    assert same(safetensors.torch.load_file(tmp_path / "w.safetensors"), hub)
    for mmap in (True, False):
        assert same(torch.load(tmp_path / "w.pt", mmap=mmap, weights_only=True), hub)
    assert zipfile.ZipFile(tmp_path / "w.pt").testzip() is None
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
        assert same(interop.open_tensors(path), hub)
        assert path.stat().st_size < 1.2 * sum(t.nbytes for t in hub.values())
    safetensors.torch.save_file({n: t.contiguous() for n, t in hub.items()}, tmp_path / "theirs.safetensors")
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    (tmp_path / "theirs.safetensors").rename(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert same(interop.open_tensors(tmp_path / "pipeline" / "transformer"), hub)


def test_what_torch_saves_is_read(tmp_path):
    """Views, other strides, shared storages, parameters, no elements."""
    big = torch.randn(10, 6, 4)
    saved = {
        "view": big[7],
        "turned": big[1].T,
        "every other": big[0, ::2],
        "broadcast": torch.randn(4).expand(3, 4),
        "scalar": torch.tensor(2),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2).half()),
    }
    torch.save(saved, tmp_path / "w.pt")
    weights = interop.open_tensors(tmp_path / "w.pt")
    assert same(weights, saved) and not weights["parameter"].load().requires_grad


def test_old_torch_format_is_read(hub, tmp_path):
    torch.save({"model": hub}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    assert same(interop.open_tensors(tmp_path / "old.pth"), hub)


def test_a_file_may_be_larger_than_memory(hub, tmp_path, monkeypatch):
    """torch and safetensors map a file privately, which Linux refuses when memory is less: 28.6 GB on 23 GB, found so."""
    for name in ("w.pt", "w.safetensors"):
        interop.save_tensors(tmp_path / name, hub)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", None)
    for name in ("w.pt", "w.safetensors"):
        assert same(interop.open_tensors(tmp_path / name), hub)
    with pytest.raises(TypeError):
        torch.load(tmp_path / "w.pt", mmap=True)


class Watched:
    """Lazy weights that keep count of the bytes that are alive of what was loaded."""

    def __init__(self, tensors):
        self.live = self.peak = self.largest = 0
        self.weights = {name: self.lazy(tensor) for name, tensor in tensors.items()}

    def lazy(self, tensor):
        def load():
            copy = tensor.clone()
            self.live += copy.nbytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(copy.untyped_storage(), self.free, copy.nbytes)
            return copy

        self.largest = max(self.largest, tensor.nbytes)
        return LazyTensor(tensor.shape, tensor.dtype, load)

    def free(self, size):
        self.live -= size


TARGETS = {"diffusers": "out", "wan": "out.safetensors", "rcm": "out.pt", "mcore": "out"}


@pytest.mark.parametrize("kind", ["wan image", "cosmos"])
@pytest.mark.parametrize("target", TARGETS)
def test_no_more_than_a_layer_is_alive(kind, target, tmp_path):
    """One tensor, or the parts of a fused one, whatever the length of the network and the size of a shard."""
    if kind == "cosmos" and target == "wan":
        target = "cosmos"
    model = MODELS[kind]
    watched = Watched(interop.diffusers_to_hub(random_transformer(kind).state_dict()))
    total = sum(w.nbytes for w in watched.weights.values())
    mcore = interop.network_format(
        lambda path, which: open_network(path, which=which),
        lambda path, weights, section, progress: write_network(path, weights, section, progress=progress),
    )
    formats = {
        **interop.FORMATS,
        "mcore": mcore,
        "watched": interop.Format(read=lambda path, options: (watched.weights, model)),
    }
    out = tmp_path / {**TARGETS, "cosmos": "out.pt"}[target]
    told = []
    write = WriteOptions(max_shard_bytes=total // 2, progress=lambda done, total: told.append((done, total)))
    convert("watched", target, tmp_path, out, write=write, formats=formats)
    names = [f"blocks.0.self_attn.{x}.weight" for x in (("q_proj", "k_proj", "v_proj") if kind == "cosmos" else "qkv")]
    fused = sum(watched.weights[name].nbytes for name in names)
    assert watched.live == 0
    assert watched.peak == (max(fused, watched.largest) if target == "mcore" else watched.largest)
    done = [d for d, _ in told]
    assert done == sorted(done) and done[-1] == told[-1][1]
    back = tmp_path / "back"
    convert(target, "diffusers", out, back, formats=formats, read=HEADS)
    got, _ = interop.read_diffusers(back)
    want = random_transformer(kind).state_dict()
    assert got.keys() == want.keys()
    assert same(got, want)


class Hostile:
    """Unpickled without precaution, it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_that_runs_code_is_refused(new_format, hub, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "hostile.pt"
    content = interop.hub_to_rcm(hub) | {"net.x": Hostile(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match="wants to run code"):
        convert("rcm", "wan", path, tmp_path / "out.pth")
    assert not marker.exists() and not (tmp_path / "out.pth").exists()
    torch.load(path, weights_only=False)  # the plant works
    assert marker.exists()


def test_unreadable_sources(tmp_path, hub):
    cut = tmp_path / "cut.safetensors"
    safetensors.torch.save_file(hub, cut)
    cut.write_bytes(cut.read_bytes()[:-9])
    safetensors.torch.save_file(hub, tmp_path / "header.safetensors")
    header = bytearray((tmp_path / "header.safetensors").read_bytes())
    header[20] ^= 0xFF
    (tmp_path / "header.safetensors").write_bytes(header)
    (tmp_path / "junk.pt").write_bytes(b"not a torch file")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"a": torch.zeros(1), "step": 3}, tmp_path / "mixed.pt")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "cut.safetensors": "cannot be read as safetensors",
        "header.safetensors": "cannot be read as safetensors",
        "junk.pt": "refused",
        "list.pt": "holds a list",
        "mixed.pt": "1 are none: step",
        "absent.pt": "no such file",
        "folder": "found none",
        "file.bin": "no such file",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            convert("wan", "rcm", tmp_path / name, tmp_path / "out.pt")
    with pytest.raises(ValueError, match=r"no config.json"):
        interop.read_diffusers(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"no checkpoint of rCM's training: no .metadata"):
        convert("rcm_dcp", "wan", tmp_path / "folder", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_index_may_not_leave_the_folder(net, tmp_path):
    interop.write_diffusers(tmp_path / "d", net.state_dict(), MODELS["wan"], max_shard_bytes=200_000)
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


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("wan", {"image_dim": 1280}, "added_kv_proj_dim=None: must be the width 64"),
        ("wan", {"in_channels": 14}, "in_channels=14, out_channels=5: must be equal in a text-to-video network"),
        ("wan", {"_class_name": "UNet2DModel"}, "_class_name='UNet2DModel'"),
        ("wan", {"eps": 1e-5}, "eps=1e-05: .* 1e-06"),
        ("wan", {"num_layers": "2"}, "num_layers='2': must be a whole number"),
        ("wan", {"patch_size": 2}, "patch_size=2: must be a list"),
        ("wan", {"patch_size": [1, 2]}, r"patch_size=\[1, 2\]: must have 3 entries"),
        ("cosmos", {"extra_pos_embed_type": "learnable"}, "extra_pos_embed_type='learnable'"),
        ("cosmos", {"use_crossattn_projection": True}, "use_crossattn_projection=True"),
        ("cosmos", {"in_channels": 8}, "in_channels=8, out_channels=5: must be equal"),
        ("cosmos", {"mlp_ratio": "4"}, "mlp_ratio='4': must be a number"),
        ("cosmos", {"mlp_ratio": 1.51}, "mlp_ratio=1.51: times the width 64 it is no whole number"),
    ],
)
def test_config_of_another_network_is_refused(kind, change, message, tmp_path):
    interop.write_diffusers(tmp_path / "d", random_transformer(kind).state_dict(), MODELS[kind])
    config = interop.diffusers_config(MODELS[kind]) | change
    (tmp_path / "d" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        convert("diffusers", "rcm", tmp_path / "d", tmp_path / "out.pt")


def test_config_and_weights_that_contradict_each_other(net, tmp_path):
    config = interop.diffusers_config(MODELS["wan"]) | {"ffn_dim": 100}
    interop.write_diffusers(tmp_path / "d", net.state_dict(), MODELS["wan"])
    (tmp_path / "d" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{tmp_path}/d: .*ffn.0.weight has \[96, 64\], expected \[100, 64\]"):
        convert("diffusers", "wan", tmp_path / "d", tmp_path / "w.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


def test_destinations(sources, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file.pth").write_text("x")
    for name, dst, message in (
        ("wan", "file.pth", "exists already"),
        ("diffusers", "full", "exists already"),
        ("wan", "full", "exists already"),
        ("rcm", "x.safetensors", "give a name ending in .pt or .pth"),
        ("wan", "absent/x.pth", "absent does not exist"),
    ):
        with pytest.raises(ValueError, match=f"{dst}: .*{message}"):
            convert("diffusers", name, sources["diffusers"], tmp_path / dst)
    assert (tmp_path / "file.pth").read_text() == "x"
    convert("wan", "diffusers", sources["wan"], tmp_path / "empty", read=HEADS)
    assert (tmp_path / "empty" / "config.json").is_file()
    with pytest.raises(ValueError, match="format 'mcore': must be one of diffusers, wan, cosmos, rcm"):
        convert("mcore", "wan", sources["wan"], tmp_path / "y.pth")


@pytest.mark.parametrize("target", ["wan out.pth", "wan out.safetensors", "wan out", "diffusers out"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "planted"), KeyboardInterrupt("planted")])
def test_a_failed_write_leaves_nothing(target, failure, sources, tmp_path, monkeypatch):
    """The disk is full, or the user impatient, after half of the bytes."""
    form, out = target.split()
    count, data = [], files._data

    def half(tensor):
        count.append(tensor)
        assert not (tmp_path / out).exists()  # under a hidden name so far
        if len(count) > 40:
            raise failure
        return data(tensor)

    monkeypatch.setattr(files, "_data", half)
    with pytest.raises(type(failure), match="planted"):
        convert("wan", form, sources["wan"], tmp_path / out, read=HEADS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compression, order, message", [
    (zipfile.ZIP_DEFLATED, b"little", r"data\.pkl is compressed"),
    (zipfile.ZIP_STORED, b"big", "big-endian"),
])  # fmt: skip
def test_torch_files_that_would_be_read_as_noise(tmp_path, compression, order, message):
    torch.save({"a": torch.zeros(500), "b": torch.rand(50)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as old, zipfile.ZipFile(tmp_path / "again.pt", "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, order if name.endswith("/byteorder") else old.read(name))
    with pytest.raises(ValueError, match=f"again.pt: .*{message}"):
        interop.open_tensors(tmp_path / "again.pt")


def test_one_tensor_in_two_files_of_a_set(net, tmp_path):
    interop.write_diffusers(tmp_path / "d", net.state_dict(), MODELS["wan"], max_shard_bytes=200_000)
    last = sorted(tmp_path.glob("d/*.safetensors"))[-1]
    tensors = safetensors.torch.load_file(last)
    safetensors.torch.save_file(tensors | {"patch_embedding.bias": torch.zeros(64)}, last)
    with pytest.raises(ValueError, match=f"{last}: .'patch_embedding.bias'. are in another file"):
        interop.read_diffusers(tmp_path / "d")


def test_a_checkpoint_that_lacks_a_part_of_a_tensor(tmp_path):
    write_network(tmp_path / "c", {"a": torch.ones(4, 2)}, {})
    index = read_index(tmp_path / "c")
    (chunk,) = index.state_dict_metadata["student.a"].chunks
    index.state_dict_metadata["student.a"].chunks[0] = replace(chunk, sizes=torch.Size([3, 2]))
    with pytest.raises(ValueError, match=r"parts of student\.a are missing"):
        open_folder(tmp_path / "c", index)
