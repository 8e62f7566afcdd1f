"""Random draws know seed, step, purpose and slot, and nothing of the mesh."""

import dataclasses
import math

import pytest
import scipy.stats
import torch

from rcm_mcore.config import parse_config
from rcm_mcore.distill.draws import Draws, draw
from rcm_mcore.distill.phases import Phase
from rcm_mcore.parallel.random import generator, noise

SHAPE = (4, 2, 4, 6)
PHASES = {
    "pretrain": Phase(kind="pretrain", own_step=0),
    "scm": Phase(kind="student", own_step=0, scm=True),
    "student": Phase(kind="student", own_step=0, scm=True, dmd=True, rollout_steps=4),
    "critic": Phase(kind="critic", own_step=0, rollout_steps=3),
}
FIELDS = {
    "pretrain": {"t_g", "eps_g", "dropped"},
    "scm": {"t_g", "eps_g"},
    "student": {"t_g", "eps_g", "t_d", "eps_d", "rollout_times", "rollout_noise"},
    "critic": {"t_d", "eps_d", "rollout_times", "rollout_noise"},
}


def config(seed=0, **distill):
    return parse_config(
        {
            "model": {"size": "tiny", "in_channels": 4, "interval": distill.get("method") == "meanflow"},
            "train": {"objective": "distill", "steps": 1, "global_batch_size": 8, "micro_batch_size": 2, "seed": seed},
            "data": {"shards": "x.tar", "latent_shape": list(SHAPE)},
            "distill": {"teacher": "teacher", **distill},
            "checkpoint": {"dir": "run"},
        }
    )


def present(draws):
    return {f.name: v for f in dataclasses.fields(draws) if (v := getattr(draws, f.name)) is not None}


def drawn(phase, slots=tuple(range(8)), step=3, **options):
    return draw(config(**options), PHASES[phase], step=step, slots=slots)


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_draws_what_it_needs(phase):
    tensors = present(drawn(phase))
    assert tensors.keys() == FIELDS[phase]
    n = PHASES[phase].rollout_steps
    for name, shape, dtype in [
        ("t_g", (8,), torch.float64),
        ("t_d", (8,), torch.float64),
        ("eps_g", (8, *SHAPE), torch.float32),
        ("eps_d", (8, *SHAPE), torch.float32),
        ("rollout_times", (n, 8), torch.float64),
        ("rollout_noise", (n, 8, *SHAPE), torch.float32),
        ("dropped", (8,), torch.bool),
    ]:
        if name in tensors:
            assert tensors[name].shape == shape and tensors[name].dtype == dtype, name


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("parts", [((0, 2, 4, 6), (1, 3, 5, 7)), ((0, 1, 2, 3), (4, 5, 6, 7)), tuple((i,) for i in range(8))])
def test_the_split_over_ranks_changes_nothing(phase, parts):
    whole = present(drawn(phase))
    order = [slot for part in parts for slot in part]
    pieces = [present(drawn(phase, slots=part)) for part in parts]
    for name, want in whole.items():
        dim = 1 if name.startswith("rollout") else 0
        got = torch.cat([piece[name] for piece in pieces], dim)
        assert torch.equal(got, want.index_select(dim, torch.tensor(order))), name


@pytest.mark.parametrize("phase", PHASES)
def test_step_and_seed_change_every_draw(phase):
    base = present(drawn(phase))
    for other in (drawn(phase, step=4), drawn(phase, seed=1)):
        for name, want in present(other).items():
            if name == "dropped":
                continue
            # The first level of a rollout is pi / 2 in every step.
            a, b = (x[1:] if name == "rollout_times" else x for x in (base[name], want))
            assert not torch.isclose(a, b, rtol=1e-6, atol=0).any(), name


