"""Feature extractors from files, and programs that are refused unless they are trusted."""

import hashlib
import pickle
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

from rcm_mcore.evaluation.digits import DigitClassifier
from rcm_mcore.evaluation.extractor import Extractor


class Means(nn.Module):
    """Mean colours of the first and the last frame, by a linear map: [n, 3, F, H, W] to [n, 4]."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(6, 4)

    def forward(self, videos):
        return self.map(torch.cat([videos[:, :, 0].mean((2, 3)), videos[:, :, -1].mean((2, 3))], 1))


def videos(n, seed=0):
    return torch.rand(n, 3, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Means().eval()


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "means.pt2"
    program = torch.export.export(network, (videos(2),), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def scripted(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("scripted") / "means.pt"
    torch.jit.script(network).save(path)
    return path


@pytest.mark.parametrize("kind", ["exported", "scripted"])
def test_programs_give_what_the_network_gives(kind, network, request):
    extractor = Extractor(request.getfixturevalue(kind), run_code=True)
    for n in (1, 2, 5):
        found = extractor(videos(n))
        assert found.dtype == torch.float32 and not found.requires_grad
        assert torch.allclose(found, network(videos(n)), atol=1e-6), n
    assert torch.allclose(extractor(videos(3).double()), network(videos(3)), atol=1e-6)


@pytest.mark.parametrize("kind", ["exported", "scripted"])
def test_programs_are_refused_unless_they_are_trusted(kind, request):
    with pytest.raises(ValueError, match=r"are programs, .*--run-extractor"):
        Extractor(request.getfixturevalue(kind))


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_program_that_is_not_trusted_is_not_even_read(exported, tmp_path):
    """A .pt2 with a pickle in it runs it when it is read."""
    trap, path = tmp_path / "trap", tmp_path / "evil.pt2"
    payload = tmp_path / "payload"
    torch.save(Trap(trap), payload)
    with zipfile.ZipFile(exported) as source, zipfile.ZipFile(path, "w") as out:
        for name in source.namelist():
            is_inputs = name.endswith("sample_inputs/model.pt")
            out.writestr(name, payload.read_bytes() if is_inputs else source.read(name))
    assert pickle.dumps(Trap(trap)) and not trap.exists()
    with pytest.raises(ValueError, match="are programs"):
        Extractor(path)
    assert not trap.exists()
    with pytest.raises(ValueError, match="cannot be loaded"):
        Extractor(path, run_code=True)
    assert trap.exists(), "the danger that the flag is for"


def test_networks_of_ours(tmp_path):
    torch.manual_seed(0)
    classifier = DigitClassifier().eval()
    classifier.save(tmp_path / "digits.safetensors")
    extractor = Extractor(tmp_path / "digits.safetensors")
    grey = videos(3).mean(1)
    assert torch.allclose(extractor(videos(3)), classifier.features(grey), atol=1e-6)
    with pytest.raises(ValueError, match=r"does not take videos \[2, 3, 5, 16, 16\]: videos: shape \[2, 5, 16, 16\]"):
        extractor(torch.rand(2, 3, 5, 16, 16))


def test_further_formats(tmp_path):
    class Network:
        def __init__(self, path):
            self.weight = safetensors.torch.load_file(path)["w"]

        def to(self, device):
            self.device = device
            return self

        def features(self, given):
            return given.flatten(1)[:, :2] * self.weight

    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.torch.save({"w": torch.tensor([1.0, 10.0])}, metadata={"format": "mine-1"}))
    assert torch.equal(Extractor(path, formats={"mine-1": Network})(torch.ones(1, 3, 2, 2, 2)), torch.tensor([[1.0, 10.0]]))
    with pytest.raises(ValueError, match=r"its format is mine-1; known are digit-classifier-1$"):
        Extractor(path)
    path.write_bytes(safetensors.torch.save({"w": torch.ones(1)}))
    with pytest.raises(ValueError, match="its format is None"):
        Extractor(path)


def test_the_hash_is_that_of_the_file(exported):
    assert Extractor(exported, run_code=True).sha256 == hashlib.sha256(exported.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "given",
    [lambda x: x.flatten(1)[0], lambda x: x.flatten(1)[:1], lambda x: (x.flatten(1),), lambda x: x.mean((3, 4))],
)
def test_another_output_is_refused(exported, given):
    extractor = Extractor(exported, run_code=True)
    extractor._extract = given
    with pytest.raises(ValueError, match=r"for 2 videos; must be a tensor \[2, d\]"):
        extractor(videos(2))


def test_a_program_without_a_free_batch_size(network, tmp_path):
    torch.export.save(torch.export.export(network, (videos(2),)), tmp_path / "fixed.pt2")
    extractor = Extractor(tmp_path / "fixed.pt2", run_code=True)
    assert extractor(videos(2)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"fixed\.pt2: does not take videos \[3, 3, 4, 16, 16\]"):
        extractor(videos(3))


@pytest.mark.parametrize("name", ["a.pt2", "a.pt", "a.safetensors", "a.onnx"])
def test_damaged_and_other_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=rf"{name}: (cannot be loaded|is no safetensors|must end in)"):
        Extractor(tmp_path / name, run_code=True)
    with pytest.raises(FileNotFoundError):
        Extractor(tmp_path / f"no_{name}")
