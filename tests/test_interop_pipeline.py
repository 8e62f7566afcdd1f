"""Exported pipeline folders, loaded and run by diffusers, against our samplers; every component tiny and random."""

import json
import math
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers import transformer_cosmos
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5EncoderModel,
)

from rcm_mcore.data.text import build_text_encoder, train_tokenizer
from rcm_mcore.diffusion import samplers
from rcm_mcore.diffusion.samplers import MID_TIMES, few_step_times, sample_few_step
from rcm_mcore.interop import PipelineOptions, WriteOptions, convert

WIDTH, HEIGHT, FRAMES = 48, 32, 5
LATENT, IMAGE = (1, 16, 2, 4, 6), (1, 16, 1, 4, 6)


class NoGuardrail(torch.nn.Module):
    """Stands in for the safety checker, which Cosmos' pipelines demand."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Tokenizer, VAE and text encoders."""
    folder = tmp_path_factory.mktemp("text")
    train_tokenizer(["a red square moves left", "a blue disc"], folder)
    build_text_encoder(folder, seed=0, d_model=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        t5 = T5EncoderModel(
            T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="relu")
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SimpleNamespace(tokenizer=tokenizer, vae=vae, umt5=UMT5EncoderModel.from_pretrained(folder), t5=t5)


def randomize(net):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            values = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * values if "norm" in name and p.ndim == 1 and name.endswith("weight") else 0.1 * values)
    return net.eval()


