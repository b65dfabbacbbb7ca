"""The layers of a flow and their stack: inverses, log-dets, gradients of every save mode, and what each keeps."""

import copy
import functools
import math
import pickle

import pytest
import torch
from torch import nn

import pyperf_dl
from pyperf_dl import ActNorm, AdditiveCoupling, AffineCoupling, Flow, InvertibleConv1x1, SplineCoupling
from pyperf_dl.reference import coupling as reference

SAVE = ("x", "recompute_params", "nothing")
ALTERNATING = torch.tensor([True, False] * 3)
IRREGULAR = torch.tensor([True, False, False, True, True, False])
MASKS = {"halves": None, "alternating": ALTERNATING, "irregular": IRREGULAR, "ends": IRREGULAR.roll(1)}
SHAPES = {"[B, D]": (3, 6), "[B, C, T]": (3, 6, 4), "[B, C, H, W]": (2, 6, 2, 3)}


class Conditioner(nn.Module):
    """One hidden layer at every position; `apart`: the parameters of a feature in a dimension of their own."""

    def __init__(self, inputs, outputs, rank=2, per_feature=None, context=0, scale=1.0, dropout=0.0):
        super().__init__()
        kind = {2: nn.Linear, 3: lambda i, o: nn.Conv1d(i, o, 1), 4: lambda i, o: nn.Conv2d(i, o, 1)}[rank]
        self.layers = nn.Sequential(kind(inputs + context, 8), nn.Tanh(), nn.Dropout(dropout), kind(8, outputs))
        self.per_feature, self.scale = per_feature, scale

    def forward(self, x, context=None):
        raw = self.layers(x if context is None else torch.cat([x, context], 1)) * self.scale
        return raw if self.per_feature is None else raw.unflatten(1, (-1, self.per_feature))


class Returning(nn.Module):
    """A conditioner that says the same whatever it sees."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


KINDS = {
    "additive": (AdditiveCoupling, {}, 1),
    "affine": (AffineCoupling, {"activation": "tanh", "clamp": 1.5}, 2),
    "affine exp": (AffineCoupling, {"clamp": 3.0, "parameters": "shift_scale", "order": "shift_scale"}, 2),
    "affine sigmoid": (AffineCoupling, {"activation": "sigmoid", "layout": "interleaved"}, 2),
    "affine floor": (AffineCoupling, {"activation": "softplus", "min_scale": 1e-3, "max_scale": 3.0}, 2),
    "affine volume": (AffineCoupling, {"clamp": 3.0, "volume_preserving": True}, 2),
    "spline": (SplineCoupling, {"bins": 5, "tail_bound": 3.0}, 14),
    "spline circular": (SplineCoupling, {"bins": 4, "tails": "circular", "tail_bound": 3.0, "layout": "halves"}, 12),
    "spline bounded": (SplineCoupling, {"bins": 3, "tails": "bounded", "bounds": (-4.0, 4.0, -3.0, 2.0)}, 10),
    "spline by feature": (SplineCoupling, None, 12),
}


def by_feature(features):
    """A box and tails for each of them."""
    tails = [("circular", "linear")[i % 2] for i in range(features)]
    return {"bins": 4, "tails": tails, "tail_bound": 1.5 + torch.arange(float(features)) / 2}


def coupling(kind, shape=(3, 6), mask=None, apart=False, context=0, scale=1.0, dropout=0.0, seed=0, **how):
    torch.manual_seed(seed)
    cls, options, count = KINDS[kind]
    moved = int(mask.sum()) if mask is not None else shape[1] // 2
    options = by_feature(moved) if options is None else options
    rank = len(shape)
    conditioner = Conditioner(shape[1] - moved, moved * count, rank, count if apart else None, context, scale, dropout)
    return cls(conditioner, mask=mask, **options, **how)


def sample(shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def check_invertible(layer, x, context=None, atol=1e-9, **how):
    y, logdet = layer(x, context, **how)
    back, negative = layer.inverse(y, context, **how)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert logdet.shape == negative.shape == x.shape[:1]
    assert logdet.dtype == reference.logdet_dtype(x)
    torch.testing.assert_close(back, x, rtol=0, atol=atol)
    torch.testing.assert_close(negative, -logdet, rtol=0, atol=10 * atol)
    return y, logdet


def check_jacobian(call, x):
    """The log-det of every sample against that of autograd's Jacobian."""
    _, logdet = call(x)
    for i in range(len(x)):
        jacobian = torch.func.jacrev(lambda row: call(row)[0])(x[i : i + 1])
        n = x[i].numel()
        torch.testing.assert_close(torch.linalg.slogdet(jacobian.reshape(n, n))[1], logdet[i], rtol=1e-9, atol=1e-9)


