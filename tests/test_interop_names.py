"""Names and shapes of Wan and Cosmos weights in every scheme, against diffusers: its networks and its own converters."""

import dataclasses
import re

import oracle
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_cosmos_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from networks import MODELS, random_transformer, same

from rcm_mcore import interop
from rcm_mcore.config import ModelConfig, parse_model
from rcm_mcore.models.build import build_model

KINDS = list(MODELS)


def drop(tensors, *names):
    return {n: t for n, t in tensors.items() if n not in names}


@pytest.fixture(scope="module")
def states():
    """diffusers' state dicts by kind."""
    return {kind: random_transformer(kind).state_dict() for kind in KINDS}


@pytest.fixture
def hubs(states):
    return {kind: interop.diffusers_to_hub(state) for kind, state in states.items()}


@pytest.fixture
def hub(hubs):
    return hubs["wan"]


def test_wan_hub_names_are_the_official_ones(hub):
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


def test_cosmos_hub_names_are_the_official_ones(hubs):
    """Written out from compatibility.md 4.4."""
    block = [f"adaln_modulation_{part}.{i}" for part in ("self_attn", "cross_attn", "mlp") for i in (1, 2)]
    block += [
        f"{attention}.{name}"
        for attention in ("self_attn", "cross_attn")
        for name in ("q_proj", "k_proj", "v_proj", "output_proj", "q_norm", "k_norm")
    ]
    names = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in [*block, "mlp.layer1", "mlp.layer2"]}
    names |= {f"t_embedder.1.linear_{i}.weight" for i in (1, 2)} | {f"final_layer.adaln_modulation.{i}.weight" for i in (1, 2)}
    names |= {"x_embedder.proj.1.weight", "t_embedding_norm.weight", "final_layer.linear.weight"}
    assert set(hubs["cosmos"]) == set(hubs["cosmos frames"]) == names


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_network_are_found(kind, hubs):
    hub, model = hubs[kind], MODELS[kind]
    assert {name: tensor.shape for name, tensor in hub.items()} == interop.expected_shapes(model)
    assert interop.infer_model(hub, head_dim=32) == dataclasses.replace(model, text_len=512)
    assert same(interop.hub_to_diffusers(hub), random_transformer(kind).state_dict())


@pytest.mark.parametrize(
    "fields, tensors, parameters",
    [
        (dict(size="1.3B"), 825, 1_418_996_800),
        (dict(size="14B"), 1095, 14_288_491_584),
        (dict(size="14B", condition="image"), 1303, 16_394_878_784),
        (dict(size="14B", condition="first_last"), 1304, 16_394_878_784 + 657_920),
        (dict(family="cosmos", size="0.6B"), 407, 0.5975e9),
        (dict(family="cosmos", size="2B"), 567, 1.9564e9),
        (dict(family="cosmos", size="14B"), 727, 14.265e9),
        (dict(family="cosmos", size="2B", condition="frames"), 567, 1.9564e9),
        (dict(family="cosmos", size="14B", condition="frames"), 727, 14.265e9),
    ],
)
def test_released_sizes(fields, tensors, parameters):
    """architectures.md A.0 and B.0; the size is found from the weights, and with it what they do not tell."""
    model = parse_model(fields)
    sizes = interop.expected_shapes(model)
    assert len(sizes) == tensors
    exact = model.family == "wan"  # the sheet rounds Cosmos'
    assert sum(size.numel() for size in sizes.values()) == (parameters if exact else pytest.approx(parameters, rel=1e-4))
    hub = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    assert interop.infer_model(hub) == model
    ours = interop.hub_to_mcore(hub, model)
    assert sum(weight.numel() for weight in ours.values()) == sum(size.numel() for size in sizes.values())


@pytest.mark.parametrize("kind", ["wan", "wan image"])
def test_diffusers_own_converter_agrees_on_wan(kind, states, hubs):
    """Names and values, in the direction that diffusers can convert; it has none for the positions of first_last."""
    theirs = convert_wan_transformer_to_diffusers(dict(hubs[kind]))  # empties its argument
    assert same(theirs, states[kind])


@pytest.mark.parametrize("kind", ["cosmos", "cosmos frames"])
def test_diffusers_own_converter_agrees_on_cosmos(kind, states, hubs):
    official = interop.hub_to_rcm(hubs[kind])
    assert all(name.startswith("net.") for name in official)
    extra = {"net.accum_image_sample_counter": torch.zeros(1), "net.pos_embedder.seq": torch.arange(4)}
    theirs = convert_cosmos_transformer_checkpoint_to_diffusers({**official, **extra})
    assert same(drop(theirs, "accum_image_sample_counter"), states[kind])
    assert same(interop.official_to_hub({**official, **extra, "net.blocks.0.self_attn._extra_state": None}), hubs[kind])


