"""AdamW without a first moment against torch.optim.AdamW with beta1 = 0."""

import pytest
import torch

from rcm_mcore.training.optim import AdamWNoMomentum, _at_a_time


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (11,), ())]


def train(optimizer, params, steps=20):
    generator = torch.Generator().manual_seed(1)
    # Sizes from 1e-8 to 1e2, so that eps and the bias correction both count.
    sizes = [10.0 ** torch.randint(-8, 3, p.shape, generator=generator) for p in params]
    for step in range(steps):
        for p, size in zip(params, sizes):
            p.grad = torch.randn(p.shape, generator=generator) * size
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()


def ours(params, **options):
    optimizer = AdamWNoMomentum(params, **options)
    for p in params:
        optimizer.state[p]["exp_avg_sq"] = torch.zeros_like(p)
    return optimizer


@pytest.mark.parametrize("beta2, eps, weight_decay", [(0.999, 1e-8, 0.01), (0.99, 1e-3, 0.5), (0.0, 1e-8, 0.0)])
def test_equals_adamw_with_beta1_zero(beta2, eps, weight_decay):
    mine, theirs = parameters(), parameters()
    optimizer = ours(mine, lr=1e-2, beta2=beta2, eps=eps, weight_decay=weight_decay)
    stock = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.0, beta2), eps=eps, weight_decay=weight_decay)
    train(optimizer, mine)
    train(stock, theirs)
    assert optimizer.param_groups[0]["step"] == 20
    for p, q, start in zip(mine, theirs, parameters(), strict=True):
        assert float((p - q).detach().abs().max()) <= 1e-7
        assert float((p - start).detach().abs().max()) > 1e-3
        want = stock.state[q]["exp_avg_sq"]
        assert torch.allclose(optimizer.state[p]["exp_avg_sq"], want, rtol=1e-6, atol=0)


def test_holds_no_first_moment():
    params = parameters()
    optimizer = ours(params, lr=1e-2, beta2=0.999, eps=1e-8, weight_decay=0.01)
    train(optimizer, params, steps=2)
    assert {name for p in params for name in optimizer.state[p]} == {"exp_avg_sq"}


def test_groups_count_their_own_steps():
    """A resumed group goes on with the bias correction of its own step; a group without parameters is left alone."""
    params = parameters()
    groups = [{"params": params[:1]}, {"params": [], "lr": 1.0}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = AdamWNoMomentum(groups, lr=1e-2, beta2=0.999, eps=1e-8, weight_decay=0.01)
    for p in params:
        optimizer.state[p]["exp_avg_sq"] = torch.zeros_like(p)
    train(optimizer, params, steps=3)
    assert [group["step"] for group in optimizer.param_groups] == [3, 0, 3]
    copies = parameters()
    stock = torch.optim.AdamW(
        [{"params": copies[:1]}, {"params": copies[1:], "weight_decay": 0.0}], lr=1e-2, betas=(0.0, 0.999), weight_decay=0.01
    )
    train(stock, copies, steps=3)
    assert all(float((p - q).detach().abs().max()) <= 1e-7 for p, q in zip(params, copies, strict=True))


@pytest.mark.parametrize("elements, wanted", [(1, [1, 1, 1]), (35, [1, 2]), (46, [2, 1]), (47, [3])])
def test_a_few_parameters_at_a_time(elements, wanted):
    """Every one of them once and in order: 35, 11 and 1 elements."""
    params = parameters()
    lists = list(_at_a_time(params, elements))
    assert [len(some) for some in lists] == wanted
    assert [id(p) for some in lists for p in some] == [id(p) for p in params]
