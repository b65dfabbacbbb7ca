"""pyperf_dl.integrations.vits beside the VITS of Hugging Face transformers."""

import contextlib

import pytest
import torch
from peer_flows import (
    assert_as_accurate,
    assert_flow_as_accurate,
    assert_overlays,
    assert_same,
    assert_takeovers,
    assert_versions_are_checked,
    density_and_gradients,
    draws_of,
    restored,
    spread,
    three_runs,
    training_curves,
    values_and_gradients,
)
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import VitsConfig, VitsModel
from transformers.models.vits import modeling_vits

import pyperf_dl
from pyperf_dl.integrations import vits

SPLINE = "_unconstrained_rational_quadratic_spline"

_as_it_was = restored(vits)


def config(**how):
    return VitsConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        flow_size=8,
        spectrogram_bins=9,
        prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=1,
        posterior_encoder_num_wavenet_layers=1,
        duration_predictor_num_flows=2,
        duration_predictor_filter_channels=16,
        upsample_initial_channel=16,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        **how,
    )


def layer(kind, **how):
    torch.manual_seed(0)
    return spread(getattr(modeling_vits, kind)(config(**how))).eval()


def masked(batch=64, channels=2, length=20):
    x = torch.randn(batch, channels, length)
    lengths = torch.arange(batch).remainder(length // 2).add(length // 2)
    mask = (torch.arange(length) < lengths[:, None]).unsqueeze(1).float()
    return x, mask


# ---- results ----


@pytest.mark.parametrize("reverse", [False, True])
def test_splines(reverse):
    torch.manual_seed(0)
    x, *params = (3 * torch.randn(8_000), *(torch.randn(8_000, k) for k in (10, 10, 9)))

    def function(x, *params):
        return getattr(modeling_vits, SPLINE)(x, *params, reverse=reverse)

    assert_as_accurate(*three_runs(values_and_gradients(function), nn.Module(), vits, x, *params))
    assert vits.report() == (1, {})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("kind", "channels"), [("VitsConvFlow", 2), ("VitsResidualCouplingLayer", 8)])
def test_layers(kind, channels, reverse):
    def total(model, x, mask):
        y, logdet = model(x, mask, reverse=reverse)
        assert (logdet is None) is reverse
        return -(y * mask).square().sum([1, 2]) + (0 if reverse else logdet)

    model, (x, mask) = layer(kind), masked(channels=channels)
    assert_flow_as_accurate(draws_of(density_and_gradients(total), model, vits, x, mask))
    assert vits.report() == (1, {})


def test_residual_couplings_have_the_same_bits():
    model, (x, mask) = layer("VitsResidualCouplingLayer"), masked(channels=8)
    for reverse in (False, True):
        want = model(x, mask, reverse=reverse)
        with vits.enable():
            got = model(x, mask, reverse=reverse)
        assert torch.equal(got[0], want[0])
        assert want[1] is got[1] is None or torch.equal(got[1], want[1])


def test_a_whole_model():
    """Durations and waveform, without the noise of the prior: in float64 that is another one."""
    torch.manual_seed(0)
    model, tokens = spread(VitsModel(config()), 0.02).eval(), torch.randint(0, 20, (2, 12))
    model.noise_scale = 0.0

    def run(model, seed):
        torch.manual_seed(round(float(seed) * 2**18))
        with torch.no_grad():
            return {"waveform": model(tokens).waveform}

    draws = draws_of(run, model, vits, torch.tensor(3.0))
    assert_flow_as_accurate(draws)
    ours = draws[0][-1]
    assert ours["waveform"].abs().max() > 0.01
    assert vits.report() == (1 + 2, {})  # one spline of the two is left out when sampling


def test_training_of_the_duration_predictor():
    torch.manual_seed(1)
    model = modeling_vits.VitsStochasticDurationPredictor(config(duration_predictor_dropout=0.0))
    batches = []
    for _ in range(15):
        hidden, mask = masked(16, 16, 12)
        count = (1 + hidden[:, :1].exp()).ceil()
        batches.append(torch.cat([hidden, mask, count * mask], 1))

    def loss(model, batch):
        hidden, mask, count = batch.split([16, 1, 1], 1)
        torch.manual_seed(7)
        return model(hidden, mask, durations=count).mean() / 12

    assert_overlays(*training_curves(model, batches, loss, vits))
    assert vits.report() == (15 * 4, {})


# ---- where transformers fails ----


def test_the_inverse_never_fails():
    torch.manual_seed(0)
    params = [(30 * torch.randn(50_000, k)).requires_grad_() for k in (10, 10, 9)]
    y = (10 * torch.rand(50_000) - 5).requires_grad_()

    def call():
        return getattr(modeling_vits, SPLINE)(y, *params, reverse=True)

    assert not torch.stack(call()).isfinite().all()
    with vits.enable():
        x, logabsdet = call()
    for t in (x, logabsdet, *torch.autograd.grad((x + logabsdet).sum(), [y, *params])):
        assert t.isfinite().all()


