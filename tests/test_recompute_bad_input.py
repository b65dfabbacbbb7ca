"""What recompute refuses: the message names the operator, the argument, the rule and what it got, and the model is as
before."""

import copy

import pytest
import torch
import torch.nn.functional as F
from recompute_models import gpt
from torch import nn

from pyperf_dl import recompute


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def layers(count=4):
    return nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(count))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.start, self.layers = nn.Linear(8, 8), layers()

    def forward(self, x):
        x = self.start(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Skips(Model):
    """As a U-Net: an output is read again, later."""

    def forward(self, x):
        first = self.layers[0](x)
        x = self.layers[2](self.layers[1](first))
        return self.layers[3](x) + first


class Kept(Model):
    """As output_hidden_states does."""

    def forward(self, x):
        self.states = []
        for layer in self.layers:
            x = layer(x)
            self.states.append(x)
        return x


class Glue(Model):
    def forward(self, x):
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x


class Siamese(Model):
    def forward(self, x):
        return super().forward(x) - super().forward(x.flip(0))


class OnceMore(Model):
    def forward(self, x):
        return self.layers[1](super().forward(x) * 2)


class Reads(Model):
    """Something between the blocks only looks at their outputs."""

    def forward(self, x):
        self.norms = []
        for layer in self.layers:
            x = layer(x)
            self.norms.append(float(x.detach().norm()))
        return x


class InPlaceBetween(Model):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x.mul_(2)
        return x


class Fresh(Model):
    """Another tensor for each block."""

    class Masked(nn.Linear):
        def forward(self, x, mask):
            return super().forward(x) * mask

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Masked(8, 8) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, torch.ones(8))
        return x


class InPlace(Model):
    class Adds(nn.Linear):
        def forward(self, x):
            x += super().forward(x)
            return x

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([*layers(2), self.Adds(8, 8), *layers(1)])


class Effect(Model):
    """Gives something else each time."""

    class Counts(nn.Linear):
        times = 0

        def forward(self, x):
            self.times += 1
            return super().forward(x) * self.times

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([*layers(2), self.Counts(8, 8), *layers(1)])


class TwiceThrough(Model):
    def forward(self, x):
        return super().forward(super().forward(x))


class Never(Model):
    def __init__(self):
        super().__init__()
        self.more = layers(2)


class Frozen(Model):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class Constant(Model):
    def forward(self, x):
        return super().forward(x).detach()


class Text(Model):
    def forward(self, x):
        super().forward(x)
        return "text"