@pytest.fixture(scope="module")
def wan(parts, tmp_path_factory):
    """A student's transformer folder, the base pipeline, and the pipeline exported from both."""
    folder = tmp_path_factory.mktemp("wan")
    sizes = dict(num_attention_heads=2, attention_head_dim=24, ffn_dim=64, num_layers=2, text_dim=32, freq_dim=32)
    base = randomize(WanTransformer3DModel(**sizes))
    student = WanTransformer3DModel(**sizes)
    student.load_state_dict({name: 0.9 * tensor for name, tensor in base.state_dict().items()})
    WanPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.umt5,
        vae=parts.vae,
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        transformer=base,
    ).save_pretrained(folder / "base")
    student.save_pretrained(folder / "student")
    options = PipelineOptions(base=folder / "base", license="apache-2.0", base_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    convert("diffusers", "diffusers", folder / "student", folder / "out", write=WriteOptions(pipeline=options))
    return folder


@pytest.fixture(scope="module")
def trusted(wan):
    pipe = WanPipeline.from_pretrained(wan / "out", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_folder(wan):
    out = wan / "out"
    assert {path.name for path in out.iterdir()} == {
        "README.md", "SHA256SUMS", "model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae",
    }  # fmt: skip
    for path in (wan / "base" / "vae").iterdir():
        # A configuration is written into when it is saved again, weights are replaced.
        assert os.path.samefile(path, out / "vae" / path.name) == (path.suffix == ".safetensors")
        assert path.read_bytes() == (out / "vae" / path.name).read_bytes()
    card = (out / "README.md").read_text()
    assert "license: apache-2.0\nbase_model: Wan-AI/Wan2.1-T2V-1.3B-Diffusers\n" in card
    assert "2510.08431" in card and "0.987654, 0.933781, 0.852895, 0.608979" in card  # architectures.md E.2
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert listed == {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"SHA256SUMS"}


def run_wan(pipe, noises, steps):
    """Latents that the pipeline ends with; noises after the first come from torch's global generator."""
    seed = noises.seed
    torch.manual_seed(seed)
    return pipe(
        "a red square", negative_prompt=None, height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=steps,
        guidance_scale=1.0, max_sequence_length=16, latents=noises.first, output_type="latent",
    ).frames  # fmt: skip


def noises_of(seed, scale, steps, shape=LATENT):
    """The first noise, and those that a scheduler then draws from the global generator seeded with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    later = [torch.randn(shape, generator=generator) for _ in range(steps)]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(99))
    return SimpleNamespace(seed=seed, first=scale * noise, all=[noise, *later])


@pytest.mark.parametrize("steps", [4, 2])
def test_wan_pipeline_equals_our_sampler(trusted, steps):
    pipe = trusted
    text, _ = pipe.encode_prompt("a red square", do_classifier_free_guidance=False, max_sequence_length=16)
    velocity = lambda x, s: pipe.transformer(x.float(), 1000 * s.float(), text, return_dict=False)[0]
    times = few_step_times(steps)
    s = math.sin(times[0]) / (math.sin(times[0]) + math.cos(times[0]))
    assert pipe.scheduler.init_noise_sigma == pytest.approx(s, abs=1e-12)
    noises = noises_of(3, s, steps)
    got = run_wan(pipe, noises, steps)
    want = sample_few_step(velocity, noises.all, times)
    assert float(want.std()) > 0.5
    assert float((got - want).abs().max()) <= 1e-4
    with pytest.raises(ValueError, match="num_inference_steps=5: this student has from 1 to 4 steps"):
        pipe.scheduler.set_timesteps(5)


def tell(scheduler, card):
    """What the card says to do with a stock scheduler; returns the times."""
    sigmas = json.loads(card.read_text().split("sigmas = ")[1].split("\n")[0])
    stock = scheduler.set_timesteps
    scheduler.set_timesteps = lambda n=None, device=None, **options: stock(n, device=device, sigmas=sigmas)
    return sigmas


def test_wan_without_trusting_the_folder(wan, trusted):
    """Refused as it is; in the base pipeline with the stock scheduler and the card's times, the same video."""
    with pytest.raises(ValueError, match="trust_remote_code"):
        WanPipeline.from_pretrained(wan / "out")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(wan / "out", subfolder="scheduler")
    student = WanTransformer3DModel.from_pretrained(wan / "out", subfolder="transformer")
    pipe = WanPipeline.from_pretrained(wan / "base", transformer=student, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    sigmas = tell(scheduler, wan / "out" / "README.md")
    noises = noises_of(4, sigmas[0], 4)
    assert float((run_wan(pipe, noises, 4) - run_wan(trusted, noises, 4)).abs().max()) <= 1e-4


def test_wan_with_the_stock_scheduler(wan, trusted, tmp_path):
    options = PipelineOptions(base=wan / "base", steps=2, stock_scheduler=True)
    convert("diffusers", "diffusers", wan / "student", tmp_path / "out", write=WriteOptions(pipeline=options))
    pipe = WanPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    sigmas = tell(pipe.scheduler, tmp_path / "out" / "README.md")
    assert len(sigmas) == 2
    noises = noises_of(5, sigmas[0], 2)
    assert float((run_wan(pipe, noises, 2) - run_wan(trusted, noises, 2)).abs().max()) <= 1e-4


@pytest.mark.parametrize("both_ends", [False, True])
def test_wan_image_pipeline_equals_our_sampler(both_ends, parts, tmp_path):
    """The network told of the first frame, or of the first and the last, by the pipeline; the student's steps by us."""
    sizes = dict(num_attention_heads=2, attention_head_dim=24, ffn_dim=64, num_layers=1, text_dim=32, freq_dim=32)
    positions = dict(pos_embed_seq_len=10) if both_ends else {}  # of two images in 4 patches and a class row each
    net = randomize(
        WanTransformer3DModel(in_channels=36, out_channels=16, image_dim=32, added_kv_proj_dim=48, **sizes, **positions)
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        clip = CLIPVisionModel(
            CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                             patch_size=8)
        )  # fmt: skip
    WanImageToVideoPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.umt5,
        vae=parts.vae,
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        transformer=net,
        image_encoder=clip,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    ).save_pretrained(tmp_path / "base")
    net.save_pretrained(tmp_path / "student")
    write = WriteOptions(pipeline=PipelineOptions(base=tmp_path / "base"))
    convert("diffusers", "diffusers", tmp_path / "student", tmp_path / "out", write=write)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("    image=image, last_image=last_image, prompt=prompt" if both_ends else "    image=image, prompt=prompt") in card
    pipe = WanImageToVideoPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    told = []
    network = pipe.transformer.forward
    pipe.transformer.forward = lambda **options: told.append(options) or network(**options)
    noises = noises_of(9, pipe.scheduler.init_noise_sigma, 4)
    images = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ((200, 40, 90), (10, 240, 60))]
    torch.manual_seed(9)
    got = pipe(
        image=images[0], last_image=images[1] if both_ends else None, prompt="a red square", height=HEIGHT, width=WIDTH,
        num_frames=FRAMES, num_inference_steps=4, guidance_scale=1.0, latents=noises.first, output_type="latent",
    ).frames  # fmt: skip
    text, image, given = (told[0][name] for name in ("encoder_hidden_states", "encoder_hidden_states_image", "hidden_states"))

    def velocity(x, s):
        seen = torch.cat([x.float(), given[:, 16:]], 1)
        return network(seen, 1000 * s.float(), text, encoder_hidden_states_image=image, return_dict=False)[0]

    want = sample_few_step(velocity, noises.all, few_step_times(4))
    assert len(told) == 4 and float(want.std()) > 0.5
    assert float((got - want).abs().max()) <= 1e-4


def export_cosmos(parts, folder, pipeline, **sizes):
    """Makes a student's transformer folder, the base pipeline, and the pipeline exported from both."""
    sizes |= dict(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, mlp_ratio=2.0, text_embed_dim=32, adaln_lora_dim=8,
        extra_pos_embed_type=None,
    )  # fmt: skip
    base = randomize(CosmosTransformer3DModel(**sizes))
    student = CosmosTransformer3DModel(**sizes)
    student.load_state_dict({name: 0.9 * tensor for name, tensor in base.state_dict().items()})
    pipe = pipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.t5,
        vae=parts.vae,
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        transformer=base,
        safety_checker=NoGuardrail(),
    )
    pipe.register_modules(safety_checker=None)  # no checker can be saved here, and the released pipelines name none
    pipe.save_pretrained(folder / "base")
    student.save_pretrained(folder / "student")
    write = WriteOptions(pipeline=PipelineOptions(base=folder / "base"))
    convert("diffusers", "diffusers", folder / "student", folder / "out", write=write)
    return folder


