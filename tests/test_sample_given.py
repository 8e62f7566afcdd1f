"""Networks that are given frames, from image and video files to latents, against diffusers' pipelines of the same parts."""

import hashlib
import json
import re
import shutil
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos2VideoToWorldPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
)
from diffusers.pipelines.cosmos import pipeline_cosmos2_video2world
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from encode_samples import write_components
from launch import run_ranks
from media_samples import picture, steady, write_image, write_video
from oracle import diffusers_network, exact_diffusers, names_of_ours, run_diffusers, small_cosmos, small_model
from PIL import Image
from ranks_given import RUNS, arguments
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, T5Config, T5EncoderModel, UMT5EncoderModel

from rcm_mcore import sample
from rcm_mcore.checkpoint import write_network
from rcm_mcore.condition import Condition
from rcm_mcore.diffusion.samplers import few_step_times, sample_few_step, shifted_sigmas
from rcm_mcore.parallel.random import noise
from rcm_mcore.sampling import GivenFiles, SampleRequest, draws_of

# diffusers takes all but the last 512 rows of a Wan context for image rows.
SMALL = dict(num_layers=2, in_channels=16, text_dim=32, text_len=512, dtype="float32")
MODELS = {
    "image": small_model(condition="image", image_dim=24, image_len=5, **SMALL),
    "first_last": small_model(condition="first_last", image_dim=24, image_len=5, **SMALL),
    "frames": small_cosmos(condition="frames", **SMALL | {"rope_ratios": (1.0, 3.0, 3.0)}),
    "t2i": small_cosmos(**SMALL),
}
SIZE = dict(height=32, width=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Networks with diffusers' random weights, components of pipelines, pictures 1 and 5, and a video of pictures 0 to 6."""
    path = tmp_path_factory.mktemp("given")
    write_components(path / "parts")
    (path / "t5").mkdir()
    shutil.copytree(path / "parts" / "tokenizer", path / "t5" / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5EncoderModel(T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(
            path / "t5" / "text_encoder"
        )
    for name, model in MODELS.items():
        weights = {key: value.float() for key, value in names_of_ours(model, transformer(name).state_dict()).items()}
        write_network(path / name, weights, json.loads(json.dumps(asdict(model))))
    write_image(path / "a.png", 1)
    write_image(path / "b.png", 5)
    write_video(path / "c.mp4", steady(7, 16))
    return path


@pytest.fixture(scope="module")
def runs(folder):
    """What came of each command line, on two ranks with a mesh of its own; its files are in folder/out."""
    return run_ranks(2, "ranks_given.py", folder)


def transformer(name):
    with exact_diffusers():
        return diffusers_network(MODELS[name])


def latents(folder, name):
    return load_file(folder / "out" / name / "latents.safetensors")["latents"]


def noises(steps, index=0, frames=2):
    return [noise(f"sample-{k}", (16, frames, 4, 6), seed=0, step=0, slots=[index]) for k in range(steps)]


def image(index):
    return Image.fromarray(picture(index))


def worst(a, b):
    assert a.shape == b.shape and b.std() > 0.3
    return float((a - b).abs().max())


def scheduler_at(sigmas, **options):
    """diffusers' Euler scheduler at these times, whatever the pipeline tells it."""
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    stock = scheduler.set_timesteps
    scheduler.set_timesteps = lambda n=None, device=None, **_: stock(sigmas=sigmas, device=device)
    return scheduler


def wan_pipeline(folder, name, scheduler):
    parts = folder / "parts"
    pipe = WanImageToVideoPipeline(
        tokenizer=AutoTokenizer.from_pretrained(parts / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(parts / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(parts / "vae"),
        image_encoder=CLIPVisionModel.from_pretrained(parts / "image_encoder"),
        image_processor=CLIPImageProcessor.from_pretrained(parts / "image_processor"),
        transformer=transformer(name),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    fixed = dict(**SIZE, num_frames=5, output_type="latent", max_sequence_length=512)

    def call(**arguments):
        with exact_diffusers():
            return pipe(**fixed, **arguments).frames.float()

    return call


def test_a_teacher_is_the_image_pipeline(runs, folder):
    """Two prompts, each with its own picture, in one batch; guided, with a negative prompt."""
    assert runs["i2v"]["code"] == 0, runs["i2v"]["error"]
    pipe = wan_pipeline(folder, "image", scheduler_at([1.0, 0.5], shift=5.0))
    for number, (prompt, index) in enumerate([("a red fox", 1), ("two boats", 5)]):
        (start,) = noises(1, number)
        theirs = pipe(
            prompt=prompt, negative_prompt="a hen", image=image(index), guidance_scale=3.0, num_inference_steps=2, latents=start
        )
        assert worst(latents(folder, "i2v")[number : number + 1], theirs) <= 1e-4


def test_first_and_last_frame_are_the_image_pipelines(runs, folder):
    assert runs["flf2v"]["code"] == 0, runs["flf2v"]["error"]
    pipe = wan_pipeline(folder, "first_last", scheduler_at([1.0, 0.5], shift=5.0))
    theirs = pipe(
        prompt="a red fox", negative_prompt="a hen", image=image(1), last_image=image(5), guidance_scale=3.0,
        num_inference_steps=2, latents=noises(1)[0],
    )  # fmt: skip
    assert worst(latents(folder, "flf2v"), theirs) <= 1e-4


def test_a_student_is_the_image_pipeline(runs, folder, monkeypatch):
    assert runs["i2v_few"]["code"] == 0, runs["i2v_few"]["error"]
    start, fresh = noises(2)
    sigmas = [t / (1 + t) for t in (80.0, float(np.tan(1.5)))]
    pipe = wan_pipeline(folder, "image", scheduler_at(sigmas, shift=1.0, stochastic_sampling=True))
    monkeypatch.setattr(scheduling_flow_match_euler_discrete, "randn_tensor", lambda shape, dtype, **_: fresh.to(dtype))
    theirs = pipe(prompt="a red fox", image=image(5), guidance_scale=1.0, num_inference_steps=2, latents=sigmas[0] * start)
    assert worst(latents(folder, "i2v_few"), theirs) <= 1e-4


class NoGuardrail(torch.nn.Module):
    """Stands in for the safety checker, which Cosmos' pipelines demand."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt):
        return True


@pytest.fixture
def world(folder, monkeypatch):
    """diffusers' video-to-world pipeline for one step from 80 to 0."""
    stock = pipeline_cosmos2_video2world.retrieve_latents
    mode = lambda encoded, generator=None: stock(encoded, sample_mode="argmax")  # where it would draw from the posterior
    monkeypatch.setattr(pipeline_cosmos2_video2world, "retrieve_latents", mode)
    scheduler = FlowMatchEulerDiscreteScheduler()

    def set_timesteps(n=None, device=None, sigmas=None):
        scheduler.sigmas, scheduler.timesteps = torch.tensor([80.0, 0.0]), torch.tensor([80.0])
        scheduler.num_inference_steps = 1

    scheduler.set_timesteps = set_timesteps
    pipe = Cosmos2VideoToWorldPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "t5" / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "t5" / "text_encoder").double(),  # its text is not cast
        vae=AutoencoderKLWan.from_pretrained(folder / "parts" / "vae"),
        transformer=transformer("frames"),
        scheduler=scheduler,
        safety_checker=NoGuardrail(),
    )
    assert pipe.scheduler.config.sigma_max == 80.0 and pipe.scheduler.config.sigma_data == 1.0
    scheduler.register_to_config(final_sigmas_type="zero")  # the pipeline would replace the last sigma by the one before
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name, shown", [("v2w_few", range(2, 7)), ("v2w_image", [1])])
def test_a_student_is_the_video_pipeline(runs, folder, world, name, shown):
    """The last five frames of a longer video, or a picture, given as they are encoded."""
    assert runs[name]["code"] == 0, runs[name]["error"]
    given = dict(video=[image(index) for index in shown]) if len(shown) > 1 else dict(image=image(shown[0]))
    count, frames = (len(shown) + 3) // 4, len(shown) + 4
    with exact_diffusers():
        theirs = world(
            **given, **SIZE, prompt="a red fox", num_frames=frames, num_inference_steps=1, guidance_scale=1.0, fps=None,
            latents=noises(1, frames=count + 1)[0], output_type="latent", return_dict=False,
        )[0]  # fmt: skip
    ours = latents(folder, name)
    assert worst(ours, theirs.float()) <= 1e-4
    pixels = torch.stack([torch.from_numpy(picture(index)) for index in shown]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        encoded = world.vae.encode(pixels).latent_dist.mode()
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (world.vae.config.latents_mean, world.vae.config.latents_std))
    torch.testing.assert_close(ours[:, :, :count], (encoded - mean) / std, rtol=1e-5, atol=2e-5)
    assert (ours[:, :, count] - ours[:, :, count - 1]).std() > 0.1


def t5_text(folder, *prompts):
    tokenizer = AutoTokenizer.from_pretrained(folder / "t5" / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(folder / "t5" / "text_encoder")
    text = torch.zeros(len(prompts), 512, 32)
    for row, prompt in zip(text, prompts):
        with torch.no_grad():
            hidden = encoder(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        row[: len(hidden)] = hidden
    return text.double()


def test_a_video_teacher_sees_the_same_frames_in_both_branches(runs, folder, world):
    """Euler steps in rectified-flow time, which are those in the pipeline's sigma, of what the pipeline's network denoises."""
    assert runs["v2w"]["code"] == 0, runs["v2w"]["error"]
    encoded = world.prepare_latents(
        world.video_processor.preprocess_video([image(index) for index in range(2, 7)], **SIZE), 1, 16, 32, 48, 9, False,
        torch.float32, "cpu", None, noises(1, frames=3)[0],
    )[1].double()  # fmt: skip
    text = t5_text(folder, "a red fox", "a hen")
    (x,) = (x.double() for x in noises(1, frames=3))
    sigmas = shifted_sigmas(2, 5.0)
    with exact_diffusers(), torch.no_grad():
        for s, after in zip(sigmas, sigmas[1:]):
            told = [Condition(row[None], latents=encoded, frames=torch.tensor([2])) for row in text]
            conditional, negative = (run_diffusers(world.transformer, x, x.new_full((1,), s), c) for c in told)
            x = x + (after - s) * (conditional + 2.0 * (conditional - negative))  # the pipeline's scale: one less
    assert worst(latents(folder, "v2w"), x.float()) <= 1e-4


def test_cosmos_text_to_image(runs, folder):
    assert runs["t2i"]["code"] == 0, runs["t2i"]["error"]
    net, condition = transformer("t2i"), Condition(t5_text(folder, "a red fox"))
    with exact_diffusers(), torch.no_grad():
        theirs = sample_few_step(
            lambda x, s: run_diffusers(net, x, s, condition), noises(4, frames=1), few_step_times(4, mid_times=(1.3, 1.0, 0.6))
        )
    assert worst(latents(folder, "t2i"), theirs.float()) <= 1e-4
    shown = np.asarray(Image.open(folder / "out" / "t2i" / "000_a-red-fox.png"))
    assert shown.shape == (32, 48, 3) and shown.std() > 5


def test_the_record_names_the_files(runs, folder):
    there = json.loads((folder / "out" / "i2v" / "samples.json").read_text())
    files = [str(folder / name) for name in ("a.png", "b.png")]
    assert [record["given"] for record in there["samples"]] == [[name] for name in files]
    assert there["given"] == {
        str(folder / n): hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in ("a.png", "b.png")
    }
    assert "given" not in json.loads((folder / "out" / "t2i" / "samples.json").read_text())["samples"][0]


def test_a_picture_that_has_changed_is_refused(runs):
    assert runs["first"]["code"] == runs["again"]["code"] == 0 and runs["again"]["calls"] == []
    assert runs["changed"]["code"] == 2 and runs["changed"]["calls"] == []
    assert re.search(r"holds samples of another request: given\..*changing\.png is", runs["changed"]["error"])


def test_a_prompt_that_the_encoder_would_cut_is_refused(runs):
    assert runs["long"]["code"] == 2 and runs["long"]["calls"] == []
    message = r"prompt 'fox fox .* has \d+ tokens: at most 512 reach the network \(model.text_len=512\)"
    assert re.search(message, runs["long"]["error"])


def test_files_of_prompts():
    request = partial(SampleRequest, checkpoint="c", text_encoder="t", latent_shape=(4, 2, 4, 4), prompts=("a", "b"))
    each, one = GivenFiles(images=("x", "y"), last_images=("z",)), GivenFiles(videos=("v",))
    of = lambda given, **fields: [draw.given for draw in draws_of(request(given=given, **fields))]
    assert of(each, num_per_prompt=2) == [("x", "z"), ("x", "z"), ("y", "z"), ("y", "z")]
    assert of(each, seeds=(3, 1)) == [("x", "z"), ("x", "z"), ("y", "z"), ("y", "z")]
    assert of(one) == [("v",), ("v",)] and of(None) == [(), ()]


@pytest.fixture
def refused(folder, tmp_path, monkeypatch, capsys):
    """What a command line is refused with."""
    monkeypatch.setattr(sample, "_leave_process_group", lambda: None)  # that of other tests
    monkeypatch.setattr("rcm_mcore.sampling.sampler.make_mesh", lambda *_: pytest.fail("too late"))
    (folder / "bad.png").write_bytes(b"garbage")
    (folder / "bad.mp4").write_bytes(b"garbage" * 100)

    def run(network, *more):
        assert sample.main(arguments(folder, tmp_path / "out", network, *more)) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    return run


I2V, V2W = RUNS["i2v_few"], RUNS["v2w_few"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["image", "--prompt", "a"], "model.condition=image and takes --image; given: nothing"),
        (
            ["t2i", "--prompt", "a", "--image", "a.png"],
            "condition=text and takes none of --image, --last-image, --video; given: --i",
        ),
        (["first_last", "--prompt", "a", "--image", "a.png"], "takes --image and --last-image; given: --image"),
        ([*I2V, "--last-image", "a.png"], "model.condition=image and takes --image; given: --image and --last-image"),
        ([*V2W, "--image", "a.png"], "model.condition=frames and takes --image or --video; given: --image and --video"),
        (
            [*I2V, *["--prompt", "b"] * 2, "--image", "a.png"],
            "--image: 2 files for 3 prompts; give one for all, or one for each",
        ),
        (["image", "--prompt", "a", "--image", "none.png"], "--image .*none.png: there is no such file"),
        (["image", "--prompt", "a", "--image", "bad.png"], "--image .*bad.png: cannot be decoded: "),
        (["image", "--prompt", "a", "--image", "c.mp4"], r"--image .*c.mp4: must end in one of \.bmp"),
        ([*I2V, "--frames", "1"], "--frames 1: with model.condition=image and 1 given .* at least 5"),
        ([*V2W, "--frames", "5"], "--frames 5: with model.condition=frames and 5 given .* at least 9"),
        ([*V2W, "--video-frames", "6"], r"--video-frames 6: must be 4n \+ 1, such as 5 or 9"),
        ([*V2W, "--video-frames", "9", "--frames", "13"], "--video .*c.mp4: it has 7 frames, the last 9 are wanted"),
        (["frames", "--prompt", "a", "--video", "bad.mp4", "--frames", "9"], "--video .*bad.mp4: cannot be decoded: "),
        (["frames", "--prompt", "a", "--video", "a.png", "--frames", "9"], r"--video .*a.png: must end in one of \.avi"),
        (
            [*I2V, "--image-encoder", "t5"],
            "image encoder folder .*t5: no preprocessor_config.json in it or in image_processor/",
        ),
        (["t2i", "--prompt", "a", "--image-encoder", "t5"], "--image-encoder .*t5: it is for --image, which is not there"),
        ([*I2V, "--vae", "t5"], "VAE folder .*t5: no config.json in it"),
    ],
)
def test_bad_command_lines(refused, words, message):
    """Refused before there is a mesh, or anything on disk."""
    assert re.search(message, refused(*words))


def test_an_image_encoder_of_another_size_is_refused(refused, folder):
    other = folder / "other_clip"
    shutil.copytree(folder / "parts" / "image_processor", other / "image_processor", dirs_exist_ok=True)
    shutil.copytree(folder / "parts" / "image_encoder", other / "image_encoder", dirs_exist_ok=True)
    config = other / "image_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"patch_size": 4}))
    message = "--image-encoder .*: it gives 17 rows of 24 for an image, the network takes 5 of 24"
    assert re.search(message, refused(*I2V, "--image-encoder", "other_clip"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "t5"}))
    assert "cannot be loaded: it holds t5, not clip_vision_model" in refused(*I2V, "--image-encoder", "other_clip")
