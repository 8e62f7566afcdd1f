"""The whole way of rCM on real handwritten digits: data, teacher, distillation, samples, numbers, pictures, export.

`make demo` runs it; every part is finished before the next begins, and a part that is there already is used again, so it may
be interrupted at any point. What it runs are the product's own commands; it prints them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

ROOT = Path(__file__).resolve().parent.parent
LATENT = (32, 2, 4, 4)
MID_TIMES = (1.3, 1.0, 0.6)
TEACHER = {"sampler": "euler", "which": "student", "guidance": 2.0, "shift": 3.0}
STUDENT = {"sampler": "few_step", "mid_times": MID_TIMES, "sigma_max": 80.0}
# label -> (network, fields of the request); every row samples the same prompts from the same seeds
ROWS = {
    "teacher, Euler 50": ("teacher", TEACHER | {"steps": 50}),
    "teacher, Euler 4": ("teacher", TEACHER | {"steps": 4}),
    "teacher, Euler 2": ("teacher", TEACHER | {"steps": 2}),
    "teacher, Euler 1": ("teacher", TEACHER | {"steps": 1}),
    "undistilled, student's sampler, 4": ("teacher", STUDENT | {"which": "student", "steps": 4}),
    "rCM student, 4": ("student", STUDENT | {"which": "ema", "steps": 4}),
    "rCM student, 2": ("student", STUDENT | {"which": "ema", "steps": 2}),
    "rCM student, 1": ("student", STUDENT | {"which": "ema", "steps": 1}),
}
BATCH_1 = ("teacher, Euler 50", "rCM student, 4", "rCM student, 2", "rCM student, 1")


def ranks() -> int:
    """Processes of the demo: two on CPU or on two GPUs, one on a single GPU."""
    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def environment() -> dict[str, str]:
    """One thread a process, and the repository's root kept off the path."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}


def torchrun(*args: str) -> list[str]:
    """A torchrun command of this interpreter."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks()}", *args]


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(command: list[str]) -> None:
    """Show a command and run it; stop the demo if it fails."""
    print("   " + " ".join(command).replace(sys.executable, "python"), flush=True)
    done = subprocess.run(command, env=environment(), cwd=ROOT)
    if done.returncode:
        raise SystemExit(
            f"demo: the command above failed with exit code {done.returncode}; run the demo again to go on from here"
        )


def prepare_data(out: Path, quick: bool) -> None:
    """Shards, text encoder and codec, from scikit-learn's scans."""
    say("data: handwritten digits to WebDataset shards")
    run([sys.executable, "tools/prepare_shards.py", "digits", str(out / "data")])


def train_classifier(out: Path, quick: bool) -> None:
    """The judge: a digit-and-motion classifier on real videos."""
    path = out / "classifier.safetensors"
    if path.exists():
        return
    from tqdm import tqdm

    from rcm_mcore.data.digits import train_heldout_videos
    from rcm_mcore.evaluation.digits import adherence, train_classifier

    say("judge: a classifier of digit and motion, trained on the real videos")
    train, heldout = train_heldout_videos(seed=0)
    torch.set_num_threads(1)  # these convolutions are too small for more
    steps = 60 if quick else 700
    with tqdm(total=steps, unit="step") as bar:
        classifier = train_classifier(*train, seed=0, steps=steps, log=lambda _, __: bar.update())
    share = adherence(classifier.predict(heldout.videos), heldout.digits, heldout.directions)
    print(f"   held-out videos with digit and motion both right: {share:.1%}")
    partial = path.with_suffix(".partial")
    classifier.save(partial)
    partial.rename(path)


