"""Small models of plain torch for the tests of recompute: what a chain of blocks can look like."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Case(NamedTuple):
    """A model, and what a training step of it needs."""

    model: nn.Module
    inputs: tuple | dict
    loss_fn: object
    generators: tuple = ()
    blocks: object = None

    def forward(self, model=None):
        model = self.model if model is None else model
        return model(**self.inputs) if isinstance(self.inputs, dict) else model(*self.inputs)

    def loss(self, model=None):
        output = self.forward(model)
        return output.loss if self.loss_fn is None else self.loss_fn(output)


def accumulate(case):
    """A forward and a backward, which adds to gradients of zeros."""
    torch.manual_seed(3)
    for p in case.model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        p.grad.zero_()
    case.loss().backward()


def results(case):
    """Gradients of a step, and the buffers after it."""
    accumulate(case)
    return [t.clone() for t in [*(p.grad for p in case.model.parameters()), *case.model.buffers()]]


class GPTBlock(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.heads, self.dropout = heads, dropout

    def forward(self, x):
        batch, length, dim = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, dim)
        x = x + F.dropout(self.out(y), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)


class GPT(nn.Module):
    def __init__(self, vocabulary=61, dim=32, layers=6, heads=2, length=32, dropout=0.1, tied=False):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, dim), nn.Parameter(torch.randn(length, dim) * 0.1)
        self.blocks = nn.ModuleList(GPTBlock(dim, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt(batch=2, length=16, vocabulary=61, **options):
    torch.manual_seed(0)
    model = GPT(vocabulary, **options)
    tokens = torch.randint(0, vocabulary, (batch, length))
    return Case(model, (tokens,), lambda logits: F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))


class Residual(nn.Module):
    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stages in Sequentials, as torchvision has them."""

    def __init__(self, width=8, depths=(2, 2, 2), classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True))
        stages, channels = [], width
        for i, depth in enumerate(depths):
            blocks = []
            for k in range(depth):
                blocks.append(Residual(channels, width << i, 2 if i and not k else 1))
                channels = width << i
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def resnet(batch=4, size=16, **options):
    torch.manual_seed(0)
    model = ResNet(**options)
    target = torch.randint(0, 5, (batch,))
    return Case(model, (torch.randn(batch, 3, size, size),), lambda logits: F.cross_entropy(logits, target))


class EncoderBlock(nn.Module):
    """Takes a tuple, a mask and keyword arguments of several kinds, gives a dict with what is no tensor in it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True, dropout=0.1)
        self.norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, state, *, mask=None, scale=1.0, bias=None, mode="plain"):
        x, total = state["x"], state["total"]
        y = self.norm(x)
        y, _ = self.attention(y, y, y, key_padding_mask=mask, need_weights=False)
        x = x + scale * self.linear(y) + (bias["b"] if mode == "biased" else 0)
        return {"x": x, "total": total + x.mean((1, 2)), "nothing": None, "mode": mode, "pair": (3, "constant")}


class Encoder(nn.Module):
    def __init__(self, dim=16, heads=2, layers=5):
        super().__init__()
        self.start = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.randn(dim))
        self.layers = nn.ModuleList(EncoderBlock(dim, heads) for _ in range(layers))
        self.end = nn.Linear(dim, 3)

    def forward(self, x, lengths, scale=0.5):
        mask = torch.arange(x.shape[1])[None] >= lengths[:, None]
        bias = {"b": self.bias * 2}
        state = {"x": self.start(x), "total": x.new_zeros(x.shape[0])}
        for layer in self.layers:
            state = layer({"x": state["x"], "total": state["total"]}, mask=mask, scale=scale, bias=bias, mode="biased")
        return {"logits": self.end(state["x"]), "total": state["total"], "mode": state["mode"]}


def encoder(batch=3, length=9, dim=16, **options):
    torch.manual_seed(0)
    model = Encoder(dim, **options)
    inputs = {"x": torch.randn(batch, length, dim), "lengths": torch.tensor([9, 5, 7][:batch]), "scale": 0.5}
    return Case(model, inputs, lambda output: output["logits"].square().mean() + output["total"].sum())


class Albert(nn.Module):
    """One layer, called several times."""

    def __init__(self, dim=32, repeats=5):
        super().__init__()
        self.start, self.layer, self.end = nn.Linear(dim, dim), GPTBlock(dim, 2, 0.1), nn.Linear(dim, 4)
        self.repeats = repeats

    def forward(self, x):
        x = self.start(x)
        for _ in range(self.repeats):
            x = self.layer(x)
        return self.end(x)


def albert(batch=2, length=12, dim=32, **options):
    torch.manual_seed(0)
    model = Albert(dim, **options)
    return Case(model, (torch.randn(batch, length, dim),), lambda y: y.square().mean(), blocks=["layer"])


class Power(nn.Module):
    """A layer whose output depends on a buffer that each forward changes, and on a named generator."""

    def __init__(self, dim, generator):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.register_buffer("direction", F.normalize(torch.randn(dim), dim=0))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.generator = generator

    def forward(self, x):
        weight = self.linear.weight
        if self.training:
            with torch.no_grad():
                direction = F.normalize(weight @ self.direction, dim=0)
                self.direction = direction.to(weight.dtype)  # another tensor at each step
                self.steps += 1
        y = F.linear(x, weight / (weight @ self.direction).norm(), self.linear.bias)
        return x + torch.tanh(y) * (torch.rand(x.shape, generator=self.generator) < 0.8)

    def __deepcopy__(self, memo):
        made = Power(self.linear.in_features, self.generator)
        made.load_state_dict(self.state_dict())
        return made


def power(batch=8, dim=16, layers=6):
    """Every way to change a buffer: replaced, in place, a normalization's, spectral_norm's."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    blocks = [Power(dim, generator) for _ in range(layers)]
    blocks[1] = nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.Dropout(0.2), nn.Tanh())
    blocks[2] = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(dim, dim)), nn.GELU())
    blocks[4] = nn.Sequential(nn.utils.spectral_norm(nn.Linear(dim, dim)), nn.BatchNorm1d(dim, momentum=None))
    model = nn.Sequential(*blocks, nn.Linear(dim, 3))
    return Case(model, (torch.randn(batch, dim),), lambda y: y.square().mean(), generators=(generator,))


class Ragged(nn.Module):
    """Blocks of which each gives something else: a tensor, a tuple, a dict."""

    class First(nn.Linear):
        def forward(self, x):
            return {"y": super().forward(x).tanh(), "factor": 2.0}

    class Second(nn.Linear):
        def forward(self, d):
            return super().forward(d["y"]) * d["factor"], d["y"]

    class Third(nn.Linear):
        def forward(self, pair):
            return super().forward(pair[0] + pair[1]).sigmoid()

    class Fourth(nn.Linear):
        def forward(self, x):
            return (super().forward(x).tanh(),)

    class Fifth(nn.Linear):
        def forward(self, single):
            return super().forward(single[0])

    def __init__(self, dim=8):
        super().__init__()
        kinds = (self.First, self.Second, self.Third, self.Fourth, self.Fifth)
        self.blocks = nn.Sequential(*(kind(dim, dim) for kind in kinds))

    def forward(self, x):
        return self.blocks(x).square().mean()


def ragged(batch=4, dim=8):
    torch.manual_seed(0)
    return Case(Ragged(dim), (torch.randn(batch, dim),), lambda loss: loss)


CASES = {
    "gpt": gpt, "gpt tied": lambda: gpt(tied=True), "resnet": resnet, "encoder": encoder, "albert": albert,
    "power": power, "ragged": ragged,
}  # fmt: skip