def test_all_outside():
    x, params = torch.full((5,), 9.0), [torch.ones(5, k) for k in (4, 4, 3)]
    with vits.enable():
        y, logabsdet = getattr(modeling_vits, SPLINE)(x, *params)
    assert torch.equal(y, x)
    assert not logabsdet.any()


def test_nothing_is_read_from_the_device():
    x, mask = (t.to("meta") for t in masked())
    with vits.enable():
        assert layer("VitsConvFlow").to("meta")(x, mask)[1].shape == (64,)
    assert vits.report() == (1, {})


# ---- what goes to transformers ----


def some(shape=(3, 4), dtype=torch.float32, derivatives=9, bins=10, **how):
    torch.manual_seed(0)
    params = [torch.randn(*shape, k).to(dtype) for k in (bins, bins, derivatives)]
    return getattr(modeling_vits, SPLINE)(torch.randn(3, 4), *params, **how)


class Doubling(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args):
        self.calls += 1
        return self.inner(*args).double()


def doubled(kind, channels):
    model, (x, mask) = layer(kind), masked(3, channels)
    name = "conv_proj" if kind == "VitsConvFlow" else "conv_post"
    setattr(model, name, Doubling(getattr(model, name)))
    return model, getattr(model, name), (x, mask)


def run_doubled(kind, channels):
    model, _, args = doubled(kind, channels)
    y, logdet = model(*args)
    return y.detach(), logdet.detach()


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: some(tail_bound=torch.tensor(2.0)), "arguments"),
        (lambda: some(reverse=1), "arguments"),
        (lambda: some(derivatives=12), "number of derivatives"),
        (lambda: some(min_bin_width=0.2), "smallest sizes"),
        (lambda: some(shape=(2, 4)), "shape"),
        (lambda: some(dtype=torch.float64), "dtype"),
        (lambda: some(bins=257, derivatives=256), "number of bins"),
        (lambda: run_doubled("VitsConvFlow", 2), "dtype"),
        (lambda: run_doubled("VitsResidualCouplingLayer", 8), "dtype"),
        (lambda: layer("VitsResidualCouplingLayer")(torch.ones(8, 20), torch.ones(1, 20)), "arguments"),
    ],
)
def test_falls_back(call, why):
    assert_same(call, vits, 0, **{why.replace(" ", "_"): 1})


def test_networks_run_once():
    for kind, channels in (("VitsConvFlow", 2), ("VitsResidualCouplingLayer", 8)):
        model, net, args = doubled(kind, channels)
        with vits.enable(), contextlib.suppress(RuntimeError):  # of transformers, for the dtype
            model(*args)
        assert net.calls == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    x, *params = (torch.randn(*shape).to(dtype) for shape in ((200,), (200, 10), (200, 10), (200, 9)))
    want = getattr(modeling_vits, SPLINE)(x.double(), *(p.double() for p in params))
    with vits.enable():
        got = getattr(modeling_vits, SPLINE)(x, *params)
    assert vits.report() == (1, {})
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype))


# ---- beginning and end ----


def test_takeovers():
    assert_takeovers(vits, some)


def test_other_versions(monkeypatch):
    known, unknown = ["4.45.0", "4.57.1", "5.0.0", "5.24.3"], ["4.44.2", "5.25.0", "5.25.0.dev0", "6.0"]
    assert_versions_are_checked(vits, monkeypatch, "transformers", known, unknown)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("kind", "channels"), [("VitsConvFlow", 2), ("VitsResidualCouplingLayer", 8)])
def test_export(kind, channels, strict):
    model, args = layer(kind), masked(4, channels)
    with torch.no_grad():
        want = model(*args)
        with vits.enable():
            program = torch.export.export(model, args, strict=strict)
            got = program.module()(*args)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "channels"), [("VitsConvFlow", 2), ("VitsResidualCouplingLayer", 8)])
def test_onnx_export(kind, channels, tmp_path):
    """As operators of ONNX, in the direction in which speech is made, for any number of sentences and frames."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer(kind)

        def forward(self, x, mask):
            return self.layer(x, mask, reverse=True)[0]

    model, args = Layer(), masked(4, channels)
    sizes = {0: torch.export.Dim("sentences"), 2: torch.export.Dim("frames")}
    table = torch.export.default_decompositions()
    table.update(pyperf_dl.decompositions())
    with torch.no_grad(), vits.enable():
        program = torch.export.export(model, args, dynamic_shapes=(sizes, sizes))
    assert "pyperf_dl" in str(program.graph)
    path = str(tmp_path / "layer.onnx")
    torch.onnx.export(program.run_decompositions(table), dynamo=True, verbose=False).save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    for others in (args, masked(3, channels, 31)):
        (got,) = session.run(None, {n: t.numpy() for n, t in zip(names, others, strict=True)})
        torch.testing.assert_close(torch.from_numpy(got), model(*others), rtol=1e-4, atol=1e-4)
