"""What older versions of this project wrote is still understood."""

import pytest
import tiny
import torch
import yaml

from rcm_mcore.checkpoint import write_network
from rcm_mcore.config import parse_config, to_yaml
from rcm_mcore.training.setup import check_starts
from rcm_mcore.training.state import read_state


def test_a_run_of_an_older_version_is_of_the_same_model(tmp_path):
    """Its `model` section lacks the fields that came since; what is refused here is what comes after the models agree."""
    config = parse_config(tiny.config("shards", tmp_path / "run"))
    write_network(tmp_path / "c", {"a": torch.zeros(2)}, {})
    tree = yaml.safe_load(to_yaml(config))
    for name in ("family", "condition", "adaln_rank", "rope_ratios", "image_dim", "image_len"):
        del tree["model"][name]
    (tmp_path / "c" / "config.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "c" / "state.json").write_text('{"step": 1, "own_steps": {"student": 1}, "data": {}}')
    with pytest.raises(ValueError, match=r"holds a run that trains \['student'\]"):
        read_state(tmp_path / "c", [], config=config, mesh=None)


def test_a_teacher_of_an_older_version_is_of_its_family(tmp_path):
    section = {"size": "tiny", "num_layers": 2, "hidden_size": 48, "num_attention_heads": 2, "ffn_hidden_size": 64}
    section |= {"in_channels": 4, "freq_dim": 16, "text_dim": 8, "text_len": 5}
    write_network(tmp_path / "teacher", {"a": torch.zeros(2)}, section)
    tree = tiny.config("shards", tmp_path / "run", "distill", distill={"teacher": str(tmp_path / "teacher")})
    check_starts(parse_config(tree))
    tree["model"] |= {"condition": "image"}
    with pytest.raises(ValueError, match=r"has model\.condition=text, this run has image"):
        check_starts(parse_config(tree))