def last_step(folder: Path) -> int:
    """Steps logged by a run so far."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:
        return 0


def train(out: Path, name: str, overrides: list[str], *, kill_at: int | None = None) -> None:
    """Train to the end, continuing what is there. With `kill_at` all processes are killed once after that step."""
    command = torchrun("-m", "rcm_mcore.train", f"examples/digits/{name}.yaml", *overrides)
    marker = out / f"killed_{name}"
    folder = out / ("teacher" if name == "teacher" else "student")
    if kill_at is not None and not marker.exists() and last_step(folder) < kill_at:
        print("   " + " ".join(command).replace(sys.executable, "python"), flush=True)
        process = subprocess.Popen(command, env=environment(), cwd=ROOT)
        while process.poll() is None and last_step(folder) < kill_at:
            time.sleep(0.2)
        if process.poll() is None:
            kill_all(process)
            marker.write_text(f"killed on purpose after step {last_step(folder)}\n")
            print(
                f"\n   killed every process on purpose at step {last_step(folder)}; starting the same command again", flush=True
            )
        elif process.returncode:
            raise SystemExit(f"demo: training failed with exit code {process.returncode}")
    run(command)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to torchrun and to its workers, which are sessions of their own and would live on."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=30)


def sample_all(out: Path, quick: bool) -> None:
    """Every row of the table: samples and timings."""
    if (out / "samples" / "complete").exists():
        return
    say("samples: teacher and student from the same seeds")
    run(torchrun("tools/demo.py", "--out", str(out), "--worker", *(["--quick"] if quick else [])))
    (out / "samples" / "complete").touch()


def sample_worker(out: Path, quick: bool) -> None:
    """On every rank: sample each row that is not there."""
    import torch.distributed as dist

    from rcm_mcore.parallel.mesh import init_distributed
    from rcm_mcore.sampling import SampleRequest, sample

    torch.set_num_threads(1)
    init_distributed()
    prompts = sample_prompts(quick)
    alone = prompts[:: max(1, len(prompts) // 8)]
    jobs = [(label, prompts, 40) for label in ROWS] + [(label, alone, 1) for label in BATCH_1]
    for label, texts, batch_size in jobs:
        path = sample_path(out, label, alone=batch_size == 1)
        if path.exists():
            continue
        network, fields = ROWS[label]
        request = SampleRequest(
            checkpoint=str(out / network),
            prompts=texts,
            text_encoder=str(out / "data" / "text_encoder"),
            latent_shape=LATENT,
            negative_embedding=str(out / "data" / "negative_embedding.safetensors"),
            batch_size=batch_size,
            **fields,
        )
        result = sample(request)
        if dist.get_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = {
                "label": label,
                "evaluations": str(result.evaluations),
                "seconds": str(result.seconds),
                "ranks": str(ranks()),
            }
            path.with_suffix(".partial").write_bytes(save({"latents": result.latents}, metadata=facts))
            path.with_suffix(".partial").rename(path)
        dist.barrier()
    dist.destroy_process_group()


def evaluate(out: Path, quick: bool) -> None:
    """The table (report.md, report.json) and the pictures (samples.png, samples.gif, curves.png)."""
    from rcm_mcore.data.digits import DigitCodec, parse_prompt, train_heldout_videos
    from rcm_mcore.evaluation.digits import DigitClassifier
    from rcm_mcore.evaluation.report import contact_sheet, metrics_table, training_curves, write_gif

    say("report: numbers and pictures")
    prompts = sample_prompts(quick)
    digits, directions = (torch.tensor(column) for column in zip(*map(parse_prompt, prompts)))
    classifier, codec = DigitClassifier.load(out / "classifier.safetensors"), DigitCodec.load(out / "data" / "codec.json")
    train, heldout = train_heldout_videos(seed=0)
    reference = classifier.features(heldout.videos)
    videos = {"real training videos": train.videos[real_videos_of(prompts, train)]}
    videos |= {label: codec.decode(load_file(sample_path(out, label))["latents"]) for label in ROWS}
    rows = []
    for label in videos:
        batched = timing(sample_path(out, label)) if label in ROWS else {}
        alone = timing(sample_path(out, label, alone=True)) if label in BATCH_1 else {}
        rows.append(
            {
                "sampler": label,
                "evaluations": batched.get("evaluations"),
                "s/video, batched": batched.get("seconds_per_video"),
                "s/video, batch 1": alone.get("seconds_per_video"),
                **quality(classifier, reference, videos[label], digits, directions),
            }
        )
    assert len({len(v) for v in videos.values()}) == 1, "every row holds the same number of videos"
    table = metrics_table(rows)
    checks = [] if quick else targets({row["sampler"]: row for row in rows})
    notes = f"{machine()}. {len(prompts)} videos a row; features of a classifier trained on the real videos; "
    notes += f"Frechet distance to {len(heldout.videos)} held-out videos.\n"
    (out / "report.md").write_text("\n".join([table, notes, *checks]) + "\n")
    (out / "report.json").write_text(json.dumps(rows, indent=1))
    columns = list(range(0, len(prompts), len(prompts) // 8))[:8]
    sheet = {label: row[columns] for label, row in videos.items()}
    contact_sheet(sheet, out / "samples.png", captions=[prompts[c].removeprefix("a handwritten ") for c in columns])
    write_gif(videos["rCM student, 4"][:: max(1, len(prompts) // 40)], out / "samples.gif")
    training_curves([out / "teacher" / "log.jsonl", out / "student" / "log.jsonl"], out / "curves.png")
    print(table + "\n" + "\n".join(checks))


def real_videos_of(prompts: tuple[str, ...], train) -> torch.Tensor:
    """Indices of training videos, one for each prompt and none twice."""
    from rcm_mcore.data.digits import parse_prompt

    order = torch.randperm(len(train.videos), generator=torch.Generator().manual_seed(0)).tolist()
    found: dict[tuple[int, int], list[int]] = {}
    for i in order:
        found.setdefault((int(train.digits[i]), int(train.directions[i])), []).append(i)
    return torch.tensor([found[parse_prompt(prompt)].pop() for prompt in prompts])


def quality(classifier, reference, videos, digits, directions) -> dict:
    """Frechet distance, adherence, diversity, precision and recall of videos that should show these digits and directions."""
    from rcm_mcore.evaluation.digits import adherence
    from rcm_mcore.evaluation.metrics import frechet_distance, precision_recall, within_group_diversity

    features = classifier.features(videos)
    found = precision_recall(reference, features)
    return {
        "Frechet": frechet_distance(reference, features),
        "adherence %": 100 * adherence(classifier.predict(videos), digits, directions),
        "diversity": within_group_diversity(features, list(zip(digits.tolist(), directions.tolist()))),
        "precision": found.precision,
        "recall": found.recall,
    }


def targets(rows: dict[str, dict]) -> list[str]:
    """What the demo should reach, and whether it did."""
    real, teacher, two = rows["real training videos"], rows["teacher, Euler 50"], rows["teacher, Euler 2"]
    four, second = rows["rCM student, 4"], rows["rCM student, 2"]
    speed = teacher["s/video, batched"] / four["s/video, batched"]
    checks = {
        f"teacher adherence {teacher['adherence %']:.1f} % (95 or more)": teacher["adherence %"] >= 95,
        f"teacher Frechet {teacher['Frechet'] / real['Frechet']:.2f}x the floor (4 or less)": teacher["Frechet"]
        <= 4 * real["Frechet"],
        f"4 steps: Frechet {four['Frechet'] / teacher['Frechet']:.2f}x the teacher's (1.5 or less)": four["Frechet"]
        <= 1.5 * teacher["Frechet"],
        f"4 steps: adherence {four['adherence %'] - teacher['adherence %']:+.1f} points (-5 or better)": four["adherence %"]
        >= teacher["adherence %"] - 5,
        f"2 steps: Frechet {second['Frechet'] / teacher['Frechet']:.2f}x the teacher's (2 or less)": second["Frechet"]
        <= 2 * teacher["Frechet"],
        f"2 steps: Frechet {second['Frechet'] / two['Frechet']:.2f}x the teacher's own at 2 (1/3 or less)": 3
        * second["Frechet"]
        <= two["Frechet"],
        f"4 steps: {speed:.1f}x faster than the teacher, batched (15 or more)": speed >= 15,
    }
    return [f"- {'reached' if good else 'MISSED'}: {text}" for text, good in checks.items()]


def sample_prompts(quick: bool) -> tuple[str, ...]:
    """The prompts of every row: each of the 40 several times."""
    from rcm_mcore.data.digits import all_prompts

    return tuple(p for p in all_prompts() for _ in range(2 if quick else 10))


def sample_path(out: Path, label: str, *, alone: bool = False) -> Path:
    """Where the samples of a row are."""
    name = label.replace(",", "").replace("'", "").replace(" ", "_")
    return out / "samples" / f"{name}{'_batch_1' if alone else ''}.safetensors"


def timing(path: Path) -> dict:
    """Evaluations and seconds of a file of samples."""
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        count = file.get_slice("latents").get_shape()[0]
    return {"evaluations": int(facts["evaluations"]), "seconds_per_video": float(facts["seconds"]) / count}


def export(out: Path, quick: bool) -> None:
    """The EMA student as a diffusers folder, loaded back and compared."""
    folder = out / "export"
    say("export: the EMA student as a diffusers folder")
    if not folder.exists():
        convert = [sys.executable, "tools/convert_checkpoint.py", "--from", "mcore", "--to", "diffusers", "--which", "ema"]
        run([*convert, str(out / "student"), str(folder)])
    difference = compare_export(out, folder)
    print(
        f"   WanTransformer3DModel.from_pretrained({folder}): largest difference from our network {difference:.1e} on scale 1"
    )
    if not difference < 1e-4:
        raise SystemExit("demo: the exported model does not give our network's output")


def compare_export(out: Path, folder: Path) -> float:
    """Largest difference between diffusers' output and ours, relative to the output's standard deviation."""
    from diffusers import WanTransformer3DModel

    from rcm_mcore.checkpoint import load_network, model_of
    from rcm_mcore.condition import Condition
    from rcm_mcore.config import parse_model
    from rcm_mcore.models import build_model
    from rcm_mcore.parallel.mesh import local_mesh

    torch.backends.cudnn.allow_tf32 = False  # diffusers' patch embedding is a convolution
    theirs = WanTransformer3DModel.from_pretrained(folder, local_files_only=True)
    generator = torch.Generator().manual_seed(0)
    with local_mesh() as mesh, torch.no_grad():
        model = parse_model(model_of(out / "student"))
        net = build_model(model, mesh.config, mesh.groups, seed=None, trainable=False)
        load_network(net, out / "student", which="ema")
        x = torch.randn(4, *LATENT, generator=generator).to(mesh.device)
        text = torch.randn(4, model.text_len, model.text_dim, generator=generator).to(mesh.device)
        s = torch.tensor([0.2, 0.5, 0.8, 0.95], device=mesh.device)
        ours = net(x, s, Condition(text))
        other = theirs.to(mesh.device)(x, 1000 * s, text, return_dict=False)[0]
        return float((ours - other).abs().max() / ours.std())


def machine() -> str:
    """What this ran on."""
    if torch.cuda.is_available():
        return f"{ranks()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = names[0] if names else platform.processor()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores of {cpu}, {ranks()} processes of one thread, {versions}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--quick", action="store_true", help="a rehearsal in seconds: few steps, few samples, no quality")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    out, quick = args.out.resolve(), args.quick
    if args.worker:
        sample_worker(out, quick)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    on_two = ranks() == 2
    paths = [f"data.shards=[{out}/data/train/shard_*.tar]"]
    negative = f"negative_embedding={out}/data/negative_embedding.safetensors"
    teacher = [*paths, f"pretrain.{negative}", f"checkpoint.dir={out}/teacher"]
    student = [*paths, f"distill.{negative}", f"checkpoint.dir={out}/student", f"distill.teacher={out}/teacher"]
    student += [] if on_two else ["mesh.tp=1", "mesh.sp=false"]
    kill_at = 205  # soon after a checkpoint, so that little is done twice
    if quick:
        teacher += ["train.steps=20", "checkpoint.every=10"]
        student += ["train.steps=12", "checkpoint.every=4"]
        kill_at = 6
    prepare_data(out, quick)
    train_classifier(out, quick)
    say(f"teacher: flow matching on {ranks()} data-parallel processes")
    train(out, "teacher", teacher)
    say("distillation: rCM under tensor and sequence parallelism, killed once on purpose and resumed")
    train(out, "rcm", student, kill_at=kill_at)
    sample_all(out, quick)
    evaluate(out, quick)
    export(out, quick)
    say(f"done in {time.time() - start:.0f} s: {out}/report.md, {out}/samples.png, {out}/samples.gif, {out}/curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
