"""Sampler steps on a GPU: the bits of the CPU, the numbers of torch.randn, streams, captured graphs, launches."""

import itertools
import math

import pytest
import torch

import pyperf_dl

pytestmark = pytest.mark.gpu

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
]
OPERANDS = ("x", "output", "unconditional", "variance", "h1", "h2", "h3", "last", "noise")
OF_MODEL = ("output", "unconditional", "variance")
NUMBERS = ("table", "step", "guidance", "key", "state")
ROWS, COLUMNS = 5, 19
INFINITY = math.inf


def drawn(*shape, dtype=torch.float32, seed=0, device="cuda"):
    """The same numbers on every device."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(dtype).to(device)


def a_table(seed=5, device="cuda"):
    return drawn(ROWS, COLUMNS, dtype=torch.float64, seed=seed, device=device)


def problem(*operands, shape=(6, 4, 9, 11), dtypes=DTYPES[0], **others):
    """Arguments of sampler_step by name, on the GPU."""
    arguments = dict.fromkeys((*OPERANDS, *NUMBERS, "adjust"))
    for k, name in enumerate(OPERANDS):
        if name in ("x", "output", *operands):
            arguments[name] = drawn(*shape, dtype=dtypes[name in OF_MODEL], seed=k)
    arguments.update(table=a_table(), row=1, guidance_scale=7.5, low=-INFINITY, high=INFINITY, offset=0)
    arguments.update(denoised=False, keeps=False, copies=0, sample_dims=1)
    return {**arguments, **others}


def step(arguments, **others):
    return torch.ops.pyperf_dl.sampler_step(*{**arguments, **others}.values())


def on_cpu(arguments):
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def check_equal(got, want):
    for g, w in zip(got, want, strict=True):
        assert g.is_cuda
        assert g.dtype == w.dtype
        torch.testing.assert_close(g.cpu(), w, rtol=0, atol=0, equal_nan=True)


def whole(number, dtype=torch.int64):
    return torch.tensor(number, dtype=dtype, device="cuda")


def cases():
    """(name, operands, other arguments)"""
    history = {"denoised": True, "keeps": True, "copies": 2}
    yield "plain", (), {}
    yield "guided", ("unconditional",), {}
    yield "clipped", ("unconditional",), {"low": -1.0, "high": 0.5}
    yield "model input", (), {"copies": 2}
    yield "history", ("unconditional", "h1", "h2", "h3"), history
    yield "corrected", ("h1", "h2", "last"), {**history, "copies": 1}
    yield "noisy", ("noise",), {"low": -1.0}
    yield "learned", ("variance", "noise"), {"denoised": True}
    yield "no such row", (), {"row": ROWS}


KINDS = ("steps", "guidances", "adjusted", "keys", "one key")


def of_samples(kind, samples):
    """Numbers that differ from sample to sample; one step is out of range."""
    if kind == "steps":
        return {"step": whole([0, 3, 1, ROWS, 2, 4] * (samples // 6))}
    if kind == "guidances":
        return {"guidance": whole([1.0, 7.5], torch.float64)}
    if kind == "adjusted":
        return {"adjust": whole([[0.9, INFINITY], [1.1, 1.5]], torch.float64)}
    if kind == "keys":
        return {"key": whole([3, -5, 1 << 40])}
    return {"key": whole([7]), "step": whole([2])}


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "operands", "others"), list(cases()), ids=lambda v: v if isinstance(v, str) else "")
def test_bits_of_the_cpu(name, operands, others, dtypes):
    for shape in ((6, 4, 9, 11), (2, 4, 64, 64), (3, 1), (1, 70001), (5, 640), (2, 3, 0)):
        arguments = problem(*operands, shape=shape, dtypes=dtypes, **others)
        check_equal(step(arguments), step(on_cpu(arguments)))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_bits_of_the_cpu_by_sample(dtypes):
    for shape, kind in itertools.product(((6, 4, 9, 11), (12, 70, 64), (6, 1)), KINDS):
        numbers = of_samples(kind, shape[0])
        for operands in ((), ("unconditional", "h1", "variance")):
            arguments = problem(*operands, shape=shape, dtypes=dtypes, copies=2, denoised=True, **numbers)
            check_equal(step(arguments), step(on_cpu(arguments)))
            check_equal(step(arguments, copies=0, denoised=False), step(on_cpu(arguments), copies=0, denoised=False))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["steps", "guidances", "keys", "one key"])
def test_gradients_have_the_bits_of_the_cpu(kind, dtypes):
    numbers = of_samples(kind, 6)
    for clip, copies, learned in itertools.product((False, True), (0, 2), (False, True)):
        operands = ("unconditional",) + (("variance",) + (() if "key" in numbers else ("noise",))) * learned
        given = problem(*operands, dtypes=dtypes, **numbers)
        if clip:
            given.update(low=-1.0, high=0.5)
        grads = [drawn(*given["x"].shape, dtype=dtypes[0], seed=20 + k) for k in range(4)]
        grads.append(drawn(copies, *given["x"].shape, dtype=dtypes[1], seed=30))
        values = [given[k] for k in ("x", "output", "unconditional", "variance", "noise")]
        statics = [given[k] for k in ("row", "guidance_scale", "low", "high", "offset")]
        wanted = 0b111110111 | learned << 3
        arguments = [*grads, *values, None, None, *(given[k] for k in NUMBERS), *statics]
        arguments += [True, True, True, True, True, copies, wanted, 1]  # guided, next, denoised, keeps, corrects
        local = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
        run = torch.ops.pyperf_dl.sampler_step_backward
        check_equal(run(*arguments), run(*local))


def transition(arguments, target=None, score=True):
    values = list(arguments.values())
    return torch.ops.pyperf_dl.sampler_transition(
        *values[: len(OPERANDS)], target, *values[len(OPERANDS) : -1], score, values[-1]
    )


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("operands", [("noise",), ("noise", "variance", "unconditional"), ("h1", "last"), ()])
def test_transitions_of_the_cpu(operands, dtypes):
    """The bits but of sums, which another order makes, and their gradients."""
    for shape in ((6, 4, 9, 11), (3, 4, 64, 64), (3, 1), (2, 70001)):
        given = problem(*operands, shape=shape, dtypes=dtypes)
        given["table"][:, 8] = given["table"][:, 8].abs() + 0.5
        target = None if "noise" in operands else drawn(*shape, dtype=dtypes[0], seed=40)
        got = transition(given, target)
        want = transition(on_cpu(given), None if target is None else target.cpu())
        check_equal(got[:5], want[:5])
        check_equal(got[6:], want[6:])
        tolerance = 1e-12 if dtypes[0] == torch.float64 else 1e-6
        torch.testing.assert_close(got[5].cpu(), want[5], rtol=tolerance, atol=tolerance * math.prod(shape[1:]))
        assert torch.equal(got[5], transition(given, target)[5])  # in one order
        of_log_prob = drawn(shape[0], dtype=got[5].dtype, seed=41)
        values = [given[k] for k in ("x", "output", "unconditional", "variance", "noise")]
        statics = [given[k] for k in ("row", "guidance_scale", "low", "high", "offset")]
        learned, last = "variance" in operands, "last" in operands
        none = torch.empty(0, device="cuda", dtype=dtypes[0])
        arguments = [given["x"], none, none, given["x"], none.to(dtypes[1]), *values, of_log_prob, got[6]]
        arguments += [*(given[k] for k in NUMBERS), *statics]
        arguments += ["unconditional" in operands, target is None, False, False, last, 0, 0b11 | learned << 3, 1]
        local = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
        run = torch.ops.pyperf_dl.sampler_step_backward
        check_equal(run(*arguments), run(*local))


@pytest.mark.parametrize(("shape", "launches"), [((8, 4, 16, 16), 1), ((2, 4, 64, 64), 2)], ids=str)
def test_launches_of_transitions(shape, launches):
    """A second one adds the sums of samples that several blocks have."""
    given = problem("unconditional", "noise", shape=shape, copies=2)
    assert kernels(lambda: transition(given)) == launches


def layouts():
    x = drawn(6, 4, 10, 12)
    yield "dense", x
    yield "channels_last", x.to(memory_format=torch.channels_last)
    yield "half of the samples", torch.stack([x, x], 1)[:, 0]
    yield "half of the channels", torch.cat([x, x], 1)[:, :4]
    yield "reversed", x.flip(3).transpose(2, 3).contiguous().transpose(2, 3).flip(3)
    yield "not aligned", torch.empty(x.numel() + 1, device="cuda")[1:].view_as(x).copy_(x)


def test_layouts():
    arguments = problem("unconditional", "h1", shape=(6, 4, 10, 12), copies=2, keeps=True)
    keyed = {"key": whole([1, 2, 3, 4, 5, 6])}
    wants = step(arguments, x=drawn(6, 4, 10, 12)), step(arguments, x=drawn(6, 4, 10, 12), **keyed)
    for _, x in layouts():
        check_equal(step(arguments, x=x), [t.cpu() for t in wants[0]])
        check_equal(step(arguments, x=x, **keyed), [t.cpu() for t in wants[1]])


# ---- noise ----


def keyed_noise(like, key, draw, sample_dims=1):
    return torch.ops.pyperf_dl.sampler_noise(like, key, None, draw, 0, sample_dims)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_noise_from_keys_is_that_of_the_cpu(dtype):
    for shape in ((1, 1), (3, 127), (2, 128), (3, 4, 64, 64), (2, 1000003), (1, 5000000)):
        like = torch.empty(shape, dtype=dtype, device="cuda")
        key = whole(list(range(-1, shape[0] - 1)))
        for draw in (0, -1, 1 << 33):
            got = keyed_noise(like, key, draw)
            assert got.is_cuda
            assert torch.equal(got.cpu(), keyed_noise(like.cpu(), key.cpu(), draw))


def seed_and_offset(generator):
    """int64 [2] on the CPU."""
    return generator.get_state().view(torch.int64).clone()


def threads(numel):
    properties = torch.cuda.get_device_properties("cuda")
    at_a_time = properties.multi_processor_count * (properties.max_threads_per_multi_processor // 256)
    return 256 * min(-(-numel // 256), at_a_time)


def sizes():
    most = threads(1 << 40)
    around = [n + d for n in (most, 2 * most, 4 * most, 8 * most) for d in (-257, -1, 0, 1, 255)]
    return [1, 2, 7, 255, 256, 257, 16384, 65537, 1000003, *around, 1 << 26]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("before", [0, 1, 100])
def test_numbers_and_offset_of_randn(dtype, before):
    generator = torch.Generator("cuda").manual_seed(2**63 - 25)
    for _ in range(before):
        torch.randn(3, device="cuda", generator=generator)
    for size in sizes():
        like = torch.empty(size, dtype=dtype, device="cuda")
        state = seed_and_offset(generator)
        assert int(state[1]) == generator.get_offset()
        want = torch.randn(size, dtype=dtype, device="cuda", generator=generator)
        for given in (state, state.cuda()):
            assert torch.equal(torch.ops.pyperf_dl.sampler_noise(like, None, given, 0, 0, 0), want), size
            before_it = given.clone()
            before_it[1] -= 4
            assert torch.equal(torch.ops.pyperf_dl.sampler_noise(like, None, before_it, 0, 4, 0), want), size
        assert generator.get_offset() == int(state[1]) + ((size - 1) // (4 * threads(size)) + 1) * 4


def test_numbers_of_randn_go_by_the_logical_index():
    generator = torch.Generator("cuda").manual_seed(1)
    like = drawn(3, 5, 33, 65).to(memory_format=torch.channels_last)
    state = seed_and_offset(generator)
    want = torch.randn(like.shape, device="cuda", generator=generator)
    assert torch.equal(torch.ops.pyperf_dl.sampler_noise(like, None, state, 0, 0, 1), want)
    arguments = problem("unconditional", shape=like.shape, x=like)
    check_equal(step(arguments, state=state), [t.cpu() for t in step(arguments, noise=want)])


@pytest.mark.parametrize("dtypes", DTYPES[:5], ids=str)
@pytest.mark.parametrize("steps", [None, [0, 3, 1, 4, 2, 0]], ids=str)
def test_steps_draw_what_randn_draws(steps, dtypes):
    generator = torch.Generator("cuda").manual_seed(3)
    for shape in ((6, 4, 9, 11), (6, 1), (6, 4, 64, 64), (6, 500001)):
        for operands in ((), ("unconditional", "h1", "variance")):
            numbers = {"step": None if steps is None else whole(steps)}
            arguments = problem(*operands, shape=shape, dtypes=dtypes, copies=2, **numbers)
            state = seed_and_offset(generator)
            noise = torch.randn(shape, dtype=dtypes[0], device="cuda", generator=generator)
            want = [t.cpu() for t in step(arguments, noise=noise)]
            check_equal(step(arguments, state=state), want)
            check_equal(step(arguments, state=state.cuda()), want)


def test_gradients_draw_what_randn_draws():
    generator = torch.Generator("cuda").manual_seed(4)
    shape = (6, 4, 50, 50)
    state = seed_and_offset(generator)
    noise = torch.randn(shape, device="cuda", generator=generator)
    grad, variance = drawn(*shape, seed=1), drawn(*shape, seed=2)
    none = torch.empty(0, device="cuda")

    def run(step, noise, state):
        numbers = (a_table(), step, None, None, state, 1, 1.0, -INFINITY, INFINITY, 0)
        flags = (False, True, False, False, False, 0, 0b100001011, 1)
        return torch.ops.pyperf_dl.sampler_step_backward(
            grad, none, none, none, none, None, None, None, variance, noise, None, None, *numbers, *flags
        )

    for step_of in (None, whole([0, 3, 1, 4, 2, 0])):
        check_equal(run(step_of, None, state), [t.cpu() for t in run(step_of, noise, None)])


def test_no_numbers_of_randn_in_float64():
    with pytest.raises(RuntimeError, match="float64"):
        step(problem(dtypes=DTYPES[5], state=torch.zeros(2, dtype=torch.int64)))


# ---- launches ----


def kernels(run):
    """How many kernels `run` launches, the second time."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return len([e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA])


