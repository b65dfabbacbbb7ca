"""Models of transformers, tiny and with random weights, through keyword inputs and labels."""

import copy

import pytest
import torch

from pyperf_dl import recompute

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 61,
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def gpt2():
    config = transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=128, n_layer=4, n_head=2, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=32, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=32))


def vit():
    config = transformers.ViTConfig(
        **{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=16, patch_size=4
    )
    return transformers.ViTForImageClassification(config)


def inputs_of(model, batch=8, length=32):
    torch.manual_seed(1)
    if "ViT" in type(model).__name__:
        return {"pixel_values": torch.randn(batch, 3, 16, 16), "labels": torch.randint(0, 2, (batch,))}
    tokens = torch.randint(0, 61, (batch, length))
    mask = torch.ones_like(tokens)
    mask[0, 20:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens}


def step(model, inputs):
    torch.manual_seed(2)
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return [output.loss.detach(), output.logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("make", [gpt2, llama, bert, vit], ids=lambda make: make.__name__)
@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_the_same_bits_within_the_budget(make, fraction):
    torch.manual_seed(0)
    model = make().train()
    inputs = inputs_of(model)
    wanted = step(model, inputs)
    least = recompute.plan(model, inputs, budget="least")
    assert len(least.profile) == 4 + 2
    budget = int(least.budget + fraction * (recompute.full_peak(least.profile) - least.budget))
    plan = recompute.plan(model, inputs, budget=budget)
    assert sum(plan.schedule.replays) > 0
    plan.apply()
    assert all(torch.equal(a, b) for a, b in zip(wanted, step(model, inputs), strict=True))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def accumulate():
        model(**inputs).loss.backward()

    there = sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers(), *inputs.values()])
    there += sum(p.nbytes for p in model.parameters())
    peak = there + recompute.peak_memory(accumulate)
    assert peak <= budget
    assert plan.predicted_peak == pytest.approx(peak, rel=0.02)
    model.eval()
    with torch.no_grad():
        after = model(**inputs).logits
    plan.remove()
    with torch.no_grad():
        assert torch.equal(after, model(**inputs).logits)


def test_a_cache_of_keys_is_a_side_effect():
    torch.manual_seed(0)
    model = gpt2().train()
    model.config.use_cache = True
    inputs = inputs_of(model)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"block transformer\.h\.0 can't run again.*side effect"):
        recompute.plan(model, inputs, budget="90%")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_hidden_states_asked_for_are_outputs_used_twice():
    model = gpt2().train()
    inputs = inputs_of(model) | {"output_hidden_states": True}
    with pytest.raises(ValueError, match="is used twice"):
        recompute.plan(model, inputs, budget="90%")