X = torch.ones(4, 8)
VIEW, IN_PLACE, CAST = torch.ops.aten.transpose, torch.ops.aten.add_.Tensor, torch.ops.aten._to_copy.default
# model, arguments of plan, class of the error, message
CASES = {
    "no module": (lambda: (lambda x: x), {}, TypeError, r"model must be a torch\.nn\.Module, got function"),
    "budget too small": (Model, {"budget": 1000}, ValueError, r"must be at least .* needs, got 1000"),
    "budget without sense": (Model, {"budget": "much"}, ValueError, r"budget must be .*'6GiB'.*got 'much'"),
    "budget of an unknown unit": (Model, {"budget": "6 GOB"}, ValueError, r"budget must be .*got '6 GOB'"),
    "budget < 0": (Model, {"budget": -5}, ValueError, r"budget must be .*> 0, got -5"),
    "budget 0 %": (Model, {"budget": "0%"}, ValueError, r"budget must be .*> 0, got '0%'"),
    "budget without a number": (Model, {"budget": "GiB"}, ValueError, r"budget must be .*got 'GiB'"),
    "budget beyond numbers": (Model, {"budget": "9" * 400}, ValueError, r"budget must be .*got '999"),
    "budget a float": (Model, {"budget": 0.7}, TypeError, r"budget must be .*got 0\.7 of float"),
    "budget True": (Model, {"budget": True}, TypeError, r"budget must be .*got True of bool"),
    "budget None": (Model, {"budget": None}, TypeError, r"budget must be .*got None of NoneType"),
    "fit on a CPU": (Model, {"budget": "fit"}, ValueError, r"budget='fit' is for CUDA devices, got a model on cpu"),
    "output read twice": (Skips, {"blocks": "layers"}, ValueError, r"block layers\.0 is used twice.*one block"),
    "outputs held": (Kept, {"blocks": "layers"}, ValueError, r"layers\.0 is used twice.*held after the forward"),
    "held, by itself": (Kept, {}, ValueError, r"no two blocks of Kept follow each other.*used twice.*pass blocks"),
    "two chains of the same blocks": (Siamese, {}, ValueError, r"layers\.0 to layers\.3 are called 2 times in one"),
    "two named chains": (Siamese, {"blocks": "layers"}, ValueError, r"layers\.0 to layers\.3 are called 2 times in"),
    "one of them once more": (OnceMore, {}, ValueError, r"block layers\.1 is called 2 times in one forward"),
    "operators between": (Glue, {"blocks": "layers"}, ValueError, r"layers\.0 and layers\.1 are not a chain: no"),
    "read between": (Reads, {"blocks": "layers"}, ValueError, r"layers\.0 is used twice.*outside of the blocks reads"),
    "changed between": (InPlaceBetween, {"blocks": "layers"}, ValueError, r"layers\.0 is used twice.*mul_"),
    "a tensor for each": (Fresh, {"blocks": "layers"}, ValueError, r"layers\.1 reads a tensor \[8\] that is neither"),
    "changes its input": (InPlace, {"blocks": "layers"}, ValueError, r"block layers\.2 changes its input in place"),
    "side effect": (Effect, {}, ValueError, r"block layers\.2 gives another output when it runs again.*side effect"),
    "twice through": (TwiceThrough, {}, ValueError, r"layers\.0 to layers\.3 are called 2 times in one forward"),
    "not called": (Never, {"blocks": ["layers.0", "more.1"]}, ValueError, r"block more\.1 is not called in the"),
    "no such block": (Model, {"blocks": ["layers.9"]}, ValueError, r"model has no module named 'layers\.9'"),
    "no such container": (Model, {"blocks": "stack"}, ValueError, r"model has no module named 'stack'"),
    "an empty container": (Model, {"blocks": "start"}, ValueError, r"blocks='start' must name a module that holds"),
    "no blocks": (Model, {"blocks": []}, ValueError, r"blocks"),
    "blocks a number": (Model, {"blocks": 3}, TypeError, r"blocks must be the name .*got int"),
    "blocks of numbers": (Model, {"blocks": [1]}, TypeError, r"blocks must hold names or modules, got int"),
    "another's blocks": (Model, {"blocks": [nn.Linear(8, 8)]}, ValueError, r"blocks must be modules of the model"),
    "blocks in blocks": (Model, {"blocks": ["layers", "layers.0"]}, ValueError, r"each other, got layers\.0 inside"),
    "nothing found": (lambda: nn.Bilinear(8, 8, 2), {"inputs": (X, X)}, ValueError, r"blocks were not found"),
    "inputs elsewhere": (Model, {"inputs": X.to("meta")}, ValueError, r"on the model's device cpu, got .*meta"),
    "no tensors": (Model, {"inputs": 3}, TypeError, r"inputs must be a tensor, .* got int"),
    "nothing to train": (Frozen, {}, ValueError, r"model must have parameters that need gradients, Frozen has none"),
    "no parameters": (nn.Identity, {}, ValueError, r"parameters that need gradients, Identity has none"),
    "no gradient": (Constant, {}, ValueError, r"nothing in the model's output needs a gradient"),
    "no gradient of the loss": (Constant, {"loss_fn": torch.sum}, ValueError, r"loss must depend on parameters"),
    "no output": (Text, {}, ValueError, r"nothing in the model's output needs a gradient, got 'text'"),
    "a loss of many numbers": (Model, {"loss_fn": lambda y: y}, ValueError, r"loss_fn must .*got a tensor \[4, 8\]"),
    "a loss that is none": (Model, {"loss_fn": lambda y: 3.0}, ValueError, r"loss_fn must return .*got 3\.0 of float"),
    "no function": (Model, {"loss_fn": "mse"}, TypeError, r"loss_fn must be a function .*got str"),
    "bytes < 0": (Model, {"optimizer": -1}, ValueError, r"optimizer must be .*>= 0, got -1"),
    "no optimizer": (Model, {"optimizer": "Adam"}, TypeError, r"optimizer must be .*got 'Adam' of str"),
    "new shapes": (Model, {"on_new_shapes": "ignore"}, ValueError, r"on_new_shapes must be one of .*got 'ignore'"),
    "generators": (Model, {"generators": [3]}, TypeError, r"generators must .*torch\.Generator, got .*int"),
    "one generator": (Model, {"generators": torch.Generator()}, TypeError, r"generators must .*got Generator"),
    "selective a number": (Model, {"selective": 1}, TypeError, r"plan: selective must be a bool or .*got int"),
    "selective a name": (Model, {"selective": "aten::mm"}, TypeError, r"plan: selective must be .*got str"),
    "selective of names": (Model, {"selective": ["aten::mm"]}, TypeError, r"selective must be .*got aten::mm of str"),
    "a function": (Model, {"selective": [torch.mm]}, TypeError, r"selective must be .*got .*mm.* of builtin_function"),
    "no operators": (Model, {"selective": []}, ValueError, r"plan: selective must be .*at least one, got none"),
    "a view": (Model, {"selective": {VIEW}}, ValueError, r"selective must be .*of their own.*got aten\.transpose"),
    "in place": (Model, {"selective": [IN_PLACE]}, ValueError, r"selective must be .*of their own.*got aten\.add_"),
    "a cast": (Model, {"selective": [CAST]}, ValueError, r"selective must be .*are no casts, got aten\._to_copy"),
    "time limit": (Model, {"time_limit": -1.0}, ValueError, r"time_limit must be .*got -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused(name):
    make, options, error, message = CASES[name]
    torch.manual_seed(0)
    model = make()
    options = {"inputs": X, "budget": "90%"} | options
    state = None
    if isinstance(model, nn.Module):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        state = copy.deepcopy(model.state_dict())
        grads = [p.grad for p in model.parameters()]
    random = torch.get_rng_state()
    with pytest.raises(error, match=r"(?s)recompute.*" + message):
        recompute.plan(model, options.pop("inputs"), **options)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(X, torch.ones(4, 8))
    if state is not None:
        assert all(m._compiled_call_impl is None and m.training for m in model.modules())
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
        assert all(g is None or bool((g == 1).all()) for g in grads)


def test_a_plan_for_another_model():
    case = gpt(dim=16)
    plan = recompute.plan(case.model, case.inputs, loss_fn=case.loss_fn, budget="90%")
    for other, message in (
        (gpt(dim=32).model, r"another model, whose block 'blocks\.0' had parameters .*not .*96"),
        (gpt(dim=16, layers=3).model, r"another model: GPT has no block 'blocks\.3'"),
        (Model(), r"another model: Model has no block 'blocks\.0'"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.apply(other)
        assert all(m._compiled_call_impl is None for m in other.modules())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        plan.apply("model")
    plan.apply()
    case.loss().backward()


def test_a_model_that_calls_its_blocks_in_another_order_afterwards():
    model = Model()
    plan = recompute.plan(model, X, budget="least")
    plan.apply()
    order = list(model.layers)
    model.layers = nn.ModuleList([order[1], order[0], *order[2:]])
    with pytest.raises(RuntimeError, match="make a new plan"):
        model(X)


@pytest.mark.parametrize("selective", [None, 0, "all", [None]])
def test_profile_refuses(selective):
    with pytest.raises(TypeError, match=r"recompute\.profile: selective must be a bool or a collection of operators"):
        recompute.profile(Model(), X, selective=selective)


@pytest.mark.parametrize("points", [1, 0, -3, 2.0, True, "5"])
def test_pareto_refuses(points):
    chain = recompute.ChainProfile.from_lists(forward=[1], backward=[2], output_bytes=[3], saved_bytes=[4])
    with pytest.raises(ValueError, match=r"recompute\.pareto: points must be an int >= 2, got"):
        recompute.pareto(chain, points)


def test_profiles_by_hand_refuse():
    good = {"forward": [1, 1], "backward": [2, 2], "output_bytes": [3, 3], "saved_bytes": [4, 4]}
    for change, message in (
        ({"backward": [2]}, r"from_lists: backward must have 2 entries, as forward has, got 1"),
        ({"forward": [-1, 1]}, r"block 0 must be finite and >= 0"),
        ({"backward": [1, float("nan")]}, r"block 1 must be finite and >= 0"),
        ({"forward": [], "backward": [], "output_bytes": [], "saved_bytes": []}, r"at least one block, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            recompute.ChainProfile.from_lists(**(good | change))
