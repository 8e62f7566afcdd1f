"""Errors of a bfloat16 network's F, of its tangent and of g against float32, and what each choice of precision buys.

    python tools/benchmark_tangent.py --model 1.3B --out DIR
    python tools/benchmark_tangent.py --model 14B num_layers=8 --out DIR
    python tools/benchmark_tangent.py --checkpoint RUN/student --out DIR

One GPU, or a CPU for small networks. The student of a consistency step: states of smooth random latents at fixed times, F and
its tangent along (cos t sin t F_T, cos t sin t), with F_T the network itself under guidance, in float32, the same for all rows.
The reference is the network with the same weights (numbers that bfloat16 holds) in float32 without TF32, itself held against
float64 on a few layers. A relative error is |x - reference| / |reference| over a sample, in the 2-norm.

Rows named `shipped` are networks as they train, by `model` fields. `emulated` ones round as models/wan/rounded.py says, and
stand for choices that no configuration offers; the first of them should give what the first shipped one gives. Finite
differences take two evaluations, h of TrigFlow time to either side, of the bfloat16 network with the float32 residual and of
the float32 one: at the best of several h for each time, and in a table of their own at every h for all times.

Random weights are scaled (`Scaling`), because plain initial values give zero outputs, a flat residual stream and a tangent that
the fastest sinusoids of time drown. `mild` and `harsh` are two guesses of what training leaves behind. What they lead to is
printed, so that it can be held against a trained network (--checkpoint). The teacher that tools/demo.py trains has |de/ds| of 4
to 9 times |e| in its time embedding: its weights on fast sinusoids are still what initialization gave them.

F_dot is a sum, of the change of F by x and the change by t. Errors grow with the parts, and the straighter the trajectories of
the teacher, the more the parts cancel: `cancellation` = (|F_x dx| + |F_t dt|) / |F_dot| says how much of an error is due to it.

Seconds: a dual pass, median of several, the networks taking turns. Writes tangent_NAME.json, .md and, with matplotlib, .png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import yaml
from tqdm import tqdm

from rcm_mcore.checkpoint.network import load_network, model_of
from rcm_mcore.config import MeshConfig, ModelConfig, parse_model, resolve_mesh, tokens_per_sample
from rcm_mcore.diffusion.trigflow import trig_velocity
from rcm_mcore.distill.roles import conditioned
from rcm_mcore.distill.tangent_error import Problem, compare, describe, differences, emulated, error, make_problem, run
from rcm_mcore.models import DiffusionTransformer, build_model
from rcm_mcore.models.wan.rounded import ALL_WIDE, FP16, WIDE, Formats, Roundings
from rcm_mcore.parallel.mesh import Mesh, make_mesh

TOLERANCE = 1e-3  # of the emulation without rounding against the reference
CHECKED_LAYERS = 4  # in float64
DIFFERENCES = "finite differences"

SHIPPED: dict[str, dict[str, Any]] = {
    "shipped, bf16 residual": {"fp32_residual": False},
    "shipped, fp32 residual": {"fp32_residual": True},
    "shipped, bf16 residual and time": {"fp32_residual": False, "bf16_time": True},
}
_PRIMAL, _TANGENT = Formats("wide", "bf16"), Formats("bf16", "wide")
_SPLIT, _SPLIT_PRIMAL = Formats("bf16", "split"), Formats("split", "bf16")
EMULATED: dict[str, Roundings] = {
    "emulated": Roundings(),
    "modulation bf16": Roundings(modulation="bf16"),
    "residual fp32": Roundings(residual=WIDE),
    "residual fp32, primal only": Roundings(residual=_PRIMAL),
    "residual fp32, tangent only": Roundings(residual=_TANGENT),
    "linears: tangents added up and kept in fp32": Roundings(products=_TANGENT),
    "linears: the same, tangents in split": Roundings(operands=_SPLIT, products=_TANGENT),
    "linears: primals in split, kept in fp32": Roundings(operands=_SPLIT_PRIMAL, products=_PRIMAL),
    "attention: tangent out in fp32": Roundings(attention_out=_TANGENT),
    "attention: tangents in and out in fp32": Roundings(attention=_TANGENT, attention_out=_TANGENT),
    "attention: primals in and out in fp32": Roundings(attention=_PRIMAL, attention_out=_PRIMAL),
    "attention: fp16": Roundings(attention=FP16),
    "every tangent fp32": Roundings(*[_TANGENT] * 5),
    "every primal fp32": Roundings(*[_PRIMAL] * 5),
    "residual fp32, tangents of linears split": Roundings(WIDE, _SPLIT, _TANGENT),
    "residual fp32, primals of linears split": Roundings(WIDE, _SPLIT_PRIMAL, _PRIMAL),
    "residual fp32, attention fp16": Roundings(residual=WIDE, attention=FP16),
    "residual fp32, attention fp32": Roundings(residual=WIDE, attention=WIDE, attention_out=WIDE),
    "residual fp32, attention and linears fp16": Roundings(WIDE, FP16, FP16, FP16, FP16),
}
# Of the emulated rows, those in the chart.
DRAWN = ("modulation bf16", "every tangent fp32", "every primal fp32", "residual fp32, attention fp16")


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Random weights with the traits of trained ones.

    Linears have rows of unit gain for inputs of unit RMS, so that every branch gives about 1 before its gate. On top of that:
    """

    logits: float  # q and k norm weights are its square root: RMS of the self-attention's logits if q and k were independent
    gate: float  # RMS of the gates: blocks add little to the stream
    growth: float  # of the last block's branches over the first's: the stream grows with depth
    outlier: float  # factor on the branches, and in the first hidden states, of one channel in 256: massive activations
    fast_time: float  # weight on sinusoids of s far above 10 radians per unit, over that on slow ones