@pytest.fixture(scope="module")
def cosmos(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cosmos")
    return export_cosmos(parts, folder, Cosmos2TextToImagePipeline, rope_scale=(1.0, 4.0, 4.0))


@pytest.fixture
def padding(monkeypatch):
    """torchvision's resize, which diffusers wants for its mask and which is not installed."""
    nearest = lambda x, size, interpolation: torch.nn.functional.interpolate(x, size=tuple(size), mode="nearest")
    shim = SimpleNamespace(functional=SimpleNamespace(resize=nearest), InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(transformer_cosmos, "transforms", shim, raising=False)


def run_cosmos(pipe, noise, steps, guidance):
    return pipe(
        "a red square", negative_prompt="a disc", height=HEIGHT, width=WIDTH, num_inference_steps=steps,
        guidance_scale=guidance, max_sequence_length=16, latents=noise, output_type="latent", return_dict=False,
    )[0].unsqueeze(2)  # fmt: skip


def cosmos_velocity(pipe, guidance=0.0):
    text, negative = pipe.encode_prompt("a red square", negative_prompt="a disc", max_sequence_length=16)
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)

    def velocity(x, s):
        of = lambda text: pipe.transformer(x.float(), s.float(), text, padding_mask=mask, return_dict=False)[0]
        conditional = of(text)
        return conditional + guidance * (conditional - of(negative)) if guidance else conditional

    return velocity


def test_cosmos_pipeline_equals_our_sampler(cosmos, padding):
    pipe = Cosmos2TextToImagePipeline.from_pretrained(cosmos / "out", trust_remote_code=True, safety_checker=NoGuardrail())
    pipe.set_progress_bar_config(disable=True)
    for steps in (4, 1):
        noises = noises_of(6, 1.0, steps, IMAGE)
        torch.manual_seed(6)
        got = run_cosmos(pipe, noises.first, steps, 1.0)
        want = sample_few_step(cosmos_velocity(pipe), noises.all, few_step_times(steps, mid_times=MID_TIMES["paper"]))
        assert float(want.std()) > 0.5
        assert float((got - want).abs().max()) <= 1e-4


def test_cosmos_video_pipeline_equals_our_sampler(parts, padding, tmp_path):
    """The frames that are given are clean in what the network sees, at almost no noise, and in what it gives."""
    world = Cosmos2VideoToWorldPipeline
    export_cosmos(parts, tmp_path, world, in_channels=17, out_channels=16, rope_scale=(1.0, 3.0, 3.0))
    assert "pipe(image=image, fps=None, prompt=prompt" in (tmp_path / "out" / "README.md").read_text()
    pipe = world.from_pretrained(tmp_path / "out", trust_remote_code=True, safety_checker=NoGuardrail())
    pipe.set_progress_bar_config(disable=True)
    noises = noises_of(8, 1.0, 4)
    prepare, given = pipe.prepare_latents, []

    def prepared(*arguments):
        given.append(prepare(*arguments))
        torch.manual_seed(noises.seed)  # encoding the frame draws from the same generator
        return given[0]

    pipe.prepare_latents = prepared
    with torch.no_grad():
        got = pipe(
            image=Image.new("RGB", (WIDTH, HEIGHT), (200, 40, 90)), prompt="a red square", height=HEIGHT, width=WIDTH,
            num_frames=FRAMES, num_inference_steps=4, guidance_scale=1.0, fps=None, max_sequence_length=16,
            latents=noises.first, output_type="latent", return_dict=False,
        )[0]  # fmt: skip
    _, clean, is_given, _, mask, _ = given[0]
    text, _ = pipe.encode_prompt("a red square", do_classifier_free_guidance=False, max_sequence_length=16)
    padding_mask, none = torch.zeros(1, 1, HEIGHT, WIDTH), 1e-4 / (1 + 1e-4)

    def velocity(x, s):
        of_frames = (is_given * none + (1 - is_given) * s.view(1, 1, 1, 1, 1)).float()
        seen = (is_given * clean + (1 - is_given) * x).float()
        v = pipe.transformer(
            seen, of_frames, text, condition_mask=mask, padding_mask=padding_mask, return_dict=False
        )[0]  # fmt: skip
        return is_given * (x - clean) / s + (1 - is_given) * v

    want = sample_few_step(velocity, noises.all, few_step_times(4, mid_times=MID_TIMES["paper"]))
    assert is_given.flatten().tolist() == [1.0, 0.0] and torch.equal(want[:, :, 0].float(), clean[:, :, 0])
    assert float((got - want).abs().max()) <= 1e-4 < float((want[:, :, 1] - clean[:, :, 1]).abs().mean())


def test_cosmos_teacher_sampling_equals_our_euler_steps(cosmos, padding, monkeypatch):
    """diffusers' Euler steps of x0 + sigma noise are ours of (1 - s) x0 + s noise at s = sigma / (1 + sigma)."""
    pipe = Cosmos2TextToImagePipeline.from_pretrained(cosmos / "out", trust_remote_code=True, safety_checker=NoGuardrail())
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    base = FlowMatchEulerDiscreteScheduler.from_pretrained(cosmos / "base", subfolder="scheduler")
    assert all(pipe.scheduler.config[name] == value for name, value in base.config.items() if not name.startswith("_"))
    noise = noises_of(7, 1.0, 1, IMAGE).first
    got = run_cosmos(pipe, noise, 6, 3.0).double()
    sigmas = pipe.scheduler.sigmas.double()
    assert float(sigmas[0]) == 80.0 and len(sigmas) == 7
    s = (sigmas / (1 + sigmas)).tolist()
    monkeypatch.setattr(samplers, "shifted_sigmas", lambda steps, shift: s)
    *_, want = samplers.sample_ode(cosmos_velocity(pipe, 3.0), s[0] * noise, steps=6, shift=1.0)
    want = want / (1 - s[-1])
    assert float(want.std()) > 0.5
    assert float((got - want).abs().max()) <= 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(base="student"), "no model_index.json"),
        (dict(base="cosmos"), "it is a Cosmos2TextToImagePipeline; a wan network with condition=text needs a WanPipeline"),
        (dict(steps=5), r"--steps 5: must be from 1 to 4"),
        (dict(mid_times=(1.5, 1.6), steps=3), r"--mid-times \[1.5, 1.6\]: must fall"),
    ],
)
def test_what_makes_no_pipeline_is_refused(change, message, wan, cosmos, tmp_path):
    places = {"student": wan / "student", "cosmos": cosmos / "base"}
    options = {**change, "base": places.get(change.get("base"), wan / "base")}
    with pytest.raises(ValueError, match=message):
        convert(
            "diffusers", "diffusers", wan / "student", tmp_path / "out", write=WriteOptions(pipeline=PipelineOptions(**options))
        )
    assert not any(tmp_path.iterdir())


def test_bases_and_starts_that_do_not_fit_are_refused(wan, cosmos, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "model_index.json").write_text((wan / "base" / "model_index.json").read_text())
    with pytest.raises(ValueError, match=r"names the component .*, which has no folder"):
        write = WriteOptions(pipeline=PipelineOptions(base=base))
        convert("diffusers", "diffusers", wan / "student", tmp_path / "out", write=write)
    with pytest.raises(ValueError, match="only a diffusers destination"):
        convert("diffusers", "wan", wan / "student", tmp_path / "out.pth", write=write)
    index = json.loads((wan / "base" / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.875}
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="two transformers"):
        convert("diffusers", "diffusers", wan / "student", tmp_path / "out", write=write)
    write = WriteOptions(pipeline=PipelineOptions(base=cosmos / "base", sigma_max=120.0))
    with pytest.raises(ValueError, match=r"--sigma-max 120.0: Cosmos' pipelines start from 80"):
        convert("diffusers", "diffusers", cosmos / "student", tmp_path / "out", write=write)
