"""What SECURITY.md says of the code: nothing is run that was read, nothing is fetched, and files follow the umask."""

import ast
import builtins
import contextlib
import dataclasses
import json
import re
import shutil
import stat
import subprocess
import sys
import typing

import launch
import pytest
from test_launch_slurm import ROOT, Site

from rcm_mcore.config import Config
from rcm_mcore.data import text

SOURCES = sorted(path for folder in ("rcm_mcore", "kernels", "tools") for path in (ROOT / folder).rglob("*.py"))
# Calls that run what they read, start a shell, or make files that do not follow the umask.
NEVER = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load", "dill.loads", "cloudpickle.load",
    "cloudpickle.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open", "pandas.read_pickle", "torch.hub.load",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "os.system", "os.popen", "pty.spawn", "subprocess.getoutput", "subprocess.getstatusoutput", "runpy.run_path",
    "runpy.run_module", "code.interact", "eval", "exec", "compile", "__import__", "importlib.import_module",
    "torch.utils.cpp_extension.load", "torch.utils.cpp_extension.load_inline", "ctypes.CDLL", "torch.ops.load_library",
    "megatron.core.dist_checkpointing.load", "megatron.core.dist_checkpointing.load_common_state_dict",
    "torch.export.load", "torch.jit.load",
    "torch.distributed.checkpoint.load", "torch.distributed.checkpoint.format_utils.dcp_to_torch_save",
    "tempfile.mktemp", "tempfile.mkstemp", "tempfile.NamedTemporaryFile", "tempfile.mkdtemp", "os.open", "os.chmod", "os.umask",
    "safetensors.torch.save_file", "safetensors.numpy.save_file",
}  # fmt: skip
MODULES = {"urllib", "requests", "http", "httpx", "aiohttp", "ftplib", "smtplib", "huggingface_hub", "paramiko", "wandb"}
# (file, what): why it is safe. An entry that is no longer needed is an error too.
ALLOWED = {
    ("rcm_mcore/interop/dcp.py", "pickle.Unpickler"): "the base of one that refuses every name but the parts of an index",
    ("rcm_mcore/data/workers.py", "pickle.load"): "between a training and processes that it started, over pipes of their own",
    ("rcm_mcore/checkpoint/folder.py", "os.open"): "of a folder, to have its names on the disk; nothing is made",
    ("rcm_mcore/training/wandb_run.py", "wandb"): "only where log.wandb=true asks for it",
    ("rcm_mcore/evaluation/extractor.py", "torch.export.load"): "only with --run-extractor",
    ("rcm_mcore/evaluation/extractor.py", "torch.jit.load"): "only with --run-extractor",
    ("rcm_mcore/config/model.py", "compile"): "the name of a field, model.compile",
    ("tools/benchmark_step.py", "tempfile.mkdtemp"): "samples for the ranks of one run, removed at its end",
    ("kernels/rcm_kernels/vendors.py", "importlib.import_module"): "names of attention packages that stand in that file",
}


def names_of(tree):
    """What the names of a module stand for: {local name: dotted name}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(node, names):
    """The dotted name that an expression is, or nothing."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id if hasattr(builtins, node.id) else f"?{node.id}"), *reversed(parts)])


def is_false(node):
    return isinstance(node, ast.Constant) and node.value is False


def is_true(node):
    return isinstance(node, ast.Constant) and node.value is True


def findings(source):
    """(line, what) of everything in a module that runs what it reads, fetches, or makes private files."""
    tree = ast.parse(source)
    names = names_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, module) for module in modules if module.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Attribute | ast.Name) and dotted(node, names) in NEVER:
            yield node.lineno, dotted(node, names)
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func, names), {keyword.arg: keyword.value for keyword in node.keywords}
        method = node.func.attr if isinstance(node.func, ast.Attribute) else name
        if name in ("torch.load", "torch.serialization.load") and not is_true(given.get("weights_only")):
            yield node.lineno, "torch.load without weights_only=True"
        if "shell" in given and not is_false(given["shell"]):
            yield node.lineno, "shell"
        if "allow_pickle" in given and not is_false(given["allow_pickle"]):
            yield node.lineno, "allow_pickle"
        if "trust_remote_code" in given and not is_false(given["trust_remote_code"]):
            yield node.lineno, "trust_remote_code"
        if method == "from_pretrained":
            if not is_true(given.get("local_files_only")):
                yield node.lineno, "from_pretrained without local_files_only=True"
            if re.search(r"\.Auto[A-Z]", name) and "trust_remote_code" not in given:
                yield node.lineno, "an Auto class without trust_remote_code=False"


@pytest.mark.parametrize(
    "source, what",
    {
        "import pickle as p\np.load(f)": "pickle.load",
        "from pickle import loads as read\nread(b)": "pickle.loads",
        "import torch\ntorch.load(f, map_location='cpu')": "torch.load without weights_only=True",
        "import torch\ntorch.load(f, weights_only=flag)": "torch.load without weights_only=True",
        "import yaml\nyaml.load(f, Loader=yaml.SafeLoader)": "yaml.load",
        "eval(text)": "eval",
        "reader = exec": "exec",
        "import os\nos.system('ls')": "os.system",
        "import subprocess\nsubprocess.run(line, shell=True)": "shell",
        "import numpy as np\nnp.load(f, allow_pickle=True)": "allow_pickle",
        "model = Model.from_pretrained(d, local_files_only=True, trust_remote_code=True)": "trust_remote_code",
        "model = Model.from_pretrained(d)": "from_pretrained without local_files_only=True",
        "from transformers import AutoModel\nAutoModel.from_pretrained(d, local_files_only=True)":
            "an Auto class without trust_remote_code=False",
        "from urllib.request import urlopen": "urllib.request",
        "from safetensors.torch import save_file\nsave_file(t, p)": "safetensors.torch.save_file",
        "from megatron.core import dist_checkpointing\ndist_checkpointing.load(t, p)": "megatron.core.dist_checkpointing.load",
    }.items(),
)  # fmt: skip
def test_the_audit_finds(source, what):
    assert what in {found for _, found in findings(source)}