SETTINGS = {
    "mild": Scaling(logits=1.0, gate=0.3, growth=5.0, outlier=1.0, fast_time=0.005),
    "harsh": Scaling(logits=3.0, gate=0.3, growth=20.0, outlier=30.0, fast_time=0.02),
}


@torch.no_grad()
def random_weights(net: DiffusionTransformer, scaling: Scaling) -> None:
    """By name, the same for every dtype: numbers that bfloat16 holds."""
    model = net.model
    outliers = torch.arange(0, model.hidden_size, 256)
    for name, param in net.named_parameters():
        generator = torch.Generator(param.device).manual_seed(crc32(name.encode()))
        full = torch.randn(param.shape, generator=generator, device=param.device)
        parts = name.split(".")
        if name.endswith("modulation"):
            full *= 0.2
            if parts[0] == "blocks":
                full[:, [2, 5]] *= scaling.gate / 0.2
        elif "norm" in parts[-2]:
            sharp = "self_attn" in parts and parts[-2] in ("norm_q", "norm_k")
            full = 0.02 * full + (math.sqrt(scaling.logits) if sharp else float(parts[-1] == "weight"))
        elif parts[-1] == "bias":
            full *= 0.02
            if name == "patch_embedding.bias":
                full[outliers] = scaling.outlier if scaling.outlier > 1 else 0.0
        else:
            full *= full.shape[1] ** -0.5
            if name == "time_embedding.0.weight":
                half = full.shape[1] // 2
                speed = 1000.0 * 10000.0 ** (-torch.arange(half, device=full.device) / half)
                passed = scaling.fast_time + (1 - scaling.fast_time) / (1 + (speed / 10) ** 2)
                full *= (passed * (2 * half / passed.square().sum()).sqrt()).repeat(2)
            elif name in ("time_embedding.2.weight", "text_embedding.2.weight") or parts[-2] == "linear_fc2":
                full *= 1.6  # after an activation, which leaves about 0.6
            elif name == "time_projection.1.weight":
                full *= 1.6 * 0.1  # of unit RMS the time part of shift, scale and gate would drown the block's own
            if parts[-2] in ("linear_proj", "linear_fc2"):
                full *= scaling.growth ** (int(parts[1]) / max(1, model.num_layers - 1))
                full[outliers] *= scaling.outlier
        param.copy_(full.to(torch.bfloat16))


class Networks:
    """The reference and the shipped ones, all with the same weights."""

    def __init__(self, model: ModelConfig, mesh: Mesh, weights: Callable[[DiffusionTransformer], None]) -> None:
        def build(dtype: str, **fields: Any) -> DiffusionTransformer:
            return build_model(replace(model, dtype=dtype, **fields), mesh.config, mesh.groups, seed=None, trainable=False)

        self.reference = build("float32")
        weights(self.reference)
        self.shipped: dict[str, DiffusionTransformer] = {}
        for name, fields in SHIPPED.items():
            net = self.shipped[name] = build("bfloat16", **fields)
            first = next(iter(self.shipped.values()))
            if net is first:
                weights(net)
            for param, same in zip(net.parameters(), first.parameters()):  # one set of weights in memory
                param.data = same.data
        # The first layers alone, in both dtypes.
        layers = min(CHECKED_LAYERS, model.num_layers)
        short = [build(dtype, num_layers=layers) for dtype in ("float64", "float32")]
        self.double, self.single = short
        full = dict(self.reference.named_parameters())
        for net in short:
            for name, param in net.named_parameters():
                param.data.copy_(full[name].data)