# ---- values ----


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_couplings_are_invertible_and_leave_the_rest_alone(kind, shape, mask):
    shape, mask = SHAPES[shape], MASKS[mask]
    layer, x = coupling(kind, shape, mask).double(), sample(shape)
    y, _ = check_invertible(layer, x)
    moved = mask if mask is not None else torch.arange(6) >= 3
    assert torch.equal(y[:, ~moved], x[:, ~moved])
    assert (y[:, moved] != x[:, moved]).any()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_log_det_of_couplings_is_that_of_the_jacobian(kind, shape, apart):
    shape = SHAPES[shape]
    layer = coupling(kind, shape, ALTERNATING, apart).double()
    check_jacobian(layer, sample(shape))
    check_jacobian(layer.inverse, sample(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_and_tails_are_those_of_the_transformed_features(shape):
    """Along dim 1, in order: as layers for one feature each."""
    shape = SHAPES[shape]
    layer, x = coupling("spline by feature", shape, ALTERNATING).double(), sample(shape)
    y, logdet = layer(x)
    raw = layer.conditioner(x[:, ~ALTERNATING]).unflatten(1, (3, 12)).movedim(2, -1)
    total = 0.0
    for i, channel in enumerate(ALTERNATING.nonzero().flatten().tolist()):
        tails, bound = layer.options["tails"][i], layer.tail_bound[i].item()
        params = raw[:, i] if tails == "circular" else torch.cat([raw[:, i, ..., :8], raw[:, i, ..., 9:]], -1)
        want, part = pyperf_dl.rational_quadratic_spline_packed(
            x[:, channel], params, 4, tails=tails, tail_bound=bound, logdet="sum"
        )
        torch.testing.assert_close(y[:, channel], want)
        total = total + part
    torch.testing.assert_close(logdet, total)
    assert "tail_bound" not in layer.state_dict()
    assert layer.float().tail_bound.dtype == torch.float32
    assert "tails=('circular', 'linear', 'circular')" in repr(layer)


@pytest.mark.parametrize("swap", [False, True])
def test_halves(swap):
    layer = AdditiveCoupling(nn.Linear(2 if not swap else 3, 3 if not swap else 2), swap=swap)
    x = sample((4, 5), torch.float32)
    y, _ = check_invertible(layer, x, atol=1e-6)
    moved = slice(0, 2) if swap else slice(2, 5)
    other = slice(2, 5) if swap else slice(0, 2)
    assert torch.equal(y[:, other], x[:, other])
    assert torch.equal(y[:, moved], x[:, moved] + layer.conditioner(x[:, other]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_layouts_say_the_same(kind, shape):
    """Halves, interleaved, apart and shared parameters, as the formulas of the functions read them."""
    shape = SHAPES[shape]
    cls, options, count = KINDS[kind]
    options = {name: value for name, value in options.items() if name != "layout"}
    x = sample(shape)
    apart = sample((shape[0], 3, count, *shape[2:]), seed=5)  # [B, C, P, ...]

    def result(raw, **how):
        return cls(Returning(raw), **options, **how)(x)

    want = result(apart)
    params = apart.movedim(2, -1)
    if kind == "affine":
        y, logdet = pyperf_dl.affine_coupling(x[:, 3:], params[..., 0], params[..., 1], **options)
    else:
        y, logdet = pyperf_dl.rational_quadratic_spline_packed(x[:, 3:], params, logdet="sum", **options)
    assert torch.equal(want[0], torch.cat([x[:, :3], y], 1))
    assert torch.equal(want[1], logdet)
    packed = {"interleaved": apart.flatten(1, 2), "halves": apart.transpose(1, 2).flatten(1, 2)}
    for layout, raw in packed.items():
        for got, expected in zip(result(raw, layout=layout), want, strict=True):
            assert torch.equal(got, expected)
    one = apart[:1] if len(shape) == 2 else apart[:1].mean(tuple(range(3, apart.dim())), keepdim=True)
    shared = one.expand(apart.shape)
    flat = one.flatten(1, 2)
    for raw in (one, flat, flat.flatten()):
        for got, expected in zip(result(raw, layout="interleaved"), result(shared), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_parameters_are_views_of_what_the_conditioner_returns():
    for kind in ("affine", "affine sigmoid", "spline", "spline circular"):
        layer, x = coupling(kind, (2, 6, 2, 3)), sample((2, 6, 2, 3), torch.float32)
        untouched, part = layer._split(x)
        raw = layer.conditioner(untouched)
        layer.conditioner.forward = lambda untouched, raw=raw: raw
        params = layer._parameters_of(untouched, part, None)
        assert params.untyped_storage().data_ptr() == raw.untyped_storage().data_ptr()
        assert part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_everything_transformed_by_the_context_alone(kind):
    mask = torch.ones(2, dtype=torch.bool)
    layer = coupling(kind, (3, 2), mask, context=4).double()
    x, context = sample((3, 2)), sample((3, 4), seed=2)
    check_invertible(layer, x, context)
    check_jacobian(lambda row: layer(row, context[: len(row)]), x[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    flow = Flow([coupling("affine"), coupling("spline", swap=True), ActNorm(6), InvertibleConv1x1(6)])
    x = sample((5, 6), dtype)
    z, logdet = flow.to(dtype)(x)
    assert z.dtype == dtype
    assert logdet.dtype == torch.float32
    assert flow.log_prob(x).dtype == torch.float32
    assert flow.sample((5, 6)).dtype == dtype


def test_channels_last_stays():
    x = sample((2, 6, 4, 4), torch.float32).to(memory_format=torch.channels_last)
    for layer in (coupling("affine", x.shape), ActNorm(6), InvertibleConv1x1(6)):
        y, _ = layer(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, copy.deepcopy(layer)(x.contiguous())[0])


@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 3), (2, 6, 0)])
def test_empty(shape):
    layers = [ActNorm(6), InvertibleConv1x1(6)]
    if shape[-1]:  # torch's convolutions take no empty rows
        layers += [coupling(kind, shape) for kind in KINDS]
    for layer in layers:
        for call in (layer, layer.inverse):
            y, logdet = call(torch.zeros(shape))
            assert y.shape == shape
            assert torch.equal(logdet, torch.zeros(shape[0]))


# ---- sample masks ----


@pytest.mark.parametrize("make", [lambda m: m, lambda m: m.double()], ids=["bool", "float"])
@pytest.mark.parametrize("kind", [*KINDS, "actnorm", "conv"])
def test_masked_elements_pass_and_add_nothing(kind, make):
    shape = (3, 6, 5)
    x, lengths = sample(shape), torch.tensor([5, 2, 0])
    mask = torch.arange(5) < lengths[:, None, None]  # [B, 1, T]
    if kind in KINDS:
        layer = coupling(kind, shape).double()
    else:
        layer = (ActNorm(6) if kind == "actnorm" else InvertibleConv1x1(6)).double()
        layer(x)
    y, logdet = check_invertible(layer, x, sample_mask=make(mask))
    assert torch.equal(y.masked_select(~mask), x.masked_select(~mask))
    assert logdet[2] == 0
    for i, n in enumerate(lengths[:2]):
        alone, part = layer(x[i : i + 1, :, :n])
        torch.testing.assert_close(y[i, :, :n], alone[0])
        torch.testing.assert_close(logdet[i], part[0])
    whole = layer(x, sample_mask=torch.ones(1, 1, 1, dtype=torch.bool))
    for got, want in zip(whole, layer(x), strict=True):
        torch.testing.assert_close(got, want)


def test_log_prob_leaves_masked_elements_out():
    flow = Flow([coupling("affine", (3, 6, 5))])
    x = sample((3, 6, 5), torch.float32)
    mask = torch.ones(3, 1, 5)
    mask[:, :, 2:] = 0
    torch.testing.assert_close(flow.log_prob(x, sample_mask=mask), flow.log_prob(x[:, :, :2]))
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(
        Flow(flow.layers, normal).log_prob(x, sample_mask=mask), flow.log_prob(x, sample_mask=mask)
    )


# ---- gradients and memory of the save modes ----


def gradients(layer, x, context=None, inverse=False, **how):
    """Of a loss that uses y and the log-det, for x, the context and all parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, context) if t is not None]
    y, logdet = (layer.inverse if inverse else layer)(*leaves, **how)
    weights = sample(y.shape, torch.float32, 9).to(y.dtype)
    loss = (y * weights).sum() + (logdet * torch.linspace(0.5, 2, len(logdet), dtype=logdet.dtype)).sum()
    return torch.autograd.grad(loss, leaves + list(layer.parameters()))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("mask", ["halves", "alternating", "irregular"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_save_mode_has_the_same_gradients(kind, mask, inverse):
    shape, mask = (3, 6, 4), MASKS[mask]
    x, context = sample(shape), sample((3, 2, 4), seed=3)
    found = [
        gradients(coupling(kind, shape, mask, context=2, save=save).double(), x, context, inverse) for save in SAVE
    ]
    for want, recomputed, rebuilt in zip(*found, strict=True):
        assert torch.equal(recomputed, want)
        torch.testing.assert_close(rebuilt, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["additive", "affine", "spline"])
def test_save_modes_in_float32_with_a_sample_mask(kind):
    shape = (3, 6, 4)
    mask = torch.arange(4) < torch.tensor([4, 2, 1])[:, None, None]
    found = []
    for save in SAVE:
        layer = coupling(kind, shape, scale=0.3, save=save)
        found.append(gradients(layer, sample(shape, torch.float32), sample_mask=mask))
    for want, recomputed, rebuilt in zip(*found, strict=True):
        assert torch.equal(recomputed, want)
        torch.testing.assert_close(rebuilt, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("save", SAVE[1:])
def test_randomness_is_drawn_again(save):
    layers = [coupling("affine", dropout=0.5, save=mode, seed=7) for mode in ("x", save)]
    flows = [Flow([layer, copy.deepcopy(layer)]).double() for layer in layers]
    found = []
    for flow in flows:
        torch.manual_seed(3)
        found.append(gradients(flow, sample((40, 6))))
        found[-1] = (*found[-1], torch.rand(3))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    assert torch.equal(found[0][-1], found[1][-1])


@pytest.mark.parametrize("kind", ["additive", "affine", "spline"])
def test_autocast(kind):
    """x stays float32 and the parameters come in bfloat16, in the backward too."""
    found = []
    for save in SAVE:
        layer, seen = coupling(kind, scale=0.3, save=save), []
        layer.conditioner.layers[2].register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].dtype)
        )
        with torch.autocast("cpu", torch.bfloat16):
            y, logdet = layer(sample((5, 6), torch.float32).requires_grad_())
        assert y.dtype == logdet.dtype == torch.float32
        (y.sum() + logdet.sum()).backward()
        assert seen == [torch.bfloat16] * (1 + SAVE.index(save))
        found.append([p.grad for p in layer.parameters()])
    for want, recomputed, rebuilt in zip(*found, strict=True):
        assert torch.equal(recomputed, want)
        torch.testing.assert_close(rebuilt, want, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_nothing_without_gradient_behind():
    """The cast of a weight that the forward makes without grad is not what the next use in the region finds."""
    layer = coupling("affine", save="nothing")
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(sample((5, 6), torch.float32))
        out = layer.conditioner(y[:, :3].detach())
    out.sum().backward()
    assert layer.conditioner.layers[0].weight.grad is not None


def saved_bytes(call, *apart):
    """Bytes of the distinct memory that autograd keeps, without that of the tensors in `apart`."""
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    for t in apart:
        found.pop(t.untyped_storage().data_ptr(), None)
    del out
    return sum(found.values())


@pytest.mark.parametrize("mask", ["halves", "alternating"])
@pytest.mark.parametrize("kind", ["additive", "affine", "spline"])
def test_saved_bytes(kind, mask):
    shape, mask = (64, 6, 16), MASKS[mask]
    x = sample(shape, torch.float32).requires_grad_()
    kept = {}
    for save in SAVE:
        layer = coupling(kind, shape, mask, scale=0.1, save=save)
        kept[save] = saved_bytes(lambda layer=layer: layer(x), *layer.parameters())
    untouched = layer._split(x)[0].detach().requires_grad_()
    conditioner = saved_bytes(lambda: layer.conditioner(untouched), untouched, *layer.parameters())
    size = x.numel() * 4
    assert kept["x"] <= size + size // 2 * KINDS[kind][2] + conditioner
    assert kept["recompute_params"] == size
    assert kept["nothing"] == size


def test_a_run_keeps_only_its_last_output():
    def flow(depth):
        layers = [ActNorm(6, save="nothing"), InvertibleConv1x1(6, save="nothing")]
        layers += [coupling("affine", save="nothing", swap=i % 2 == 1, seed=i) for i in range(depth)]
        return Flow(layers)

    x = sample((50, 6), torch.float32).requires_grad_()
    kept = [saved_bytes(functools.partial(flow(depth), x)) for depth in (1, 4)]
    assert kept == [x.numel() * 4] * 2


def test_gradients_of_a_deep_run():
    def flow(save):
        layers = []
        for i in range(4):
            rest = "nothing" if save == "nothing" else "x"
            layers += [ActNorm(6, save=rest), InvertibleConv1x1(6, save=rest)]
            layers += [
                coupling("affine", save=save, seed=i, context=2),
                coupling("spline", swap=True, save=save, context=2),
            ]
        torch.manual_seed(0)
        for layer in layers:
            if isinstance(layer, InvertibleConv1x1):
                layer.load_state_dict(InvertibleConv1x1(6).state_dict())
        return Flow(layers).double()

    x, context = sample((7, 6)), sample((7, 2), seed=4)
    found = [gradients(flow(save), x, context) for save in SAVE]
    for want, recomputed, rebuilt in zip(*found, strict=True):
        assert torch.equal(recomputed, want)
        torch.testing.assert_close(rebuilt, want, rtol=1e-6, atol=1e-7)


def test_contexts_of_any_structure():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 6)

        def forward(self, x, context):
            return self.linear(x) * context["a"][0] + context["a"][1] * context["factor"]

    grads = []
    for save in SAVE:
        torch.manual_seed(0)
        layer = AffineCoupling(Scaled(), clamp=2.0, save=save).double()
        a, b = (sample((4, 6), seed=i).requires_grad_() for i in (1, 2))
        y, logdet = layer(sample((4, 6)), {"a": (a, b.detach()), "factor": 0.5})
        (y.sum() + logdet.sum()).backward()
        grads.append(a.grad)
        assert b.grad is None
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


def affine(i, save, scale=1.0, by=0.0, **options):
    """`by` is added to every shift."""
    torch.manual_seed(i)
    conditioner = Conditioner(3, 6, scale=scale)
    with torch.no_grad():
        conditioner.layers[-1].bias[3:] += by
    return AffineCoupling(conditioner, swap=i % 2 == 1, save=save, **options)


def swapped(kind, i, save, scale=1.0):
    return coupling(kind, swap=i % 2 == 1, seed=i, save=save, scale=scale)


def mixed(i, save):
    """The kinds in turn, with conv and actnorm in between."""
    if i % 3 < 2:
        torch.manual_seed(i)
        layer = (ActNorm(6, save=save, initialise=False), InvertibleConv1x1(6, save=save))[i % 3]
        with torch.no_grad():
            (layer.log_scale if i % 3 == 0 else layer.upper).add_(torch.randn(6) / 2)
        return layer
    return swapped(("spline", "affine", "affine sigmoid", "additive")[i // 3 % 4], i // 3, save)


def contracting(i, save):
    layer = ActNorm(6, save=save, initialise=False)
    with torch.no_grad():
        layer.log_scale[0] = -3.0
        layer.bias[0] = 1.0
    return layer


# Layer i of a stack; what depth surely passes forward in float32, and from where on nothing does.
STACKS = {
    "additive": (functools.partial(swapped, "additive"), 12, 99),
    "additive, steep": (functools.partial(swapped, "additive", scale=30.0), 2, 8),
    "exp": (affine, 12, 99),
    "exp, steep": (functools.partial(affine, scale=3.0), 2, 8),
    "exp, shifted by 1e3": (functools.partial(affine, by=1e3), 1, 6),
    "exp, shifted by 1e7": (functools.partial(affine, by=1e7), 0, 1),
    "tanh, 2": (functools.partial(affine, scale=3.0, activation="tanh"), 6, 12),
    "tanh, 6.5": (functools.partial(affine, scale=3.0, activation="tanh", clamp=6.5), 1, 4),
    "tanh, 12": (functools.partial(affine, scale=3.0, activation="tanh", clamp=12.0), 0, 2),
    "sigmoid": (functools.partial(affine, scale=3.0, activation="sigmoid"), 12, 99),
    "volume": (functools.partial(affine, volume_preserving=True, order="shift_scale"), 12, 99),
    "spline": (functools.partial(swapped, "spline"), 12, 99),
    "spline, steep": (functools.partial(swapped, "spline", scale=4.0), 0, 2),
    "spline, very steep": (functools.partial(swapped, "spline", scale=20.0), 0, 1),
    "mixed": (mixed, 8, 99),
    "actnorm": (contracting, 2, 6),
}


def relative(got, want):
    """The largest error in norm of a tensor of gradients, relative to it."""
    return max((a.double() - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stack", STACKS)
def test_what_passes_the_guard_has_the_gradients_of_save_x(stack, dtype, inverse):
    """Beyond what arithmetic in that dtype loses anyway, each is as near to float64 as x has to come back."""
    layer, surely, never = STACKS[stack]
    x = sample((64, 6), torch.float32).to(dtype)
    for depth in (1, 2, 4, 6, 8, 12):
        kept, rebuilt = (Flow([layer(i, save) for i in range(depth)]).to(dtype) for save in ("x", "nothing"))
        try:
            got = gradients(rebuilt, x, inverse=inverse)
        except RuntimeError:
            assert inverse or dtype == torch.float64 or depth > surely
            continue
        assert inverse or dtype == torch.float64 or depth < never
        truth = gradients(copy.deepcopy(kept).double(), x.double(), inverse=inverse)
        own = relative(gradients(kept, x, inverse=inverse), truth)
        assert relative(got, truth) <= 3 * own + math.sqrt(torch.finfo(dtype).eps), depth


def test_the_guard_judges_the_run_and_nothing_else():
    x, steep = sample((50, 6), torch.float32), swapped("spline", 0, "nothing", 60.0)
    message = r"^SplineCoupling: save='nothing' .*run \(1\).* must be <= 3\.5e-04 .*float32, got \d"
    with pytest.raises(RuntimeError, match=message):
        steep(x)
    with torch.no_grad():
        steep(x)
    steep.save = "recompute_params"
    steep(x)
    with pytest.raises(RuntimeError, match=r"run \(12\)"):
        Flow([affine(i, "nothing", 3.0, activation="tanh", clamp=6.5) for i in range(12)])(x)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_the_guard_takes_every_x(value):
    """Zeros have no size, and what is not finite does not come back."""
    x = sample((50, 6), torch.float32)
    gentle, far = affine(0, "nothing"), affine(0, "nothing", by=1e7)
    gentle(torch.full_like(x, value))
    affine(0, "nothing").to("meta")(x.to("meta"))
    x[0] = value
    gentle(x)
    x[:, 3] = value
    gentle(x)
    with pytest.raises(RuntimeError, match="save='nothing'"):
        far(x)
    with pytest.raises(RuntimeError, match=r"got (nan|inf)"):
        affine(0, "nothing", 1e3)(x.nan_to_num(1.0, 1.0) * 1e30)


def test_the_guard_under_autocast():
    """An error of x that turns one rounding of a 16-bit network is an error of 16 bits, in every save mode."""
    flow, x = Flow([affine(i, "nothing") for i in range(8)]), sample((20000, 6), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        flow(x)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"must be <= 8\.8e-02"):
        Flow([affine(i, "nothing", by=1e7) for i in range(2)])(x)


def test_the_guard_does_not_initialise():
    """A run that is inverted first has rebuilt values in its forward direction, which are no first batch."""
    flow, x = Flow([ActNorm(6, save="nothing"), affine(0, "nothing")]), sample((20, 6), torch.float32)
    gradients(flow, x, inverse=True)
    assert not flow.layers[0].initialised


def test_parameters_that_changed_are_noticed():
    layer = coupling("affine", save="nothing")
    y, _ = layer(sample((3, 6), torch.float32))
    with torch.no_grad():
        next(layer.parameters()).add_(1)
    with pytest.raises(RuntimeError, match=r"AffineCoupling: save='nothing' .*changed or replaced"):
        y.sum().backward()
    other = coupling("affine", seed=3)
    y, _ = torch.func.functional_call(layer, dict(other.named_parameters()), sample((3, 6), torch.float32))
    with pytest.raises(RuntimeError, match="changed or replaced"):
        y.sum().backward()


@pytest.mark.parametrize("save", SAVE)
def test_torch_func(save):
    layer, x = coupling("affine", save=save).double(), sample((4, 6))
    parameters = dict(layer.named_parameters())

    def loss(parameters, row):
        y, logdet = torch.func.functional_call(layer, parameters, row[None])
        return y.square().sum() + logdet.sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    total = torch.autograd.grad(sum(loss(parameters, row) for row in x), list(parameters.values()))
    for name, want in zip(parameters, total, strict=True):
        torch.testing.assert_close(each[name].sum(0), want)
    direction = sample((4, 6), seed=2)
    tangent = torch.func.jvp(lambda x: layer(x)[0], (x,), (direction,))[1]
    jacobian = torch.func.jacrev(lambda x: layer(x)[0])(x)
    torch.testing.assert_close(tangent, torch.einsum("ijkl,kl->ij", jacobian, direction))


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("kind", ["additive", "affine", "spline"])
def test_gradcheck(kind, save):
    layer, x = coupling(kind, (2, 6), ALTERNATING, save=save).double(), sample((2, 6)).requires_grad_()
    torch.autograd.gradcheck(lambda x: layer(x), x)
    torch.autograd.gradcheck(lambda x: layer.inverse(x), x)


@pytest.mark.parametrize("save", SAVE[:2])
def test_twice_differentiable(save):
    layer = coupling("affine", (2, 6), save=save).double()
    torch.autograd.gradgradcheck(lambda x: layer(x), sample((2, 6)).requires_grad_())


def test_rebuilding_is_differentiable_once():
    x = sample((2, 6), torch.float32).requires_grad_()
    y, _ = coupling("affine", save="nothing")(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- determinism ----

OPERATORS = {
    "spline": lambda x, p, **how: pyperf_dl.rational_quadratic_spline_packed(x, p, 8, tail_bound=3.0, **how),
    "affine": lambda x, p, **how: pyperf_dl.affine_coupling(x, p[..., 0], p[..., 1], activation="tanh", **how),
    "additive": lambda x, p, **how: pyperf_dl.additive_coupling(x, p[..., 0], **how),
}


def same_bits(got, want):
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(300, 11), (3, 2500)], ids=["units of samples", "samples in pieces"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_deterministic(name, shape, inverse):
    """100 times forward and backward by one thread and by two."""
    x, p = sample(shape, torch.float32).requires_grad_(), sample((*shape, 23), torch.float32, 2).requires_grad_()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for _ in range(100):
            y, logdet = OPERATORS[name](x, p, inverse=inverse, logdet="sum")
            grads = torch.autograd.grad((y, logdet), (x, p), (y.detach().cos(), logdet.detach().cos()))
            results.append((y, logdet, *grads))
            assert same_bits(results[-1], results[0]), threads


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("save", SAVE)
def test_layers_are_deterministic(save, threads):
    """The networks in between are torch's, for one number of threads."""
    torch.set_num_threads(threads)
    shape, kinds = (3, 6, 400), ("affine", "spline", "additive")
    layers = [coupling(kind, shape, swap=i % 2 == 1, save=save) for i, kind in enumerate(kinds)]
    rest = "nothing" if save == "nothing" else "x"
    flow = Flow([ActNorm(6, save=rest), InvertibleConv1x1(6, save=rest), *layers])
    x = sample(shape, torch.float32)
    flow(x)
    want = gradients(flow, x)
    for _ in range(100):
        assert same_bits(gradients(flow, x), want)


# ---- actnorm and the 1x1 convolution ----


@pytest.mark.parametrize("shape", SHAPES)
def test_channel_functions_agree_with_the_reference(shape):
    shape = SHAPES[shape]
    x, a, b = sample(shape), sample((6,), seed=2), sample((6,), seed=3)
    matrices = sample((6, 6), seed=4), sample((6, 6), seed=5), a, torch.randperm(6), torch.ones(6).double()
    matrices[-1][::2] = -1
    for inverse in (False, True):
        for f, g, args in (
            (pyperf_dl.actnorm, reference.actnorm, (x, a, b)),
            (pyperf_dl.invertible_conv1x1, reference.invertible_conv1x1, (x, *matrices)),
        ):
            for got, want in zip(f(*args, inverse=inverse), g(*args, inverse), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
            strided = x.mT.contiguous().mT if len(shape) > 2 else torch.stack([x, x], -1)[..., 0]
            torch.testing.assert_close(f(strided, *args[1:], inverse=inverse)[0], f(*args, inverse=inverse)[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cls", [ActNorm, InvertibleConv1x1])
def test_channel_layers(cls, shape):
    layer, x = cls(6).double(), sample(SHAPES[shape]) * 3 + 1
    layer(x)
    check_invertible(layer, x)
    check_jacobian(layer, x)
    check_jacobian(layer.inverse, x)
    torch.autograd.gradcheck(layer, x.clone().requires_grad_())
    torch.autograd.gradcheck(layer.inverse, x.clone().requires_grad_())


def test_conv_inverse_is_good_in_float32():
    torch.manual_seed(0)
    layer, x = InvertibleConv1x1(48), sample((10, 48, 7), torch.float32)
    check_invertible(layer, x, atol=2e-5)
    eye = torch.eye(48)
    torch.testing.assert_close(layer.weight() @ layer.weight(inverse=True), eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.weight() @ layer.weight().mT, eye, rtol=0, atol=1e-5)
    assert abs(layer(x)[1]).max() < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x)[0], layer(x)[0].float())
        check_invertible(layer, x, atol=2e-5)


def test_actnorm_starts_from_the_first_training_batch():
    x = sample((200, 3, 4), torch.float32) * torch.tensor([1.0, 5.0, 0.0])[:, None] + 2
    layer = ActNorm(3)
    layer.eval()
    assert torch.equal(layer(x)[0], x)
    layer.inverse(x)
    assert not layer.initialised
    layer.train()
    y, logdet = layer(x)
    assert layer.initialised
    torch.testing.assert_close(y.mean((0, 2)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std((0, 2), unbiased=False)[:2], torch.ones(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logdet[0], 4 * layer.log_scale.sum())
    before = layer.log_scale.clone()
    layer(x * 3)
    assert torch.equal(layer.log_scale, before)


def test_actnorm_that_was_loaded_keeps_its_parameters():
    x = sample((50, 3), torch.float32)
    first, second, third = ActNorm(3), ActNorm(3), ActNorm(3)
    first(x * 5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(x)[0], first(x)[0])
    third(x)
    third.load_state_dict(ActNorm(3).state_dict())  # back to the start: the next batch counts
    third(x * 5)
    torch.testing.assert_close(third.log_scale, first.log_scale)


def test_actnorm_starts_from_unmasked_elements():
    x = sample((20, 3, 8), torch.float32)
    mask = torch.arange(8) < 5
    x[..., 5:] = math.inf
    layer, other = ActNorm(3), ActNorm(3)
    layer(x, sample_mask=mask.expand(20, 1, 8) & False)
    assert not layer.initialised
    layer(x, sample_mask=mask.expand(20, 1, 8))
    other(x[..., :5])
    torch.testing.assert_close(layer.log_scale, other.log_scale)
    torch.testing.assert_close(layer.bias, other.bias)
    assert layer.initialised


def test_actnorm_starts_without_reading_back():
    """On meta tensors every read of a value raises."""
    layer = ActNorm(3).to("meta")
    layer(torch.zeros(4, 3, device="meta"))
    layer(torch.zeros(4, 3, 2, device="meta"), sample_mask=torch.ones(4, 1, 2, dtype=torch.bool, device="meta"))


# ---- flows ----


def small_flow(dim=6, **how):
    layers = [ActNorm(dim), InvertibleConv1x1(dim)]
    layers += [coupling("affine", (1, dim), **how), coupling("spline", (1, dim), swap=True, **how)]
    return Flow(layers, event_shape=(dim,))


def test_log_prob_of_known_maps():
    """An affine map of a normal density is a normal density."""
    shift, log_scale = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, -0.3]).double()
    layer = ActNorm(2, initialise=False).double()
    with torch.no_grad():
        layer.log_scale.copy_(-log_scale)
        layer.bias.copy_(-shift * (-log_scale).exp())
    x = sample((10, 2))
    want = torch.distributions.Normal(shift, log_scale.exp()).log_prob(x).sum(1)
    torch.testing.assert_close(Flow([layer]).log_prob(x), want)

    conv = InvertibleConv1x1(2).double()
    with torch.no_grad():
        conv.log_diagonal.add_(0.7)
        conv.upper.add_(0.4)
    covariance = conv.weight(inverse=True) @ conv.weight(inverse=True).mT
    normal = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance)
    torch.testing.assert_close(Flow([conv]).log_prob(x), normal.log_prob(x))
    base = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    torch.testing.assert_close(Flow([conv], base).log_prob(x), normal.log_prob(x))
    wide = torch.distributions.Normal(torch.zeros(2).double(), 2.0)
    want = torch.distributions.Normal(shift, 2 * log_scale.exp()).log_prob(x).sum(1)
    torch.testing.assert_close(Flow([layer], wide).log_prob(x), want)


def test_a_flow_is_a_layer():
    flow = Flow([small_flow(), small_flow()]).double()
    x = sample((9, 6))
    flow(x)
    check_invertible(flow, x, atol=1e-8)
    check_jacobian(flow, x[:2])
    middle, first = flow.layers[0](x)
    z, second = flow.layers[1](middle)
    torch.testing.assert_close(flow(x)[1], first + second)
    assert torch.equal(flow(x)[0], z)


def test_layers_of_the_user():
    class Flip(nn.Module):
        def forward(self, x):
            return x.flip(1), x.new_zeros(len(x))

        inverse = forward

    flow = Flow([coupling("affine"), Flip(), coupling("affine", seed=1)])
    check_invertible(flow, sample((4, 6), torch.float32), atol=1e-5)


def test_hooks_of_ordinary_layers_are_called():
    flow, seen = small_flow(), []
    for layer in flow.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(module))
    flow(sample((4, 6), torch.float32))
    assert seen == list(flow.layers)


def test_samples():
    flow = small_flow()
    flow(sample((50, 6), torch.float32))
    assert flow.sample(4).shape == flow.sample((4, 6)).shape == (4, 6)
    assert not flow.sample(4).requires_grad
    one, two = (flow.sample(4, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    z, _ = flow(one)
    torch.testing.assert_close(z, torch.randn(4, 6, generator=torch.Generator().manual_seed(5)), rtol=0, atol=1e-4)
    assert Flow(flow.layers).double().sample([3, 6]).dtype == torch.float64
    flow.float()
    normal = torch.distributions.Normal(torch.zeros(6), 1.0)
    assert Flow(flow.layers, normal).sample(3).shape == (3, 6)
    assert Flow(flow.layers, normal).sample((3, 6)).shape == (3, 6)
    assert Flow(flow.layers, torch.distributions.Normal(0.0, 1.0)).sample((3, 6)).shape == (3, 6)
    assert Flow(flow.layers, torch.distributions.MultivariateNormal(torch.zeros(6), torch.eye(6))).sample(3).shape == (
        3,
        6,
    )
    images = Flow([coupling("affine", (2, 6, 2, 3))], event_shape=(6, 2, 3))
    assert images.sample(2).shape == (2, 6, 2, 3)


def test_samples_have_the_density():
    """Where the flow puts mass is where it finds it: the mean of p(x) / q(x) under q is 1."""
    torch.manual_seed(0)
    flow = Flow(
        [coupling("affine", (1, 6), scale=0.5), coupling("spline", (1, 6), swap=True)], event_shape=(6,)
    ).double()
    x = flow.sample(20000, generator=torch.Generator().manual_seed(1))
    p = torch.distributions.Normal(0.0, 0.5).log_prob(x).sum(1)
    ratio = (p - flow.log_prob(x)).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))


class GeneratorBase:
    event_shape = (6,)

    def log_prob(self, z):
        return -z.abs().sum(1)

    def sample(self, sample_shape, generator=None):
        return torch.rand(*sample_shape, 6, generator=generator)


def test_a_base_of_the_user():
    flow = Flow([coupling("affine")], GeneratorBase())
    one, two = (flow.sample(3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two)
    assert flow.log_prob(one).shape == (3,)


def test_a_conditional_flow_learns():
    """p(x | c) = N(c, 0.5) in 2 dimensions."""
    torch.manual_seed(0)
    layers = []
    for swap in (False, True):
        layers.append(AffineCoupling(Conditioner(1, 2, context=2), activation="tanh", clamp=2.0, swap=swap))
    flow = Flow(layers, event_shape=(2,))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(300):
        context = torch.randn(256, 2)
        loss = -flow.log_prob(context + 0.5 * torch.randn(256, 2), context).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = 1 + math.log(2 * math.pi * 0.25)
    assert loss < entropy + 0.2
    context = torch.tensor([[1.0, -1.0]]).expand(2000, 2)
    drawn = flow.sample(2000, context)
    torch.testing.assert_close(drawn.mean(0), context[0], rtol=0, atol=0.15)


# ---- copies, state, compilation ----


@pytest.mark.parametrize("save", SAVE)
def test_copies_and_state(save):
    flow, x = small_flow(save=save), sample((30, 6), torch.float32)
    flow.layers.append(coupling("affine", mask=IRREGULAR, save=save))
    flow(x)
    want = flow(x)
    fresh = small_flow(save=save)
    fresh.layers.append(coupling("affine", mask=IRREGULAR, seed=8, save=save))
    state = flow.state_dict()
    assert "layers.0.initialised" in state
    assert not any("transformed" in name for name in state)
    fresh.load_state_dict(state)
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), fresh):
        for got, expected in zip(other(x), want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("save", SAVE)
def test_compiled_without_breaks_in_two_graphs(save):
    flow, graphs = small_flow(save=save), []
    flow(sample((30, 6), torch.float32))

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend=counted)
    for rows in (8, 13, 21):
        x = sample((rows, 6), torch.float32)
        got, want = compiled(x), flow.log_prob(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        found = [torch.autograd.grad(out.sum(), list(flow.parameters())) for out in (got, want)]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert len(graphs) <= 2


def test_compiled_initialisation():
    layer, other, x = ActNorm(3), ActNorm(3), sample((20, 3), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for scale in (2.0, 5.0):
        torch.testing.assert_close(compiled(x * scale)[0], other(x * scale)[0])
    torch.testing.assert_close(layer.log_scale, other.log_scale)


def test_parameter_counts():
    assert AdditiveCoupling.parameter_count(3) == 3
    assert AffineCoupling.parameter_count(3) == 6
    assert [SplineCoupling.parameter_count(2, 8, tails) for tails in reference.TAILS] == [46, 48, 50]
    assert SplineCoupling.parameter_count(2, 8, ["linear", "circular"]) == 48
    assert coupling("spline").params_per_feature == 14


# ---- bad input ----

I = nn.Identity()  # noqa: E741
HALF = torch.tensor([True, False])
X = torch.zeros(4, 2)

BAD_COUPLING = [
    (TypeError, "conditioner must be a torch.nn.Module", lambda f: f(torch.tanh)),
    (TypeError, "mask must be a bool tensor", lambda f: f(I, mask=torch.tensor([1, 0]))),
    (TypeError, "mask must be a bool tensor", lambda f: f(I, mask=[True, False])),
    (ValueError, "mask must have one dimension", lambda f: f(I, mask=HALF[None])),
    (ValueError, "mask must be True for at least one channel", lambda f: f(I, mask=HALF & False)),
    (ValueError, "swap .* got both", lambda f: f(I, mask=HALF, swap=True)),
    (TypeError, "swap must be a bool", lambda f: f(I, swap=1)),
    (ValueError, "save must be one of", lambda f: f(I, save="y")),
    (TypeError, "x must have one of the dtypes", lambda f: f(I)(X.long())),
    (ValueError, "x must have shape", lambda f: f(I)(X[0])),
    (ValueError, "at least 2 channels", lambda f: f(I)(X[:, :1])),
    (ValueError, "x must have the 2 channels of the mask", lambda f: f(I, mask=HALF)(torch.zeros(4, 3))),
    (ValueError, "sample_mask must have shape", lambda f: f(I)(X, sample_mask=torch.ones(4))),
    (ValueError, "sample_mask must have shape", lambda f: f(I)(X, sample_mask=torch.ones(4, 2))),
    (ValueError, "sample_mask must have shape", lambda f: f(I)(X, sample_mask=torch.ones(3, 1))),
    (TypeError, "sample_mask must have one of the dtypes", lambda f: f(I)(X, sample_mask=torch.ones(4, 1).long())),
    (ValueError, "sample_mask must be on the device", lambda f: f(I)(X, sample_mask=torch.ones(4, 1, device="meta"))),
    (ValueError, "conditioner must return a float tensor", lambda f: f(nn.Linear(1, 7))(X)),
    (ValueError, "conditioner must return a float tensor", lambda f: f(Returning(torch.zeros(3, 1)))(X)),
    (TypeError, "conditioner must return .* got None", lambda f: f(Returning(None))(X)),
    (TypeError, "save='nothing' .* float32 or float64", lambda f: f(I, save="nothing")(X.half())),
]
FACTORIES = {
    "AdditiveCoupling": AdditiveCoupling,
    "AffineCoupling": AffineCoupling,
    "SplineCoupling": lambda conditioner, **how: SplineCoupling(conditioner, 4, **how),
}


@pytest.mark.parametrize(("error", "message", "call"), BAD_COUPLING, ids=range(len(BAD_COUPLING)))
@pytest.mark.parametrize("name", FACTORIES)
def test_bad_couplings(name, error, message, call):
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        call(FACTORIES[name])


BAD = [
    (ValueError, "activation", lambda: AffineCoupling(I, activation="none")),
    (ValueError, "activation", lambda: AffineCoupling(I, activation="relu")),
    (ValueError, "order", lambda: AffineCoupling(I, order="scale")),
    (ValueError, "parameters must be one of", lambda: AffineCoupling(I, parameters="scale")),
    (ValueError, "layout must be one of", lambda: AffineCoupling(I, layout="quarters")),
    (ValueError, "clamp", lambda: AffineCoupling(I, clamp=-1.0)),
    (ValueError, "min_scale", lambda: AffineCoupling(I, min_scale=1e-3)),
    (ValueError, "max_scale", lambda: AffineCoupling(I, activation="softplus", max_scale=3.0)),
    (TypeError, "volume_preserving", lambda: AffineCoupling(I, volume_preserving="GIN")),
    (ValueError, r"2 parameters \(scale, shift\)", lambda: AffineCoupling(nn.Linear(1, 3))(X)),
    (ValueError, r"\[4, 2\] or \[4, 1, 2\]", lambda: AffineCoupling(nn.Linear(1, 3))(X)),
    (ValueError, "bins must be >= 1", lambda: SplineCoupling(I, 0)),
    (TypeError, "bins must be an int", lambda: SplineCoupling(I, 2.0)),
    (ValueError, "tails must be one of", lambda: SplineCoupling(I, 4, tails="cubic")),
    (ValueError, "tail_bound", lambda: SplineCoupling(I, 4, tail_bound=0.0)),
    (
        TypeError,
        "tail_bound must have one of the dtypes",
        lambda: SplineCoupling(I, 4, tail_bound=torch.tensor([1, 2])),
    ),
    (ValueError, "tail_bound must not require", lambda: SplineCoupling(I, 4, tail_bound=nn.Parameter(torch.ones(2)))),
    (
        ValueError,
        "tail_bound must be a number or broadcast",
        lambda: SplineCoupling(I, 4, tails=["linear"] * 3, tail_bound=torch.ones(2)),
    ),
    (ValueError, "each of tails must be one of", lambda: SplineCoupling(I, 4, tails=["linear", "bounded"])),
    (
        ValueError,
        "a sequence of tails must have one for each .* got 2",
        lambda: SplineCoupling(nn.Linear(1, 12), 4, tails=["linear", "circular"])(X),
    ),
    (ValueError, "min_bin_width", lambda: SplineCoupling(I, 4, min_bin_width=0.25)),
    (ValueError, "parametrization", lambda: SplineCoupling(I, 4, parametrization="pyro")),
    (
        ValueError,
        r"11 parameters \(4 widths, 4 heights, 3 derivatives for tails='linear'\)",
        lambda: SplineCoupling(nn.Linear(1, 12), 4)(X),
    ),
    (ValueError, "bins must be >= 1", lambda: SplineCoupling.parameter_count(2, 0)),
    (ValueError, "tails must be one of", lambda: SplineCoupling.parameter_count(2, 4, "none")),
    (TypeError, "features must be an int", lambda: SplineCoupling.parameter_count("2", 4)),
    (ValueError, "features must be >= 1", lambda: ActNorm(0)),
    (TypeError, "features must be an int", lambda: ActNorm(2.5)),
    (ValueError, "save must be one of", lambda: ActNorm(2, save="recompute_params")),
    (TypeError, "initialise must be a bool", lambda: ActNorm(2, initialise=1)),
    (ValueError, "ActNorm: x must have 3 channels", lambda: ActNorm(3)(X)),
    (ValueError, "ActNorm: x must have shape", lambda: ActNorm(3)(X[0])),
    (TypeError, "ActNorm: x must have one of the dtypes", lambda: ActNorm(2)(X.int())),
    (TypeError, "ActNorm: x must be a torch.Tensor", lambda: ActNorm(2)([[1.0, 2.0]])),
    (ValueError, "features must be >= 1", lambda: InvertibleConv1x1(0)),
    (TypeError, "features must be an int", lambda: InvertibleConv1x1("3")),
    (ValueError, "save must be one of", lambda: InvertibleConv1x1(2, save="all")),
    (ValueError, "InvertibleConv1x1: x must have 3 channels", lambda: InvertibleConv1x1(3)(X)),
    (ValueError, "InvertibleConv1x1: x must have shape", lambda: InvertibleConv1x1(3)(X[0])),
    (TypeError, "InvertibleConv1x1: x must have one of the dtypes", lambda: InvertibleConv1x1(2)(X.bool())),
    (ValueError, "sample_mask must have shape", lambda: InvertibleConv1x1(2)(X, sample_mask=X)),
    (TypeError, "sample_mask must be a torch.Tensor", lambda: InvertibleConv1x1(2)(X, sample_mask=True)),
    (ValueError, "layers must hold at least one", lambda: Flow([])),
    (TypeError, "layers must be a sequence", lambda: Flow(I)),
    (TypeError, "layers must be modules with forward and inverse, got Linear", lambda: Flow([nn.Linear(2, 2)])),
    (TypeError, "layers must be modules with forward and inverse, got function", lambda: Flow([lambda x: x])),
    (TypeError, "base must have log_prob and sample", lambda: Flow([ActNorm(2)], I)),
    (TypeError, "event_shape must be an int or a sequence", lambda: Flow([ActNorm(2)], event_shape="2")),
    (ValueError, "event_shape must be >= 0", lambda: Flow([ActNorm(2)], event_shape=(-1,))),
    (ValueError, "Flow: x must have shape", lambda: Flow([ActNorm(2)])(X[0])),
    (TypeError, "Flow: x must have one of the dtypes", lambda: Flow([ActNorm(2)]).log_prob(X.long())),
    (ValueError, "number of samples needs the shape", lambda: Flow([ActNorm(2)]).sample(3)),
    (ValueError, "shape must be >= 0", lambda: Flow([ActNorm(2)], event_shape=(2,)).sample(-1)),
    (TypeError, "shape must be an int", lambda: Flow([ActNorm(2)]).sample(2.5)),
    (ValueError, "shape must hold at least", lambda: Flow([ActNorm(2)]).sample(())),
    (ValueError, "generator needs a base", lambda: normal_flow().sample(2, generator=torch.Generator())),
    (ValueError, r"must end with that of the base, \[2\], got \[4, 3\]", lambda: normal_flow().sample((4, 3))),
    (ValueError, "sample_mask needs a base", lambda: whole_normal_flow().log_prob(X, sample_mask=X[:, :1])),
    (ValueError, "base.log_prob must return", lambda: Flow([ActNorm(2)], ScalarBase()).log_prob(X)),
    (ValueError, "actnorm: log_scale must have shape", lambda: pyperf_dl.actnorm(X, torch.zeros(3), torch.zeros(2))),
    (ValueError, "actnorm: bias must have shape", lambda: pyperf_dl.actnorm(X, torch.zeros(2), torch.zeros(1))),
    (TypeError, "actnorm: bias must have one of", lambda: pyperf_dl.actnorm(X, torch.zeros(2), torch.zeros(2).int())),
    (TypeError, "actnorm: bias must be a torch.Tensor", lambda: pyperf_dl.actnorm(X, torch.zeros(2), 0.0)),
    (TypeError, "actnorm: x must have one", lambda: pyperf_dl.actnorm(X.int(), torch.zeros(2), torch.zeros(2))),
    (ValueError, "actnorm: x must have shape", lambda: pyperf_dl.actnorm(X[0], torch.zeros(2), torch.zeros(2))),
    (TypeError, "actnorm: inverse", lambda: pyperf_dl.actnorm(X, torch.zeros(2), torch.zeros(2), inverse=1)),
    (
        ValueError,
        "actnorm: bias must be on the device of x",
        lambda: pyperf_dl.actnorm(X, torch.zeros(2), torch.zeros(2, device="meta")),
    ),
    (ValueError, "actnorm: sample_mask", lambda: pyperf_dl.actnorm(X, *torch.zeros(2, 2), sample_mask=X)),
]


class ScalarBase(GeneratorBase):
    def log_prob(self, z):
        return z.sum()


def normal_flow():
    return Flow([ActNorm(2)], torch.distributions.Normal(torch.zeros(2), 1.0))


def whole_normal_flow():
    base = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    return Flow([ActNorm(2)], base)


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[f"{i} {m}" for i, (_, m, _) in enumerate(BAD)])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(X, torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("error", "message", "at", "value"),
    [
        (ValueError, r"x must have shape", 0, X[0]),
        (TypeError, r"x must have one of the dtypes", 0, X.long()),
        (ValueError, r"lower must have shape \[2, 2\]", 1, torch.zeros(2)),
        (TypeError, r"lower must be a torch.Tensor", 1, None),
        (ValueError, r"upper must have shape \[2, 2\]", 2, torch.zeros(3, 3)),
        (ValueError, r"log_diagonal must have shape \[2\]", 3, torch.zeros(2, 2)),
        (TypeError, r"permutation must have one of the dtypes int64", 4, torch.zeros(2)),
        (ValueError, r"permutation must have shape \[2\]", 4, torch.zeros(1).long()),
        (ValueError, r"sign must have shape \[2\]", 5, torch.zeros(3)),
        (ValueError, r"sign must be on the device of x", 5, torch.ones(2, device="meta")),
    ],
)
def test_bad_conv(error, message, at, value):
    args = [X, torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2), torch.arange(2), torch.ones(2)]
    args[at] = value
    with pytest.raises(error, match=f"^invertible_conv1x1: {message}"):
        pyperf_dl.invertible_conv1x1(*args)
