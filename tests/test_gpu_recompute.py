"""Plans on a GPU: bits, peaks as CUDA's allocator counts them, what waits on the host, compiled blocks."""

import copy

import pytest
import torch
from recompute_models import accumulate, albert, encoder, gpt, resnet, results
from torch.utils import _pytree as pytree

from pyperf_dl import recompute

pytestmark = pytest.mark.gpu

CASES = {
    "gpt": lambda: gpt(batch=16, length=256, dim=512, layers=12, heads=8),
    "resnet": lambda: resnet(batch=32, size=64, depths=(3, 3, 3)),
    "encoder": lambda: encoder(length=256, dim=256, layers=8),
    "albert": lambda: albert(batch=16, length=256, dim=512, repeats=8),
}


@pytest.fixture(autouse=True)
def _deterministic():
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


def on_gpu(case):
    """The loss function may hold targets on the CPU."""

    def loss_fn(output):
        return case.loss_fn(pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, output)).cuda()

    inputs = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, case.inputs)
    return case._replace(model=case.model.cuda(), inputs=inputs, loss_fn=loss_fn)


def peak_of(case):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    accumulate(case)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_within_the_budget(name, selective):
    case = on_gpu(CASES[name]())
    assert next(case.model.parameters()).is_cuda
    before = copy.deepcopy(case.model.state_dict())
    wanted = results(case)
    case.model.load_state_dict(before)
    assert all(torch.equal(a, b) for a, b in zip(wanted, results(case), strict=True)), (
        "the model itself is not deterministic"
    )
    how = {"loss_fn": case.loss_fn, "blocks": case.blocks, "selective": selective}
    least = recompute.plan(case.model, case.inputs, budget="least", **how)
    full = recompute.full_peak(least.profile)
    assert full == pytest.approx(peak_of(case), rel=0.02)
    for fraction in (0.05, 0.3, 0.7):
        case.model.load_state_dict(before)
        plan = recompute.plan(
            case.model, case.inputs, budget=int(least.budget + fraction * (full - least.budget)), **how
        )
        plan.apply()
        got = results(case)
        held = sum(t.nbytes for t in [*wanted, *got, *before.values()])
        peak = peak_of(case) - held
        plan.remove()
        assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
        del got
        assert peak <= plan.budget
        assert plan.predicted_peak == pytest.approx(peak, rel=0.02)


def test_offload_saves_memory_with_the_same_bits():
    case = on_gpu(CASES["gpt"]())
    wanted = results(case)
    plan = recompute.plan(case.model, case.inputs, loss_fn=case.loss_fn, budget="50%", offload=True)
    labels = [b.options[o].label for b, o in zip(plan.profile.blocks, plan.schedule.kept_options, strict=True)]
    plan.apply()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(wanted, results(case), strict=True))
    held = sum(t.nbytes for t in wanted)
    assert peak_of(case) - held <= plan.budget
    assert "offload" in labels or sum(plan.schedule.replays) > 0


def test_fit_is_what_is_free():
    case = on_gpu(CASES["gpt"]())
    plan = recompute.plan(case.model, case.inputs, loss_fn=case.loss_fn, budget="fit")
    free, total = torch.cuda.mem_get_info()
    assert plan.budget <= free + torch.cuda.memory_reserved()
    assert plan.budget >= 0.5 * total or free < 0.6 * total


def test_a_generator_of_the_device_is_put_back():
    case = on_gpu(CASES["gpt"]())
    accumulate(case)
    after = torch.cuda.get_rng_state()
    plan = recompute.plan(case.model, case.inputs, loss_fn=case.loss_fn, budget="least")
    plan.apply()
    accumulate(case)
    assert torch.equal(after, torch.cuda.get_rng_state())


def test_compiled_blocks_need_no_more_than_eager_ones():
    case = on_gpu(CASES["gpt"]())
    plan = recompute.plan(case.model, case.inputs, loss_fn=case.loss_fn, budget="60%")
    plan.apply()
    eager = peak_of(case)
    plan.remove()
    for block in case.model.blocks:
        block.compile()
    accumulate(case)
    plan.apply()
    accumulate(case)
    assert peak_of(case) <= 1.02 * eager