def measure(
    nets: Networks, t: float, latent: tuple[int, ...], *, rows: dict[str, Roundings], progress: tqdm[Any]
) -> dict[str, Any]:
    """Every shipped row and the emulated `rows` at one time."""

    def step(name: str) -> None:
        progress.set_postfix_str(name)
        progress.update()

    problem = make_problem(nets.reference, t, latent)
    step("reference")
    reference = run(nets.reference, problem)
    with emulated(nets.reference, ALL_WIDE) as blocks:
        wrong = compare(run(nets.reference, problem), reference, problem)["F_dot"]
    if not wrong <= TOLERANCE:
        raise RuntimeError(f"models/wan/rounded.py without rounding is not the network: relative error of F_dot {wrong:.1e}")
    record = {
        "t": t,
        "float32_against_float64": error(run(nets.single, problem).out.tangent, run(nets.double, problem).out.tangent),
        "weights": describe(nets.reference, problem, reference, [block.logit_rms for block in blocks]),
        "rows": {},
    }
    for name, net in nets.shipped.items():
        step(name)
        record["rows"][name] = compare(run(net, problem), reference, problem)
    for name, roundings in rows.items():
        step(name)
        with emulated(nets.reference, roundings):
            record["rows"][name] = compare(run(nets.reference, problem), reference, problem)
    step("finite differences")
    for name, net in ((DIFFERENCES, nets.shipped["shipped, fp32 residual"]), (f"{DIFFERENCES}, float32", nets.reference)):
        record["rows"][name] = differences(net, problem, reference)
    return record


