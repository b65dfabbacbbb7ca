"""Activations that wait on the host, with the CPU's stand-in for a link, and profiles without data."""

import copy

import pytest
import torch
import torch.nn.functional as F
from recompute_models import accumulate, albert, encoder, gpt, resnet, results
from torch import nn

from pyperf_dl import recompute
from pyperf_dl._recompute_offload import HostLink
from pyperf_dl._recompute_profile import job_of, measure


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


CASES = {
    "gpt": lambda: gpt(batch=8, length=32, dim=64, layers=6, heads=2),
    "resnet": lambda: resnet(batch=8, size=32, depths=(2, 2, 2)),
    "encoder": lambda: encoder(length=64, dim=64, layers=6),
    "albert": lambda: albert(batch=8, length=32, dim=64, repeats=6),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bandwidth", [1e12, 1e9])
def test_the_same_bits_within_the_budget(name, bandwidth):
    case = CASES[name]()
    before = copy.deepcopy(case.model.state_dict())
    wanted = results(case)
    link = recompute.HostLink("cpu", bandwidth=bandwidth, least_bytes=1024)
    how = {"loss_fn": case.loss_fn, "blocks": case.blocks, "offload": link}
    least = recompute.plan(case.model, case.inputs, budget="least", **how)
    full = recompute.full_peak(least.profile)
    used = set()
    for fraction in (0.1, 0.4, 0.8):
        case.model.load_state_dict(before)
        budget = int(least.budget + fraction * (full - least.budget))
        plan = recompute.plan(case.model, case.inputs, budget=budget, **how)
        blocks, options, replays = plan.profile.blocks, plan.schedule.kept_options, plan.schedule.replays
        used |= {block.options[o].label for block, o in zip(blocks, options, strict=True)}
        assert not any(n and o for n, o in zip(replays, options, strict=True))
        plan.apply()
        assert all(torch.equal(a, b) for a, b in zip(wanted, results(case), strict=True))
        peak = plan.profile.fixed_bytes + recompute.peak_memory(lambda: accumulate(case))
        plan.remove()
        assert peak <= budget, (fraction, peak / budget, plan.predicted_peak / budget, plan.schedule)
        assert plan.predicted_peak <= budget
    if bandwidth == 1e12:  # with the other, times that are measured decide
        assert "offload" in used


def test_a_fast_link_saves_what_recomputation_costs():
    case = CASES["gpt"]()
    how = {"loss_fn": case.loss_fn, "budget": "70%"}
    with_link = recompute.plan(case.model, case.inputs, offload=HostLink("cpu", 1e13, 1024), **how)
    assert sum(with_link.schedule.replays) == 0
    assert "offload" in str(with_link)
    plain = recompute.plan(case.model, case.inputs, **how)
    assert sum(plain.schedule.replays) > 0


def test_a_link_leaves_the_bytes_of_what_is_kept():
    case = CASES["gpt"]()
    job = job_of(case.model, case.inputs, case.loss_fn)
    plain, with_link = measure(job).profile, measure(job, link=HostLink("cpu", 1e9, 1024)).profile
    for a, b in zip(plain.blocks, with_link.blocks, strict=True):
        assert a.options[0][3:] == b.options[0][3:]


def test_what_is_sent_and_what_stays():
    link = HostLink("cpu", 1e9, least_bytes=1024)
    linear = nn.Linear(64, 64)
    x = torch.randn(128, 64, requires_grad=True)
    with link.context(0, linear, (x,)) as sent:
        y = linear(x).exp()  # saves x and the weight, which stay, and the exponential
        z = y[:, ::2].sigmoid() * y.sum(1, keepdim=True).expand(-1, 32)
    assert sent.nbytes == y.nbytes + z.nbytes  # that of sigmoid too, once; the expanded sum, which is small, stays
    z.sum().backward(retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    z.sum().backward()
    assert torch.equal(first, x.grad)
    plain = x.detach().clone().requires_grad_()
    y = linear(plain).exp()
    (y[:, ::2].sigmoid() * y.sum(1, keepdim=True).expand(-1, 32)).sum().backward()
    assert torch.equal(first, plain.grad)


BAD = {
    "a device without a link": (lambda: HostLink("meta"), ValueError, r"HostLink: device must be .*, got meta"),
    "no bandwidth": (lambda: HostLink("cpu", 0), ValueError, r"HostLink: bandwidth must be .* > 0, got 0"),
    "offload=True on a CPU": (
        lambda: planned(True),
        ValueError,
        r"offload=True is for models on CUDA .*got one on cpu",
    ),
    "offload of another type": (lambda: planned("host"), TypeError, r"offload must be a bool or a HostLink, got str"),
    "a profile elsewhere": (
        lambda: recompute.profile(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.randn(2, 2), device="cuda"),
        ValueError,
        r"profile: device must be None.*or 'meta', got 'cuda'",
    ),
}


def planned(offload):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    return recompute.plan(model, torch.randn(8, 4), budget="100%", offload=offload)


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    run, error, message = BAD[name]
    with pytest.raises(error, match=message):
        run()


# ---- without data ----


@pytest.mark.parametrize("name", CASES)
def test_fake_tensors_save_as_many_bytes(name):
    """What convolutions take within themselves is not seen, so that peaks are a little lower there."""
    case = CASES[name]()
    before = copy.deepcopy(case.model.state_dict())
    grads = [p.grad for p in case.model.parameters()]
    how = {"loss_fn": case.loss_fn, "blocks": case.blocks}
    real = recompute.profile(case.model, case.inputs, **how)
    fake = recompute.profile(case.model, case.inputs, device="meta", **how)
    for a, b in zip(real.blocks[1:-1], fake.blocks[1:-1], strict=True):
        assert a.output_bytes == b.output_bytes
        assert a.options[0].saved_bytes == pytest.approx(b.options[0].saved_bytes, rel=0.01)
        assert b.forward > 0
        assert b.options[0].backward > 0
    assert recompute.full_peak(fake) == pytest.approx(recompute.full_peak(real), rel=0.05)
    assert fake.fixed_bytes == real.fixed_bytes
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())
    assert all(p.grad is g for p, g in zip(case.model.parameters(), grads, strict=True))
    assert all(type(p) is nn.Parameter for p in case.model.parameters())
    assert recompute.solve(fake, recompute.least_budget(fake)[0]).complete


def test_a_model_on_meta():
    with torch.device("meta"):
        model = gpt(batch=2, length=16, layers=4).model
    tokens = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    chain = recompute.profile(
        model, tokens, loss_fn=lambda y: F.cross_entropy(y.flatten(0, 1), tokens.flatten()), device="meta"
    )
    real = gpt(batch=2, length=16, layers=4)
    same = recompute.profile(real.model, real.inputs, loss_fn=real.loss_fn)
    assert [b.output_bytes for b in chain.blocks[1:-1]] == [b.output_bytes for b in same.blocks[1:-1]]
    assert all(p.device.type == "meta" for p in model.parameters())


# ---- autocast ----


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_within_the_budget_under_autocast(fraction):
    case = gpt(batch=4, length=32, dim=64, layers=8, heads=4)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss()

    def bits():
        torch.manual_seed(3)
        for p in case.model.parameters():
            p.grad = torch.zeros_like(p)
        loss().backward()
        return [p.grad for p in case.model.parameters()]

    wanted = bits()
    with torch.autocast("cpu", torch.bfloat16):
        least = recompute.plan(case.model, case.inputs, loss_fn=case.loss_fn, budget="least")
        full = recompute.full_peak(least.profile)
        budget = int(least.budget + fraction * (full - least.budget))
        how = {"budget": budget, "on_new_shapes": "error"}
        plan = recompute.plan(case.model, case.inputs, loss_fn=case.loss_fn, **how)
    plan.apply()
    assert all(torch.equal(a, b) for a, b in zip(wanted, bits(), strict=True))
    peak = plan.profile.fixed_bytes + recompute.peak_memory(lambda: loss().backward())
    assert peak <= budget
    assert plan.predicted_peak == pytest.approx(peak, rel=0.02)
    assert plan.profile.signature.startswith("autocast bfloat16; ")
    with pytest.raises(ValueError, match=r"the plan is for inputs autocast bfloat16"):
        case.loss()
