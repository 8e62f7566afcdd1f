"""FLOPs against torch's counter on diffusers' networks and ours, and against what the steps call; rates and times."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rcm_mcore.condition import Condition
from rcm_mcore.config import load_config, parse_config, tokens_per_sample
from rcm_mcore.distill.draws import Draws
from rcm_mcore.distill.phases import Phase, phase_of
from rcm_mcore.distill.steps import MicroBatch, Roles
from rcm_mcore.dual import Dual, primal
from rcm_mcore.models import build_model
from rcm_mcore.training import stopwatch
from rcm_mcore.training.step import terms_of
from rcm_mcore.training.stopwatch import Stopwatch
from rcm_mcore.training.throughput import Throughput, flops_of_step, model_flops

GRID = (3, 8, 8)


def counted(run):
    """FLOPs of the matmuls of a call."""
    in_place = {torch.ops.aten.baddbmm_: lambda plus, a, b, **_: 2 * a[0] * a[1] * a[2] * b[2]}  # torch does not know it
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in oracle.VARIANTS if name != "cosmos-frames"])
def test_flops_are_those_that_torch_counts_in_diffusers_network(name):
    """But for Cosmos with given frames, where diffusers embeds a time for each frame, and we the two that there are."""
    model = oracle.VARIANTS[name]()
    x, _, s, _, condition = oracle.inputs(model, batch=1, grid=GRID)
    with oracle.exact_diffusers(), torch.no_grad():
        net = oracle.diffusers_network(model)
        count = counted(lambda: oracle.run_diffusers(net, x, s, condition))
    assert model_flops(model, tokens_per_sample(model, tuple(x.shape[1:]))) == pytest.approx(count, rel=1e-9)


@pytest.mark.parametrize("name", oracle.VARIANTS)
def test_flops_of_passes_are_those_that_torch_counts_in_ours(mesh, name):
    """To what is counted besides: torch.func.jvp computes the linears of embedders and head three times for two, the backward
    of the attention computes scores again, and no gradient goes to text and noise; the second time of given frames.
    """
    model = oracle.VARIANTS[name](recompute="none")
    net = build_model(model, mesh.config, mesh.groups)
    x, x_dot, s, s_dot, condition = oracle.inputs(model, batch=1, grid=GRID)
    tokens = tokens_per_sample(model, tuple(x.shape[1:]))
    with torch.no_grad():
        once = counted(lambda: net(x, s, condition))
        dual = counted(lambda: net(Dual(x, x_dot), Dual(s, s_dot), condition))
    with_backward = counted(lambda: net(x, s, condition).sum().backward())
    assert once == pytest.approx(model_flops(model, tokens), rel=0.01)
    assert dual == pytest.approx(model_flops(model, tokens, tangent=True), rel=0.03)
    assert with_backward == pytest.approx(3 * model_flops(model, tokens), rel=0.03)


class Counting:
    """A network of one weight that counts the samples of its passes, in forwards."""

    def __init__(self, dual):
        self.weight, self.dual, self.forwards = torch.ones((), requires_grad=True), dual, 0.0

    def __call__(self, x, s, condition):
        cost = self.dual if isinstance(x, Dual) else 1.0
        # What has a graph has a backward.
        self.forwards += len(primal(x)) * (cost + 2 * torch.is_grad_enabled())
        return Dual(self.weight * x.primal, x.tangent) if isinstance(x, Dual) else self.weight * x


def passes_of(config, phase, *, dual):
    """Forwards that the terms of a phase ask for, counted while they run."""
    batch, shape = config.train.global_batch_size, config.data.latent_shape
    nets = {name: Counting(dual) for name in ("student", "teacher", "fake_score")}
    negative = torch.zeros(1, config.model.text_len, config.model.text_dim)
    roles = Roles(**nets, negative=negative, sample_group=SimpleNamespace(size=lambda: 1))
    times = torch.linspace(0.2, 1.4, batch, dtype=torch.float64)
    noise = torch.randn(max(1, phase.rollout_steps), batch, *shape, dtype=torch.float64)
    draws = Draws(
        t_g=times, eps_g=noise[0], t_end=times / 2, t_d=times, eps_d=noise[0],
        rollout_times=times.expand(len(noise), -1), rollout_noise=noise, dropped=torch.zeros(batch, dtype=torch.bool),
    )  # fmt: skip
    text = negative.expand(batch, -1, -1)
    for term in terms_of(phase, roles, config):
        term(MicroBatch(latents=noise[0], condition=Condition(text), draws=draws))
    return sum(net.forwards for net in nets.values())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "phase",
    [
        Phase(kind="pretrain", own_step=0),
        Phase(kind="student", own_step=0, scm=True),
        Phase(kind="student", own_step=0, dmd=True, rollout_steps=2),
        Phase(kind="student", own_step=0, scm=True, dmd=True, rollout_steps=1),
        Phase(kind="critic", own_step=0, rollout_steps=1),
        Phase(kind="critic", own_step=0, rollout_steps=4),
    ],
    ids=lambda phase: f"{phase.kind}{'-scm' * phase.scm}{'-dmd' * phase.dmd}-{phase.rollout_steps}",
)
def test_flops_of_a_step_are_those_of_the_passes_it_asks_for(phase, guidance):
    objective = "pretrain" if phase.kind == "pretrain" else "distill"
    config = parse_config(tiny.config("s", "r", objective, distill={"teacher": "t", "guidance": guidance}))
    tokens = tokens_per_sample(config.model, config.data.latent_shape)
    forward, dual = model_flops(config.model, tokens), model_flops(config.model, tokens, tangent=True)
    assert flops_of_step(config, phase) == pytest.approx(forward * passes_of(config, phase, dual=dual / forward), rel=1e-12)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("method", [{"method": "dcm"}, {"method": "meanflow"}, {"tangent": "finite_difference"}], ids=str)
def test_flops_of_other_consistency_terms_are_those_of_their_passes(method, guidance):
    distill, interval = {"teacher": "t", "guidance": guidance, **method}, method.get("method") == "meanflow"
    config = parse_config(tiny.config("s", "r", "distill", distill=distill, model={**tiny.MODEL, "interval": interval}))
    phase, tokens = Phase(kind="student", own_step=0, scm=True), tokens_per_sample(config.model, config.data.latent_shape)
    forward, dual = model_flops(config.model, tokens), model_flops(config.model, tokens, tangent=True)
    passes = passes_of(config, phase, dual=dual / forward)
    by_hand = (
        (1 if guidance == 1 else 2) + {"dcm": 2, "finite_difference": 3}.get(next(iter(method.values())), dual / forward) + 2
    )
    assert passes == pytest.approx(4 * by_hand) and flops_of_step(config, phase) == pytest.approx(forward * passes, rel=1e-12)


@pytest.mark.parametrize("name", oracle.INTERVALS)
def test_flops_of_the_interval_are_those_that_torch_counts(mesh, name):
    counts, expected = [], []
    for interval in (True, False):
        model = oracle.INTERVALS[name](interval=interval)
        x, _, s, _, condition = oracle.inputs(model, batch=1, grid=GRID)
        net = build_model(model, mesh.config, mesh.groups)
        with torch.no_grad():
            counts.append(counted(partial(net, x, s, condition)))
        expected.append(model_flops(model, tokens_per_sample(model, tuple(x.shape[1:]))))
    assert counts[0] - counts[1] == pytest.approx(expected[0] - expected[1], rel=1e-12) and counts[0] > counts[1]


def test_examples_of_the_digits_cost_the_same():
    """Every method, and the three stages together."""
    costs = {}
    for path in sorted((Path(__file__).parent.parent / "examples" / "digits").glob("*.yaml")):
        if path.stem != "teacher":
            config = load_config(path)
            cost = sum(flops_of_step(config, phase_of(step, config.distill)) for step in range(config.train.steps))
            name = path.stem.split("_")[0]
            costs[name] = costs.get(name, 0.0) + cost
    assert costs.keys() == {"rcm", "scm", "dmd", "dcm", "meanflow", "staged"}
    assert {name: cost / costs["rcm"] for name, cost in costs.items()} == pytest.approx(dict.fromkeys(costs, 1.0), abs=0.02)


def test_rates_of_a_step():
    config, phase = parse_config(tiny.config("s", "r")), Phase(kind="pretrain", own_step=0)
    flops = 3 * 4 * model_flops(config.model, 8)  # forward and backward of four samples of 2 x 2 x 2 tokens
    want = {"tokens_per_second": 64.0, "tflops_per_rank": flops / 2 / 0.5 / 1e12, "mfu": None}
    assert Throughput(config=config, ranks=2).of_step(phase, 0.5) == pytest.approx(want)
    rates = Throughput(config=config, ranks=2, matmul_tflops=700.0).of_step(phase, 0.5)
    assert rates["mfu"] == pytest.approx(want["tflops_per_rank"] / 700)


def test_times_on_a_cpu(monkeypatch):
    clock = iter([10.0, 12.5, 20.0, 21.0, 30.0, 40.0, 41.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    watch.end()  # of nothing
    assert watch.take() == []
    watch.begin(), watch.end(), watch.begin(), watch.end()
    assert watch.take() == [2.5, 1.0] and watch.take() == []
    watch.begin()  # what an error cut short
    watch.begin(), watch.end()
    assert watch.take() == [1.0]


def test_times_on_a_gpu_are_waited_for_once(monkeypatch):
    """With events in the place of CUDA's; only the last is waited for, those before have passed by then."""
    clock, waited = iter([1000.0, 3500.0, 9000.0, 9100.0]), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.milliseconds = next(clock)

        def synchronize(self):
            waited.append(self.milliseconds)

        def elapsed_time(self, end):
            assert waited == [9100.0], "CUDA raises for an event that is to come"
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(stopwatch.torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    watch.begin(), watch.end(), watch.begin(), watch.end()
    assert waited == []
    assert watch.take() == [2.5, 0.1] and waited == [9100.0]