def seconds(nets: Networks, problem: Problem, repeats: int) -> dict[str, float]:
    """Of a dual pass of every shipped network: medians, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in nets.shipped}
    for i in range(repeats + 1):
        for name, net in nets.shipped.items():
            _synchronize()
            start = time.perf_counter()
            with torch.no_grad():
                trig_velocity(conditioned(net, problem.condition), *problem.duals)
            _synchronize()
            if i:  # the first compiles
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(records: list[dict[str, Any]], times: dict[str, float]) -> str:
    """Markdown of one setting: errors of each row, means over the times t; the tangent's at each t."""
    heads = ["", "F", *(f"F_dot, t={r['t']:g}" for r in records), "F_dot", "g", "1 - cosine of g", "last layer's tangent", "s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name in records[0]["rows"]:
        rows = [r["rows"][name] for r in records]
        mean = lambda key, rows=rows: f"{100 * statistics.mean(row[key] for row in rows):.2f} %"
        last = [row["layers_dot"][-1] for row in rows if row["layers_dot"]]
        cells = [name, mean("F"), *(f"{100 * row['F_dot']:.2f} %" for row in rows), mean("F_dot"), mean("g")]
        cells += [f"{1 - statistics.mean(row['cosine_g'] for row in rows):.1e}"]
        cells += [f"{100 * statistics.mean(last):.2f} %" if last else "", f"{times[name]:.3f}" if name in times else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_step(records: list[dict[str, Any]]) -> str:
    """Markdown of the finite differences' errors of the tangent at every step, means over the times."""
    names = [name for name in records[0]["rows"] if name.startswith(DIFFERENCES)]
    lines = ["| step in TrigFlow time | " + " | ".join(names) + " |", "|---:" * (len(names) + 1) + "|"]
    for h in records[0]["rows"][DIFFERENCES]["by_step"]:
        errors = [statistics.mean(r["rows"][name]["by_step"][h] for r in records) for name in names]
        lines.append(f"| {h} | " + " | ".join(f"{100 * error:.2g} %" for error in errors) + " |")
    return "\n".join(lines)


def account(records: list[dict[str, Any]]) -> str:
    """Markdown of what the weights lead to, at each t."""
    heads = ["t", "stream, first / middle / last block", "its tangent", "largest channel / median", "logits", "gates", "F"]
    heads += ["F_T", "de/ds / e", "F_dot / F", "F_x dx / F_dot", "F_t dt / F_dot", "cancellation", "float32 against float64"]
    lines = ["| " + " | ".join(heads) + " |", "|---:" * len(heads) + "|"]
    ends = lambda xs: " / ".join(f"{xs[i]:.3g}" for i in (0, len(xs) // 2, -1))
    for r in records:
        w = r["weights"]
        cells = [f"{r['t']:g}", *(ends(w[k]) for k in ("stream", "stream_dot", "outlier", "logits", "gates"))]
        cells += [f"{w[k]:.3g}" for k in ("F", "teacher", "time_speed", "F_dot_over_F", "x_part", "t_part", "cancellation")]
        lines.append("| " + " | ".join([*cells, f"{r['float32_against_float64']:.1e}"]) + " |")
    return "\n".join(lines)


def chart(settings: dict[str, Any], path: Path) -> None:
    """Errors of hidden states and their tangents over the layers, where matplotlib is: means over the times."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(11.0, 4.2 * len(settings)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(settings), 2, squeeze=False)
    for axes_row, (setting, found) in zip(all_axes, settings.items()):
        for axes, key, what in zip(axes_row, ("layers", "layers_dot"), ("hidden states", "their tangents")):
            for name in (*SHIPPED, *DRAWN):
                layers = [r["rows"][name][key] for r in found["records"] if name in r["rows"]]
                if layers:
                    style = "-" if name in SHIPPED else "--"
                    axes.plot([statistics.mean(values) for values in zip(*layers)], style, label=name, linewidth=1.2)
            axes.set(title=f"{setting}: {what}", xlabel="block", ylabel="relative error", yscale="log")
            axes.set_ylim(bottom=max(1e-4, axes.get_ylim()[0]))
            axes.grid(alpha=0.3)
        axes_row[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def sources(args: argparse.Namespace, model: ModelConfig) -> dict[str, Callable[[DiffusionTransformer], None]]:
    """Weights by name of the setting."""
    if args.checkpoint is None:
        return {name: lambda net, scaling=SETTINGS[name]: random_weights(net, scaling) for name in args.settings}

    def load(net: DiffusionTransformer) -> None:
        load_network(net, args.checkpoint, which="student")
        for param in net.parameters():
            param.data.copy_(param.data.to(torch.bfloat16))

    return {"checkpoint": load}


def chosen_model(args: argparse.Namespace) -> ModelConfig:
    """ValueError for a network that is none, that is not Wan's of text alone, or that does not take the latents."""
    fields = {} if args.checkpoint is None else model_of(args.checkpoint)
    if args.model:
        fields["size"] = args.model
    for item in args.fields:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{item}: must be a field of `model` and its value, such as num_layers=8")
        fields[name] = yaml.safe_load(value)
    model = parse_model(fields)
    if model.family != "wan" or model.condition != "text":
        raise ValueError(f"model.family={model.family}, model.condition={model.condition}: must be wan and text")
    tokens_per_sample(model, tuple(args.latent))
    if any(not 0 < t < math.pi / 2 for t in args.times):
        raise ValueError(f"--times {args.times}: must be between 0 and pi/2, both excluded")
    return model


def main(argv: list[str] | None = None) -> int:
    """Measure and print; exit code 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fields", nargs="*", help="of the model section of a configuration, such as num_layers=8")
    parser.add_argument("--model", help="a size of Wan, such as 1.3B")
    parser.add_argument("--checkpoint", type=Path, help="weights of ours instead of random ones (tools/convert_checkpoint.py)")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="of random weights")
    parser.add_argument("--latent", type=int, nargs=4, default=[16, 21, 30, 52], metavar=("C", "F", "H", "W"))
    parser.add_argument("--times", type=float, nargs="+", default=[0.3, 0.8, 1.2, 1.5], help="TrigFlow, in (0, pi/2)")
    parser.add_argument("--shipped-only", action="store_true", help="no emulated rows: those take most of the time")
    parser.add_argument("--repeats", type=int, default=5, help="of the timing")
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_intermixed_args(argv)
    try:
        model = chosen_model(args)
    except ValueError as problem:
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")  # no TF32
    mesh = make_mesh(resolve_mesh(model, MeshConfig(), ranks_per_node=1)[0])
    weights = sources(args, model)
    rows = {} if args.shipped_only else EMULATED
    found: dict[str, Any] = {}
    with tqdm(total=len(weights) * len(args.times) * (len(SHIPPED) + len(rows) + 2), disable=None) as progress:
        for name, fill in weights.items():
            nets = Networks(model, mesh, fill)
            records = [measure(nets, t, tuple(args.latent), rows=rows, progress=progress) for t in args.times]
            times = seconds(nets, make_problem(nets.reference, args.times[0], tuple(args.latent)), args.repeats)
            found[name] = {"records": records, "seconds": times}
            if name in SETTINGS:
                found[name]["scaling"] = asdict(SETTINGS[name])
            del nets
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    text = (
        f"{device}, torch {torch.__version__}, {model.num_layers} layers of width {model.hidden_size}, "
        f"{tokens_per_sample(model, tuple(args.latent))} tokens\n"
    )
    for name, setting in found.items():
        text += f"\n## {name}\n\n{account(setting['records'])}\n\n{table(setting['records'], setting['seconds'])}\n"
        text += f"\n{by_step(setting['records'])}\n"
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stem = f"tangent_{model.size.replace('.', '_')}"
        (args.out / f"{stem}.json").write_text(json.dumps({"model": asdict(model), "settings": found}, indent=1))
        (args.out / f"{stem}.md").write_text(text)
        chart(found, args.out / f"{stem}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
