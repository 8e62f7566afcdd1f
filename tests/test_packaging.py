"""What an install brings, and that this repository never shadows other packages."""

import importlib.util
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_only_our_two_packages_are_importable():
    """`kernels` is also a Hugging Face package that diffusers and transformers probe for: ours must never answer."""
    for name in ("kernels", "tools", "tests", "examples"):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
        assert not any(p and Path(p).is_relative_to(ROOT) and ".venv" not in Path(p).parts for p in places), (name, places)
    assert str(ROOT) not in [str(Path(p or ".").resolve()) for p in sys.path]


def test_packages_map_to_this_distribution():
    owners = packages_distributions()
    ours = {name for name, dists in owners.items() if "rcm-mcore" in dists}
    assert ours <= {"rcm_mcore", "rcm_kernels", "__editable___rcm_mcore_0_1_0_finder"}
    assert importlib.util.find_spec("rcm_kernels").origin == str(ROOT / "kernels" / "rcm_kernels" / "__init__.py")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_import_neither_rcm_mcore_nor_megatron():
    for path in (ROOT / "kernels").rglob("*.py"):
        text = path.read_text()
        assert "import rcm_mcore" not in text and "from rcm_mcore" not in text and "megatron" not in text, path


def test_optional_packages_are_not_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = " ".join(project["dependencies"])
    assert not any(name in required for name in ("transformer-engine", "flash-attn", "apex", "triton", "torchvision"))