def test_rcm_names(hub):
    rcm = interop.hub_to_rcm(hub)
    assert {name.removeprefix("net.") for name in rcm} == hub.keys()
    assert all(name.startswith("net.") for name in rcm)
    patch = rcm["net.patch_embedding.weight"]
    for c, y, x in ((0, 0, 1), (3, 1, 0), (4, 1, 1)):  # [D, (c, t, h, w)]
        assert torch.equal(patch[:, c * 4 + y * 2 + x], hub["patch_embedding.weight"][:, c, 0, y, x])
    assert same(interop.rcm_to_hub(rcm), hub)


def rows_of(fused, hub, names, heads, d):
    for head in range(heads):
        for part, name in enumerate(names):
            rows = slice((len(names) * head + part) * d, (len(names) * head + part + 1) * d)
            assert torch.equal(fused[rows], hub[name][head * d : (head + 1) * d])


@pytest.mark.parametrize("kind", oracle.VARIANTS)
def test_mcore_names_and_layout(kind, mesh):
    """Against the names written out in the oracle and those of our networks, and the rows of one head by hand."""
    model = oracle.VARIANTS[kind](dtype="float32")
    with oracle.exact_diffusers():
        state = oracle.diffusers_network(model).float().state_dict()
    hub = interop.diffusers_to_hub(state)
    ours = interop.hub_to_mcore(hub, model)
    assert same(ours, oracle.names_of_ours(model, state))
    net = build_model(model, mesh.config, mesh.groups)
    assert {name: weight.shape for name, weight in ours.items()} == {name: p.shape for name, p in net.named_parameters()}
    assert same(interop.mcore_to_hub(ours, model), hub)
    q = "self_attn.{}.weight" if model.family == "wan" else "self_attn.{}_proj.weight"
    names = [f"blocks.1.{q.format(x)}" for x in "qkv"]
    rows_of(ours["blocks.1.self_attn.linear_qkv.weight"], hub, names, 4, model.head_dim)


@pytest.mark.parametrize("kind", ["wan image", "wan first_last"])
def test_mcore_names_of_images(kind, hubs):
    hub, model = hubs[kind], MODELS[kind]
    ours = interop.hub_to_mcore(hub, model)
    t2v = interop.hub_to_mcore(interop.diffusers_to_hub(random_transformer("wan").state_dict()), MODELS["wan"])
    more = {f"img_emb.proj.{i}.{leaf}" for i in (0, 1, 3, 4) for leaf in ("weight", "bias")}
    more |= {f"blocks.{i}.cross_attn.linear_kv_img.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")}
    more |= {f"blocks.{i}.cross_attn.norm_k_img.weight" for i in (0, 1)}
    more |= {"img_emb.emb_pos"} if kind == "wan first_last" else set()
    assert ours.keys() - t2v.keys() == more
    for leaf in ("weight", "bias"):
        names = [f"blocks.1.cross_attn.{x}_img.{leaf}" for x in "kv"]
        rows_of(ours[f"blocks.1.cross_attn.linear_kv_img.{leaf}"], hub, names, 2, 32)
    assert ours["patch_embedding.weight"].shape == (64, 14 * 4)
    assert same(interop.mcore_to_hub(ours, model), hub)


def test_residue_of_wrappers_passes(hub):
    """What third-party rCM files are known to hold besides weights."""
    rcm = interop.hub_to_rcm(hub)
    odd = {n.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): t for n, t in rcm.items()}
    odd |= {"net.accum_sample_counter": torch.tensor(3), "net.blocks.0.self_attn._extra_state": None}
    assert odd.keys() & rcm.keys() != rcm.keys()
    assert same(interop.rcm_to_hub(odd), hub)
    assert same(interop.official_to_hub(hub | {"blocks.0.ffn.0._extra_state": torch.zeros(1)}), hub)
    with pytest.raises(ValueError, match=r"unknown.*counter"):
        interop.official_to_hub(interop.hub_to_rcm(hub) | {"net.counter": torch.tensor(3)})
    with pytest.raises(ValueError, match=r"a second tensor for head.head.bias"):
        interop.official_to_hub(hub | {"net.head.head.bias": hub["head.head.bias"]})


def test_networks_of_a_training_checkpoint_by_prefix(hub):
    rcm = interop.hub_to_rcm(hub)
    held = dict(rcm)
    for i, prefix in enumerate(("net_ema.", "net_fake_score."), start=1):
        held |= {prefix + name.removeprefix("net."): tensor + i for name, tensor in rcm.items()}
    for i, which in enumerate(("student", "ema", "fake_score")):
        assert same(interop.rcm_to_hub(held, which=which), {name: tensor + i for name, tensor in hub.items()})
    with pytest.raises(ValueError, match="holds no fake_score network; it holds: student"):
        interop.rcm_to_hub(rcm, which="fake_score")


TO_HUB = {
    "wan": ("wan", lambda hub: hub, interop.official_to_hub),
    "rcm": ("wan", interop.hub_to_rcm, interop.rcm_to_hub),
    "diffusers": ("wan", interop.hub_to_diffusers, interop.diffusers_to_hub),
    "mcore": (
        "wan image",
        lambda hub: interop.hub_to_mcore(hub, MODELS["wan image"]),
        lambda t: interop.mcore_to_hub(t, MODELS["wan image"]),
    ),
    "cosmos": ("cosmos", lambda hub: hub, interop.official_to_hub),
}