def test_the_audit_does_not_find_what_is_harmless():
    harmless = (
        "import torch, re, yaml\nnet.eval()\nre.compile('a')\ntorch.load(f, weights_only=True)\nyaml.safe_load(f)\n"
        "torch.compile(f)\nloop.exec()\nModel.from_pretrained(d, local_files_only=True)\n"
    )
    assert list(findings(harmless)) == []


def test_nothing_runs_what_it_reads_or_fetches():
    assert len(SOURCES) > 80
    found = {}
    for path in SOURCES:
        for line, what in findings(path.read_text()):
            found.setdefault((str(path.relative_to(ROOT)), what), []).append(line)
    assert {key: lines for key, lines in found.items() if key not in ALLOWED} == {}
    assert [key for key in ALLOWED if key not in found] == []


def test_shell_scripts_evaluate_nothing():
    """One `bash -c`, of a constant: it ignores two signals and becomes the command that stands in its arguments."""
    scripts = [*(ROOT / "launch_slurm").glob("*.sh")]
    lines = [
        line.strip()
        for path in scripts
        for line in path.read_text().splitlines()
        if not line.lstrip().startswith("#") and re.search(r"\beval\b|\b(ba|z|da)?sh -c\b|`|(?<![\"\w])\$[@*]|\$\*", line)
    ]
    assert lines == ["""bash -c 'trap "" USR1 TERM; exec "$@"' bash "$@\""""] and len(scripts) == 6


def test_words_of_a_command_line_are_never_run(tmp_path):
    site = Site(tmp_path)
    site.leave(9, 9)
    trap = tmp_path / "trap"
    values = [
        f"$(touch {trap})", f"`touch {trap}`", f"a; touch {trap}", f"a && touch {trap} &", f"' ; touch {trap} ; '",
        f'" | touch {trap} #', "*", "~ {a,b} !x \\", "",
    ]  # fmt: skip
    words = [f"log.project={value}" for value in values]
    site.script("rcm_14b.sh", *words)
    assert site.called("torchrun")[-len(words) :] == words
    assert site.called("srun")[-len(words) :] == words  # of the decision about a requeue
    for name, arguments in (("sample.sh", ["--prompt", words[0], words[2]]), ("convert.sh", [words[1], words[3]])):
        site.script(name, *arguments)
        assert site.called("srun")[-len(arguments) :] == arguments
    assert not trap.exists() and not (ROOT / "trap").exists()


def test_no_field_of_the_configuration_is_a_secret():
    """wandb's key comes from the environment alone: the resolved configuration is printed, stored and sent."""
    names = {field.name for section in typing.get_type_hints(Config).values() for field in dataclasses.fields(section)}
    assert len(names) > 50 and "project" in names
    assert [name for name in names if re.search(r"key|token|secret|password|credential", name)] == []


def test_a_tokenizer_that_brings_code_does_not_run_it(tmp_path, monkeypatch):
    """Nor asks on a terminal whether to."""
    encoder, tokenizer, trap = tmp_path / "text_encoder", tmp_path / "tokenizer", tmp_path / "trap"
    text.train_tokenizer(["one two three", "four five six"], encoder)
    shutil.copytree(encoder, tokenizer)  # apart from the encoder's config.json, which says what kind it is
    text.build_text_encoder(encoder, seed=0, d_model=8, layers=1, heads=2, d_ff=8)
    (tokenizer / "own.py").write_text(f"open({str(trap)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *words: asked.append(words) or "y")
    with contextlib.suppress(ValueError):  # refused, or read as one of the library's own
        text.TextEncoder(tmp_path)
    assert asked == [] and not trap.exists()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two folders, named by the umask under which a run and the tools filled them."""
    folder = tmp_path_factory.mktemp("umask")
    command = [sys.executable, launch.HERE / "runs_umask.py", folder, "002", "027"]
    done = subprocess.run(command, env=launch.environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("mask", ["002", "027"])
def test_what_is_written_has_the_modes_of_the_umask(written, mask):
    paths = sorted((written / mask).rglob("*"))
    names = {path.name for path in paths}
    assert {
        "log.jsonl",
        "events.jsonl",
        "latest",
        "manifest.json",
        "config.yaml",
        "state.json",
        "diffusers",
        "SHA256SUMS",
    } <= names
    assert {"wan.safetensors", "rcm.pth", "shard_000000.tar", "model.safetensors", "classifier.safetensors"} <= names
    wanted = {True: 0o777 & ~int(mask, 8), False: 0o666 & ~int(mask, 8)}
    modes = {str(path.relative_to(written)): stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert {name: oct(mode) for name, mode in modes.items() if mode != wanted[(written / name).is_dir()]} == {}


def test_the_policy_is_there():
    words = (ROOT / "SECURITY.md").read_text()
    assert all(name in words for name in ("weights_only", "safe_load", "umask", "WANDB_API_KEY", "tests/test_security.py"))
    assert not re.search(r"\S+@\S+\.\w+", words)