def test_a_step_drawn_again_is_the_same():
    a, b = present(drawn("student")), present(drawn("student"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_two_uses_share_their_noise():
    """Correlations between samples and purposes are those of independent numbers."""
    d = drawn("student")
    rows = torch.cat([d.eps_g.flatten(1), d.eps_d.flatten(1), d.rollout_noise.flatten(0, 1).flatten(1)]).double()
    assert len(rows) == 8 * 6
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert float(correlation.abs().max()) <= 5 / math.sqrt(rows.shape[1])
    assert scipy.stats.kstest(rows.flatten().numpy(), "norm").pvalue >= 0.01
    times = torch.cat([d.t_g, d.t_d])
    assert len(times.unique()) == 16


def test_times_follow_their_distributions():
    """t_g log-normal around -0.8, t_d and later rollout levels shifted uniform."""
    d = drawn("student", slots=tuple(range(400)))
    assert scipy.stats.kstest(d.t_g.tan().log().numpy(), "norm", args=(-0.8, 1.6)).pvalue >= 0.01
    shifted = lambda s: s / (5 - 4 * s)
    assert scipy.stats.kstest((d.t_d.sin() / (d.t_d.sin() + d.t_d.cos())).numpy(), shifted).pvalue >= 0.01
    second = d.rollout_times[1]
    assert scipy.stats.kstest((second.sin() / (second.sin() + second.cos())).numpy(), shifted).pvalue >= 0.01


def test_rollout_levels_start_at_pure_noise_and_never_rise():
    times = drawn("student", slots=tuple(range(64))).rollout_times
    assert (times[0] == math.pi / 2).all()
    assert (times[1:] <= times[:-1]).all() and (times > 0).all()
    assert (times[2] == times[1]).any() and (times[2] < times[1]).any()  # a draw above the level before is cut to it


def test_a_fixed_list_of_levels_is_honoured():
    times = drawn("critic", rollout_times=[1.5, 1.4, 1.0]).rollout_times
    assert times.tolist() == [[math.pi / 2] * 8, [1.5] * 8, [1.4] * 8]
    rising = drawn("student", rollout_times=[1.0, 1.4, 0.6]).rollout_times
    assert rising[:, 0].tolist() == [math.pi / 2, 1.0, 1.0, 0.6]


def test_a_longer_rollout_begins_like_a_shorter_one():
    three, four = (draw(config(), dataclasses.replace(PHASES["critic"], rollout_steps=n), step=3, slots=(5,)) for n in (3, 4))
    assert torch.equal(three.rollout_times, four.rollout_times[:3])
    assert torch.equal(three.rollout_noise, four.rollout_noise[:3])


def test_share_of_dropped_samples():
    count, rate = 10_000, 0.1
    small = dataclasses.replace(config(), data=dataclasses.replace(config().data, latent_shape=(4, 1, 2, 2)))
    draws = draw(small, PHASES["pretrain"], step=0, slots=tuple(range(count)))
    assert abs(int(draws.dropped.sum()) - rate * count) <= 3 * math.sqrt(count * rate * (1 - rate))
    s = draws.t_g.sin() / (draws.t_g.sin() + draws.t_g.cos())
    assert scipy.stats.kstest(s.numpy(), lambda s: s / (3 - 2 * s)).pvalue >= 0.01


def test_intervals_end_before_they_begin():
    """Both ends are draws of the same distribution; for a share of the samples there is one draw, which is both."""
    count, options = 1000, dict(method="meanflow", time_g={"mean": -0.3, "std": 1.1})
    small = dataclasses.replace(config(**options), data=dataclasses.replace(config().data, latent_shape=(4, 1, 2, 2)))
    d = draw(small, PHASES["scm"], step=3, slots=tuple(range(count)))
    assert d.t_end.dtype == torch.float64 and (d.t_end <= d.t_g).all()
    instant = d.t_end == d.t_g
    assert abs(int(instant.sum()) - 0.25 * count) <= 3 * math.sqrt(count * 0.25 * 0.75)
    law = dict(cdf="norm", args=(-0.3, 1.1))
    assert scipy.stats.kstest(d.t_g[instant].tan().log().numpy(), **law).pvalue >= 0.01
    both = torch.cat([d.t_g[~instant], d.t_end[~instant]])
    assert scipy.stats.kstest(both.tan().log().numpy(), **law).pvalue >= 0.01
    # Of two independent draws the later has the squared distribution function.
    later = scipy.stats.norm.cdf(d.t_g[~instant].tan().log().numpy(), -0.3, 1.1) ** 2
    assert scipy.stats.kstest(later, "uniform").pvalue >= 0.01
    for share, equal in ((0.0, 0), (1.0, 8)):
        few = drawn("scm", instant_share=share, **options)
        assert int((few.t_end == few.t_g).sum()) == equal


def test_intervals_know_nothing_of_the_mesh():
    whole = drawn("scm", method="meanflow")
    assert present(whole).keys() == {"t_g", "eps_g", "t_end"}
    parts = [drawn("scm", slots=slots, method="meanflow") for slots in ((0, 2, 4, 6), (1, 3, 5, 7))]
    for name, want in present(whole).items():
        pieces = torch.stack([getattr(part, name) for part in parts], 1).flatten(0, 1)
        assert torch.equal(pieces, want), name
    assert torch.equal(whole.rows(slice(2, 5)).t_end, whole.t_end[2:5])


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([6, 1]), torch.tensor([True] * 3 + [False] * 5)])
def test_rows_are_those_of_the_samples(rows):
    slots = torch.arange(8)[rows].tolist()
    for phase in PHASES:
        got, want = present(drawn(phase).rows(rows)), present(drawn(phase, slots=tuple(slots)))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in got), phase


def test_to_moves_everything_that_is_there():
    moved = drawn("student").to(torch.device("meta"))
    assert present(moved).keys() == FIELDS["student"]
    assert {v.device.type for v in present(moved).values()} == {"meta"}
    assert present(Draws().to(torch.device("meta"))) == {}


def test_generators_differ_by_every_part_of_their_name():
    base = dict(purpose="noise", seed=0, step=1, slot=2)
    first = lambda **c: float(torch.rand((), generator=generator(**{**base, **c})))
    others = dict(purpose="time"), dict(seed=1), dict(step=2), dict(slot=1), dict(seed=1, step=0), dict(slot=12), dict(step=11)
    assert len({first(), *(first(**other) for other in others)}) == 8
    assert first() == first()


def test_noise_of_a_slot_is_its_own_generators():
    got = noise("noise", (2, 3), seed=4, step=5, slots=[7, 1])
    assert got.dtype == torch.float32 and got.shape == (2, 2, 3)
    for row, slot in zip(got, (7, 1)):
        assert torch.equal(row, torch.randn(2, 3, generator=generator("noise", seed=4, step=5, slot=slot)))