@pytest.mark.parametrize("form", TO_HUB)
def test_unknown_and_missing_names_are_listed(form, hubs):
    kind, make, to_hub = TO_HUB[form]
    tensors = make(hubs[kind])
    gone = next(n for n in tensors if re.search(r"blocks\.1\..*(k_proj|ffn\..*bias)", n))
    with pytest.raises(ValueError) as caught:
        to_hub(drop(tensors, gone) | {"blocks.0.ffn.net.7.weight": torch.zeros(1)})
    assert f"in {form} names: unknown (1) blocks.0.ffn.net.7.weight" in str(caught.value)
    assert f"missing (1) {gone.removeprefix('net.')}" in str(caught.value)
    with pytest.raises(ValueError, match=rf"in {form} names: missing \(1\) {re.escape(gone.removeprefix('net.'))}$"):
        to_hub(drop(tensors, gone))
    many = tensors | {f"junk.{i}": torch.zeros(1) for i in range(50)}
    with pytest.raises(ValueError, match=r"unknown \(50\) junk.0, .*junk.19 and 30 more$"):
        to_hub(many)


def test_names_of_another_format_are_recognized(hubs, states):
    for kind, other in (("wan", "wan or rcm"), ("cosmos", "cosmos or rcm")):
        with pytest.raises(ValueError, match="these look like diffusers names"):
            interop.official_to_hub(states[kind])
        with pytest.raises(ValueError, match=f"these look like {other} names"):
            interop.diffusers_to_hub(hubs[kind])
    with pytest.raises(ValueError, match="it is an rCM file"):
        interop.infer_model(interop.official_to_hub(interop.hub_to_rcm(hubs["wan"])), head_dim=32)
    with pytest.raises(ValueError, match=r"must be \[width, channels x 4\] in an rCM file"):
        interop.rcm_to_hub(hubs["wan"])


def test_absurd_block_index(hub):
    """It must not make a table of all the blocks that it pretends."""
    with pytest.raises(ValueError, match=r"blocks\.20000\.modulation") as caught:
        interop.official_to_hub(hub | {"blocks.20000.modulation": torch.zeros(1)})
    missing = re.search(r"missing \((\d+)\)", str(caught.value))
    assert int(missing[1]) < 27 * 100


@pytest.mark.parametrize("name", ["extra_pos_embedder.pos_emb_t", "crossattn_proj.0.weight"])
def test_other_cosmos_networks_are_refused(name, hubs, states):
    for to_hub, names in ((interop.official_to_hub, hubs), (interop.diffusers_to_hub, states)):
        with pytest.raises(ValueError, match=f"{name}: a Cosmos network with .*not supported"):
            to_hub(names["cosmos"] | {name: torch.zeros(1)})


def test_another_size_is_named(hubs):
    hub = hubs["wan"]
    other = dataclasses.replace(MODELS["wan"], ffn_hidden_size=100)
    with pytest.raises(ValueError, match=r"blocks.0.ffn.0.weight has \[96, 64\], expected \[100, 64\]"):
        interop.check_hub(hub, other)
    with pytest.raises(ValueError, match=r"linear_fc1.weight has \[96, 64\], expected \[100, 64\]"):
        interop.mcore_to_hub(interop.hub_to_mcore(hub, MODELS["wan"]), other)
    with pytest.raises(ValueError, match=r"1 tensors differ in shape: blocks.1.ffn.2.weight has \[64, 97\]"):
        interop.infer_model(hub | {"blocks.1.ffn.2.weight": torch.zeros(64, 97)}, head_dim=32)
    wide = hub | {"patch_embedding.weight": torch.zeros(64, 14, 1, 2, 2)}  # Wan2.2's image-to-video
    with pytest.raises(ValueError, match=r"takes 14 channels and head.head.weight gives 5.*not supported"):
        interop.infer_model(wide, head_dim=32)
    with pytest.raises(ValueError, match=r"x_embedder.proj.1.weight has 32 columns"):
        interop.infer_model(hubs["cosmos"] | {"x_embedder.proj.1.weight": torch.zeros(64, 32)})


def test_quantized_and_differing_dtypes(hub):
    name = "blocks.0.self_attn.q.weight"
    with pytest.raises(ValueError, match=f"{name} has dtype torch.int8"):
        interop.infer_model(hub | {name: hub[name].to(torch.int8)}, head_dim=32)
    with pytest.raises(ValueError, match=f"{name} torch.bfloat16.*convert them to one dtype"):
        interop.hub_to_mcore(hub | {name: hub[name].bfloat16()}, MODELS["wan"])


@pytest.mark.parametrize("kind", KINDS)
def test_model_section(kind):
    model = MODELS[kind]
    assert interop.model_of_section(interop.section_of_model(model)) == model
    assert ModelConfig(**interop.section_of_model(model)).head_dim == 32
    with pytest.raises(ValueError, match=r"model.eps=1e-05"):
        interop.model_of_section(interop.section_of_model(model) | {"eps": 1e-5})
