"""One token decoded from one cache, beside keys and values of the same layer.

A step writes the new token's row (and, for the rivals, projects its key), absorbs the query into W_K or not, and
attends to all rows. Rivals: torch's attention over keys and values in one static buffer each, as transformers keeps
them, and a blocked decode of our own over keys and values side by side, which is this kernel on rows [k | v].
"""

import functools

import torch
from torch.nn.functional import scaled_dot_product_attention

import gaugekit as gk
from gaugekit.reference.single_cache_attention import single_cache_attention as reference
from registry import Case, benchmark, own_shape, wanted

HEADS, WIDTH = 12, 64
TORCH, OURS = "torch SDPA over K and V", "blocked decode over K and V"


def label(threads: int) -> str:
    return "1 threads, processor time" if threads == 1 else f"{threads} threads"


def quiet(function):
    def call():
        with torch.no_grad():
            return function()

    return call


class Layer:
    """The cached rows of one layer in the three forms, and the new token."""

    def __init__(
        self,
        batch: int,
        rows: int,
        kind: str,
        dtype: torch.dtype,
        device: str,
        heads: int = HEADS,
        width: int = WIDTH,
    ):
        def random(*shape):
            return torch.randn(*shape, device=device).to(dtype)

        self.kind, self.scale, self.heads, self.width = kind, width**-0.5, heads, width
        model = heads * width
        self.q, self.new = random(batch, heads, 1, width), random(batch, 1, model)
        self.key, self.value = (random(model, heads, width) / model**0.5 for _ in range(2))
        self.x = random(batch, rows, model)
        self.x[:, -1:] = self.new
        self.k, self.v = (part.to(dtype) for part in self.project(self.x, torch.float32))
        self.both = torch.cat([self.k, self.v], -1)
        self.gains = {n: torch.rand(heads, device=device) for n in ("alpha", "beta", "gamma")}
        self.total = self.v.float().sum(2, keepdim=True)

    def project(self, x, dtype=None):
        """K and V of rows x, computed in ``dtype``: float32 for many rows, which processors without bf16 need."""
        dtype = dtype or x.dtype

        def heads(rows):
            return rows.unflatten(2, (self.heads, self.width)).transpose(1, 2).contiguous()

        weights = [w.to(dtype).flatten(1) for w in (self.key, self.value)]
        k = x.to(dtype) @ weights[0]
        return heads(k), heads(x.to(dtype) @ weights[1] if self.kind == "multi-head" else x)

    def terms(self, attended):
        """α v + β A − γ C of the new token, C from a running sum."""
        if self.kind != "SAS, α β γ":
            return attended
        alpha, beta, gamma = (gain.view(-1, 1, 1) for gain in self.gains.values())
        return beta * attended + alpha * self.v[:, :, -1:] - gamma * self.total / self.v.shape[2]

    def one_cache(self):
        self.x[:, -1:] = self.new
        q = torch.einsum("bhtk,dhk->bhtd", self.q, self.key)
        gains = self.gains if self.kind == "SAS, α β γ" else {}
        whole = self.kind == "multi-head"
        out = gk.single_cache_attention(q, self.x, scale=self.scale, slices=not whole, **gains)
        return torch.einsum("bhtd,dhv->bhtv", out, self.value) if whole else out

    def torch(self):
        self.k[:, :, -1:], self.v[:, :, -1:] = self.project(self.new)
        return self.terms(scaled_dot_product_attention(self.q, self.k, self.v, scale=self.scale))

    def blocked(self):
        self.both[:, :, -1:] = torch.cat(self.project(self.new), -1)
        q = torch.nn.functional.pad(self.q, (0, self.width))
        return self.terms(gk.single_cache_attention(q, self.both, scale=self.scale)[..., self.width :])

    def exact(self):
        wide = self.x.double().cpu()
        self_key, value = self.key.double().cpu(), self.value.double().cpu()
        q = torch.einsum("bhtk,dhk->bhtd", self.q.double().cpu(), self_key)
        gains = self.gains if self.kind == "SAS, α β γ" else {}
        gains = {name: gain.double().cpu() for name, gain in gains.items()}
        whole = self.kind == "multi-head"
        out = reference(q, wide[:, None], scale=self.scale, slices=not whole, **gains)
        return torch.einsum("bhtd,dhv->bhtv", out, value) if whole else out


def checked(kind: str, dtype: torch.dtype, device: str, heads: int, width: int):
    @functools.cache
    def call():
        layer = Layer(2, 700, kind, dtype, device, heads, width)
        exact = layer.exact()
        for name in ("one_cache", "torch", "blocked"):
            error = (getattr(layer, name)().double().cpu() - exact).abs().max()
            allowed = (layer.torch().double().cpu() - exact).abs().max()
            bound = 2 * allowed + 16 * torch.finfo(dtype).eps * exact.abs().max()
            assert error <= bound, f"{name}: error {error:.2e}, torch's {allowed:.2e}"

    return call


KINDS = ("SAS", "SAS, α β γ", "multi-head")


def decode(layer: Layer, shape: str, dtype: torch.dtype, device: str, threads: int) -> Case:
    numbers = layer.x.shape[2]
    return Case(
        op="single_cache_attention", shape=f"{layer.kind} {shape}", dtype=str(dtype).removeprefix("torch."),
        device=device, ours=quiet(layer.one_cache),
        rivals={TORCH: quiet(layer.torch), OURS: quiet(layer.blocked)}, without_us=TORCH,
        check=checked(layer.kind, dtype, device, layer.heads, layer.width),
        bytes_moved=layer.x.numel() * layer.x.element_size(),
        threads=threads, label=label(threads), processor_time=threads == 1, rounds=15, seconds=6.0,
        extra={"cache_bytes": layer.x.element_size() * numbers, "goal": 1.3, "goal_blocked": 1.2},
    )  # fmt: skip


def named(batch: int, rows: int, heads: int, width: int) -> str:
    return f"decode B{batch} S{rows} D{heads * width} H{heads}"


@own_shape(
    "single_cache_attention",
    "BATCHxROWSxHEADSxWIDTH",
    "8x8192x12x64",
    torch.float32,
    torch.bfloat16,
    torch.float16,
)
def own(batch: int, rows: int, heads: int, width: int, dtype: torch.dtype, threads: int):
    for kind in KINDS:
        layer = Layer(batch, rows, kind, dtype, "cpu", heads, width)
        yield decode(layer, named(batch, rows, heads, width), dtype, "cpu", threads)


@benchmark("single_cache_attention")
def cases(device: str, quick: bool):
    torch.manual_seed(0)
    batch, rows = (2, 1024) if quick else (8, 8192)
    shape = named(batch, rows, HEADS, WIDTH)
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            name, layer = str(dtype).removeprefix("torch."), None
            for threads in (1, 2):
                if wanted(f"{kind} {shape} {name} {label(threads)}"):
                    layer = layer or Layer(batch, rows, kind, dtype, device)
                    yield decode(layer, shape, dtype, device, threads)
