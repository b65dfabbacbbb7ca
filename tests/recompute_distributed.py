"""Two processes that train under a plan; tests/test_recompute_distributed.py runs it with DDP or FSDP2, and a file."""

import copy
import os
import sys

import pytest
import torch
import torch.distributed as dist
from recompute_models import gpt
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pyperf_dl import recompute


def main(kind, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    case = gpt(batch=2, length=16, dim=16, layers=5)
    plain, planned = case.model, copy.deepcopy(case.model)
    if kind == "DDP":  # one plan for all, as each process measures other times
        how = {"loss_fn": case.loss_fn, "selective": True, "group": dist.group.WORLD}
        plan = recompute.plan(planned, case.inputs, budget="least", **how)
        plans = [None, None]
        dist.all_gather_object(plans, (plan.schedule, plan.profile, plan.budget))
        assert plans[0] == plans[1]
        with pytest.raises(ValueError, match="must be at least"):  # in both
            recompute.plan(planned, case.inputs, loss_fn=case.loss_fn, budget=1000 + rank, group=dist.group.WORLD)
    else:
        if rank == 0:
            recompute.plan(planned, case.inputs, loss_fn=case.loss_fn, budget="least").save(path)
        dist.barrier()
        plan = recompute.Plan.load(path)
    assert sum(plan.schedule.replays) > 2
    plan.apply(planned)
    runs = [0]
    planned.blocks[0].register_forward_pre_hook(lambda *args: runs.__setitem__(0, runs[0] + 1))
    tokens = torch.randint(0, 61, (4, 2, 16), generator=torch.Generator().manual_seed(rank))

    def train(model):
        if kind == "DDP":
            model = DistributedDataParallel(model)
        else:
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(10 + rank)
        found = []
        for t in tokens[:2]:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(t).flatten(0, 1), t.flatten())
            loss.backward()
            found += [loss.detach(), *(whole(p.grad).clone() for p in model.parameters())]
            optimizer.step()
            found += [whole(p.detach()).clone() for p in model.parameters()]
        return found

    wanted, found = train(plain), train(planned)
    assert len(wanted) == len(found) > 100
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        assert torch.equal(a, b), (kind, i)
    assert runs[0] == 2 * (1 + plan.schedule.replays[1])
    dist.barrier()
    print(f"{kind}: {len(found)} tensors are equal on process {rank}", flush=True)
    dist.barrier()
    os._exit(0)  # torch's own threads may abort a process that takes its groups down


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    main(*sys.argv[1:])