STATE = torch.tensor([7, 0])


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (8, 16, 128, 128)], ids=str)
def test_one_launch(shape):
    everything = ("unconditional", "variance", "h1", "h2", "h3", "last")
    outputs, key = {"denoised": True, "keeps": True, "copies": 2}, whole([1])
    for operands, others in (((), {}), (("unconditional",), {"copies": 2}), (everything, outputs)):
        arguments = problem(*operands, shape=shape, **others)
        assert kernels(lambda: step(arguments)) == 1  # noqa: B023
        assert kernels(lambda: step(arguments, state=STATE)) == 1  # noqa: B023
        assert kernels(lambda: step(arguments, key=key)) == 1  # noqa: B023


def test_no_host_sync():
    arguments = problem("unconditional", "h1", copies=2, step=whole([1]), guidance=whole([2.0], torch.float64))
    keyed, drawing = {"key": whole([1])}, {"state": STATE.cuda()}
    step(arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for noise in ({}, keyed, drawing):
            step(arguments, **noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream():
    arguments = problem("unconditional")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        got = step(arguments, x=arguments["x"] + 1)
    side.synchronize()
    check_equal(got, [t.cpu() for t in step(arguments, x=arguments["x"] + 1)])


@pytest.mark.parametrize("noise", ["none", "key", "state"])
def test_captured_graph_follows_what_lies_on_the_device(noise):
    arguments = problem("unconditional", "h1", copies=2, step=whole([1]), guidance=whole([2.0], torch.float64))
    changing = ["x", "table", "step", "guidance"]
    if noise != "none":
        arguments[noise] = whole([3]) if noise == "key" else STATE.cuda()
        changing.append(noise)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(arguments)
    for turn in range(3):
        arguments["x"].copy_(drawn(*arguments["x"].shape, seed=40 + turn))
        arguments["table"].copy_(a_table(50 + turn))
        arguments["step"].fill_(turn)
        arguments["guidance"].fill_(1.5 + turn)
        if noise == "key":
            arguments["key"].add_(1)
        if noise == "state":
            arguments["state"].add_(4)
        graph.replay()
        replayed = [t.cpu() for t in got]
        check_equal(step({**arguments, **{k: arguments[k].clone() for k in changing}}), replayed)


def pull(inputs, t):
    """A model of a few kernels, for guidance in one batch."""
    return inputs * 0.3 + (t.view(-1, *[1] * (inputs.dim() - 1)) / 1000).to(inputs.dtype)


def loops():
    schedule = pyperf_dl.NoiseSchedule.from_betas(20, spacing="trailing")
    return {
        "2M": lambda eta: pyperf_dl.StepTable.dpm_solver_pp(schedule),
        "DDIM": lambda eta: pyperf_dl.StepTable.ddim(schedule, eta=eta),
    }


@pytest.mark.parametrize("noise", ["key", "generator"])
@pytest.mark.parametrize("name", ["2M", "DDIM"])
def test_captured_loop_is_the_loop_and_follows_changes(name, noise):
    """Guidance, eta, keys, the generator's state and the start change without another recording."""
    table = loops()[name](0.3)
    sampler = pyperf_dl.Sampler(table)
    recorded = None
    for turn in range(3):
        x = drawn(3, 4, 16, 16, seed=turn)
        if turn == 2:
            table.update_(loops()[name](0.7))
        results = []
        for capture in (False, True):
            generator = torch.Generator("cuda").manual_seed(turn)
            source = {"key": torch.tensor([turn, 7, 8], device="cuda")} if noise == "key" else {"generator": generator}
            results.append(sampler.sample(pull, x, guidance=2.0 + turn, capture=capture, **source))
            results.append(generator.get_state())
        eager, eager_state, replayed, replayed_state = results
        assert replayed.is_cuda
        assert torch.equal(eager, replayed)
        assert torch.equal(eager_state, replayed_state)
        assert recorded in (None, sampler._captured)
        recorded = sampler._captured


def test_captured_loop_returns_log_probabilities():
    sampler, x = pyperf_dl.Sampler(loops()["DDIM"](0.5)), drawn(3, 4, 16, 16, seed=2)
    returns = {"return_trajectory": True, "return_log_prob": True}
    for key in (3, 4):
        eager, replayed = (sampler.sample(pull, x, key=key, capture=c, **returns) for c in (False, True))
        assert all(map(torch.equal, eager, replayed))
    with pytest.raises(ValueError, match="capture with return_log_prob needs key"):
        sampler.sample(pull, x, capture=True, return_log_prob=True)


def test_captured_loop_follows_another_scale_of_its_first_input():
    def table(largest, churn):
        schedule = pyperf_dl.NoiseSchedule.from_sigma_range(6, sigma_max=largest)
        return pyperf_dl.StepTable.edm_churn(schedule, "edm", s_churn=churn)

    changing = table(10.0, 2.0)
    sampler, x = pyperf_dl.Sampler(changing), drawn(3, 4, 8, 8, seed=1)
    for other in (table(10.0, 2.0), table(40.0, 2.0), table(40.0, 1.0)):
        changing.update_(other)
        eager, replayed = (sampler.sample(pull, x, key=5, capture=capture) for capture in (False, True))
        assert torch.equal(eager, replayed)


def test_a_captured_loop_is_one_graph_launch_without_syncs():
    sampler = pyperf_dl.Sampler(loops()["DDIM"](0.5))
    x, key = drawn(2, 4, 16, 16), torch.tensor([1, 2], device="cuda")
    sampler.sample(pull, x, guidance=3.0, key=key, capture=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            sampler.sample(pull, x, guidance=4.0, key=key, capture=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    launches = [e.count for e in profile.key_averages() if e.key == "cudaGraphLaunch"]
    assert launches == [1]


@pytest.mark.parametrize("noise", [{}, {"key": [1, 2, 3]}, {"state": STATE}], ids=list)
def test_a_thousand_repeats_under_memory_load(noise):
    numbers = {k: whole(v) if k == "key" else v.cuda() for k, v in noise.items()}
    arguments = problem("unconditional", "h1", shape=(6, 40009), step=whole([1, 2, 3]), copies=2, **numbers)
    want = step(arguments)
    load = torch.cuda.Stream()
    busy = torch.randn(1 << 26, device="cuda")
    for _ in range(1000):
        with torch.cuda.stream(load):
            busy.mul_(1.0001)
        assert all(torch.equal(g, w) for g, w in zip(step(arguments), want, strict=True))


@pytest.mark.slow
def test_more_elements_than_an_int32_counts():
    row = drawn(1 << 16, dtype=torch.bfloat16)
    x = row.expand(40000, 1 << 16)  # 2.6e9
    steps = torch.arange(40000, device="cuda") % ROWS
    arguments = problem(shape=(1, 1 << 16), dtypes=DTYPES[3], x=x, output=x, step=steps, row=0)
    (got, *_) = step(arguments)
    for sample in (0, 1, 32767, 32768, 39999):
        (want, *_) = step(arguments, x=x[:1], output=x[:1], step=None, row=sample % ROWS)
        assert torch.equal(got[sample], want[0])


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    arguments = problem("unconditional", "h1", copies=2, key=whole([1]))
    got = step({k: v.to("cuda:1") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    for g, w in zip(got, step(arguments), strict=True):
        assert g.device == torch.device("cuda:1")
        assert torch.equal(g.cpu(), w.cpu())
