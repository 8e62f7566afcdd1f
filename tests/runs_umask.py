"""In one process: what a run and the tools write, under the umasks given (test_security.py): FOLDER UMASK ..."""

import importlib.util
import logging
import os
import sys
from pathlib import Path

import tiny
import torch

from rcm_mcore import train
from rcm_mcore.data import text
from rcm_mcore.data.build import write_embedding
from rcm_mcore.evaluation.digits import DigitClassifier
from rcm_mcore.parallel.mesh import destroy_mesh
from rcm_mcore.sampling.folder import _publish


def tool(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parent.parent / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_all(folder):
    folder.mkdir()
    tiny.make_shards(folder / "shards", samples=16)
    config = tiny.config(folder / "shards", folder / "run", train={"steps": 2}, checkpoint={"every": 1})
    assert train.main([str(tiny.write_config(folder / "run.yaml", config)), "log.wandb=false"]) == 0
    destroy_mesh()
    convert = tool("convert_checkpoint")
    for target, name in (("diffusers", "diffusers"), ("wan", "wan.safetensors"), ("rcm", "rcm.pth")):
        assert convert.main(["--from", "mcore", "--to", target, str(folder / "run"), str(folder / name)]) == 0
    assert convert.main(["--from", "diffusers", "--to", "mcore", str(folder / "diffusers"), str(folder / "mcore")]) == 0
    write_embedding(folder / "embedding.safetensors", torch.zeros(2, 8))
    _publish(folder / "part.safetensors", {"latents": torch.zeros(2)})
    DigitClassifier().save(folder / "classifier.safetensors")
    text.train_tokenizer(["one two three", "four five six"], folder / "text_encoder")
    text.build_text_encoder(folder / "text_encoder", seed=0, d_model=8, layers=1, heads=2, d_ff=8)


def main(folder, masks):
    logging.basicConfig(level=logging.ERROR)
    for mask in masks:
        os.umask(int(mask, 8))
        write_all(folder / mask)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
