"""Experts that stay packed: the numbers of transformers' own, through saving, loading, copying and training."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from torch import nn

transformers = pytest.importorskip("transformers")

import gaugekit as gk  # noqa: E402
from gaugekit.checkpoint.resident import held_bytes  # noqa: E402
from gaugekit.hf.quantizer import GaugekitConfig  # noqa: E402
from gaugekit.integrations.packing import load_packed  # noqa: E402
from gaugekit.nn import PackedExperts, PackedLinear  # noqa: E402
from gaugekit.nn.packed_matrix import PackedMatrix  # noqa: E402

SIZES = dict(vocab_size=99, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, num_experts_per_tok=2)  # fmt: skip
SMALL = SIZES | {"moe_intermediate_size": 64}
LATENT = dict(num_key_value_heads=4, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=64, kv_lora_rank=64,
              qk_rope_head_dim=16, v_head_dim=32, qk_nope_head_dim=16, n_routed_experts=4)  # fmt: skip
FAMILIES = {
    "MixtralForCausalLM": SIZES | {"num_local_experts": 4},
    "Qwen2MoeForCausalLM": SMALL
    | {"num_experts": 4, "shared_expert_intermediate_size": 128, "decoder_sparse_step": 1},
    "Qwen3MoeForCausalLM": SMALL | {"num_experts": 4},
    "GptOssForCausalLM": SIZES | {"num_local_experts": 4, "head_dim": 32},
    "DeepseekV3ForCausalLM": SMALL | LATENT,
}
IDS = torch.arange(24).view(2, 12)


def made(name="MixtralForCausalLM", **changes):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = kind.config_class(**(FAMILIES[name] | changes))
    model = kind._from_config(config, dtype=torch.bfloat16).eval()
    for path, parameter in model.named_parameters():
        if path.endswith("bias"):  # gpt-oss's, which are zeros otherwise
            nn.init.normal_(parameter, std=0.1)
    return model


def packed_experts_of(model):
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def experts_of(model):
    return next(m for m in model.modules() if hasattr(m, "has_gate"))


def routed(rows=9, width=128, experts=4):
    """Rows, two different experts for each, and their weights."""
    first = torch.arange(rows) % experts
    second = (first + 1 + torch.arange(rows) // experts % (experts - 1)) % experts
    return torch.randn(rows, width).bfloat16(), torch.stack([first, second], 1), torch.rand(rows, 2)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def double(model):
    twin = copy.deepcopy(model).double()
    twin.set_experts_implementation("eager")  # grouped products lack float64
    return twin


def same(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(state[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_fuse_save_load_and_unfuse(name, tmp_path):
    model = made(name)
    before, plain = {n: t.clone() for n, t in model.state_dict().items()}, logits(model)
    exact = logits(double(model))
    kind = type(experts_of(model))
    report = gk.fuse(model, packed=True, attention=False)
    layers = packed_experts_of(model)
    paths = {one["module"] for one in report["replaced"] if one["form"] == "packed_experts"}
    assert len(layers) == len(paths) == (1 if name.startswith("Deepseek") else 2)
    assert all(isinstance(layer, kind) and len(layer.packed_weights()) == 2 for layer in layers)
    assert {one["module"].rpartition(".")[2] for one in report["left"]} <= {"gate", "router"}, "routers only"
    assert report["bytes_after"] == held_bytes(model) < 0.75 * report["bytes_before"]
    assert report["parameters_after"] == report["parameters_before"]
    packed = logits(model)
    assert (packed.double() - exact).norm() <= 1.2 * (plain.double() - exact).norm()
    assert same(model.state_dict(), before)
    model.save_pretrained(tmp_path / "m")
    config = (tmp_path / "m" / "config.json").read_text()
    assert "quantization_config" not in config
    again = type(model).from_pretrained(tmp_path / "m", dtype="auto")
    assert same(again.state_dict(), before)
    held = sum(layer.packed_bytes for layer in layers)
    gk.codec.pack(tmp_path / "m", tmp_path / "packed")
    implementation = {"attn_implementation": model.config._attn_implementation}
    for loaded in (
        type(model).from_pretrained(
            tmp_path / "packed", quantization_config=GaugekitConfig(packed=True), **implementation
        ),
        load_packed(tmp_path / "m"),
    ):
        assert [type(layer) for layer in packed_experts_of(loaded)] == [type(layer) for layer in layers]
        assert sum(layer.packed_bytes for layer in packed_experts_of(loaded)) == held
        assert same(loaded.state_dict(), before)
    assert paths <= set(gk.unfuse(model)["restored"])
    assert type(experts_of(model)) is kind and same(model.state_dict(), before)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_whatever_implementation_the_config_names(implementation):
    """The sums are those of grouped and batched products; in float64 all three agree but for the last bits."""
    model = made()
    experts, (x, index, weights) = experts_of(model), routed()
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        plain = experts(x, index, weights)
        exact = copy.deepcopy(experts).double()
        exact.config = copy.copy(exact.config)
        exact.config._experts_implementation = "eager"
        expected = exact(x.double(), index, weights.double())
        gk.fuse(model, packed=True, attention=False)
        ours = experts(x, index, weights)
    assert isinstance(experts, PackedExperts) and ours.dtype == x.dtype
    assert (ours.double() - expected).norm() <= 1.2 * (plain.double() - expected).norm()
    model.set_experts_implementation("batched_mm")
    assert torch.equal(experts(x, index, weights), ours)


@pytest.mark.parametrize(
    "name",
    ["nemotron_h.modeling_nemotron_h.NemotronHExperts", "muse_spark.modeling_muse_spark.MuseSparkExperts"],
)
def test_experts_without_a_gate_and_with_a_norm_of_their_own(name):
    path, _, kind = name.rpartition(".")
    module = pytest.importorskip(f"transformers.models.{path}", exc_type=ImportError)
    config = SimpleNamespace(
        n_routed_experts=4, num_local_experts=4, hidden_size=128, moe_hidden_size=128, moe_latent_size=None,
        moe_intermediate_size=192, mlp_hidden_act="relu2", hidden_act="silu", post_norm_eps=1e-6,
        _experts_implementation="batched_mm",
    )  # fmt: skip
    experts, (x, index, weights) = getattr(module, kind)(config).bfloat16(), routed()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    exact = copy.deepcopy(experts).double()
    exact.config._experts_implementation = "eager"
    with torch.no_grad():
        plain, expected = experts(x, index, weights), exact(x.double(), index, weights.double())
        report = gk.fuse(experts, packed=True)
        ours = experts(x, index, weights)
    assert [one["form"] for one in report["replaced"]] == ["packed_experts"] and not report["left"][1:]
    assert len(experts.packed_weights()) == 2
    assert (ours.double() - expected).norm() <= 1.2 * (plain.double() - expected).norm()


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_only_routed_experts_are_decoded(name, monkeypatch):
    """Experts that no row is routed to may hold anything: their parts are not read."""
    experts, (x, _, weights) = experts_of(made(name)), routed()
    gk.fuse(experts, packed=True)
    index = torch.tensor([[2, 1]]).expand(9, 2)
    with torch.no_grad():
        expected = experts(x, index, weights)
        for weight in experts.packed_weights().values():
            rows = weight.raw.shape[0] // 4
            for expert in (0, 3):
                weight.planes[expert * rows : (expert + 1) * rows].fill_(
                    -1
                )  # all escapes: NaNs, were they read
                weight.raw[expert * rows : (expert + 1) * rows].fill_(255)
        assert torch.equal(experts(x, index, weights), expected)
        calls = []
        monkeypatch.setattr(PackedMatrix, "unpack", lambda self: calls.append(self))
        experts(x, index, weights)
    assert not calls


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_rows_without_an_expert_and_no_rows(name):
    experts, (x, index, weights) = experts_of(made(name)), routed()
    gk.fuse(experts, packed=True)
    none = index.clone()
    none[:, 1] = 4  # as expert parallelism marks what another rank computes
    with torch.no_grad():
        alone = experts(x, index[:, :1], weights[:, :1])
        assert torch.equal(experts(x, none, weights), alone)
        assert torch.equal(experts(x, none.int(), weights), alone)
        assert torch.equal(experts(x, none.where(none < 4, -1), weights), alone)
        assert not experts(x, torch.full_like(index, 4), weights).any()
        assert experts(x[:0], index[:0], weights[:0]).shape == (0, 128)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_gradients_reach_rows_router_weights_and_biases(name):
    experts, (x, index, weights) = experts_of(made(name)), routed()
    exact = copy.deepcopy(experts).double()
    exact.config._experts_implementation = "eager"
    gk.fuse(experts, packed=True)
    experts.double()  # the biases: what is packed stays as it is
    gradients = []
    for module in (experts, exact):
        rows, shares = x.double().requires_grad_(), weights.double().requires_grad_()
        module(rows, index, shares).square().sum().backward()
        biases = [p.grad for path, p in module.named_parameters() if path.endswith("bias")]
        gradients.append([rows.grad, shares.grad, *biases])
    assert len(gradients[0]) == (4 if name.startswith("Gpt") else 2)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm() and theirs.any()
    assert not any(weight.requires_grad for weight in experts.packed_weights().values())


def test_copies_pickles_and_states_keep_what_they_should():
    model = made("GptOssForCausalLM")
    expected = {n: t.clone() for n, t in model.state_dict().items()}
    gk.fuse(model, packed=True, attention=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(packed_experts_of(twin)) == 2 and torch.equal(logits(twin), logits(model))
        first = packed_experts_of(twin)[0].gate_up_proj
        assert first.count == 4 and first.transposed and first.shape == (4, 128, 384)
        gk.unfuse(twin)
        assert type(experts_of(twin)).__name__ == "GptOssExperts" and same(twin.state_dict(), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    assert same(state, expected) and all(type(tensor) is torch.Tensor for tensor in state.values())
    other = made("GptOssForCausalLM")
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    gk.fuse(other, packed=True, attention=False)
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model)) and len(packed_experts_of(other)) == 2
    with pytest.raises(RuntimeError, match=r"Missing key.*experts.down_proj\""):
        other.load_state_dict({n: t for n, t in state.items() if not n.endswith("down_proj")})
    model.to("meta")
    assert packed_experts_of(model)[0].gate_up_proj.is_meta


def test_assigned_weights_and_frozen_ones():
    model = made()
    experts, (x, index, weights) = experts_of(model), routed()
    gk.fuse(model, packed=True, attention=False)
    merged = experts.down_proj.detach().clone() * 2
    experts.down_proj.data = merged
    assert torch.equal(experts.down_proj, merged) and isinstance(experts.down_proj, PackedMatrix)
    with torch.no_grad():
        packed = experts(x, index, weights)
    with pytest.raises(RuntimeError, match=r"gaugekit\.unfuse"):
        experts.down_proj.data += 1
    with pytest.raises(RuntimeError, match="packed weights are frozen"):
        experts.down_proj.requires_grad_(True)
    experts.down_proj = nn.Parameter(merged)  # a plain one in its place: transformers computes the whole
    with torch.no_grad():
        mixed = experts(x, index, weights)
    assert (mixed - packed).float().norm() <= 0.01 * packed.float().norm()
    gk.unfuse(model)
    assert torch.equal(experts.down_proj, merged)


def test_one_graph_serves_any_number_of_rows():
    experts = experts_of(made())
    gk.fuse(experts, packed=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(experts, fullgraph=True, backend=counter, dynamic=True)
    for rows in (5, 40, 90):
        arguments = routed(rows)
        assert torch.equal(compiled(*arguments), experts(*arguments))
    assert counter.frame_count == 1


def test_autocast_computes_in_its_dtype():
    experts, (x, index, weights) = experts_of(made()), routed()
    gk.fuse(experts, packed=True)
    with torch.no_grad():
        plain = experts(x, index, weights)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(experts(x.float(), index, weights).bfloat16(), plain)


def mine(self, hidden_states, top_k_index, top_k_weights):
    return hidden_states


def test_what_stays_plain_and_why(monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = made("MixtralForCausalLM", num_hidden_layers=5)
    modules = [layer.mlp.experts for layer in model.model.layers]
    modules[0].forward = lambda *_: None
    modules[1].up = nn.Parameter(modules[1].gate_up_proj.data)
    modules[2].down_proj = modules[3].down_proj
    modules[4].gate_up_proj.grad = torch.zeros_like(modules[4].gate_up_proj)
    report = gk.fuse(model, packed=True, attention=False)
    reasons = {one["module"]: one["reason"] for one in report["left"]}
    paths = [f"model.layers.{layer}.mlp.experts" for layer in range(5)]
    expected = [
        "forward was replaced",
        "share memory",
        f"tied to '{paths[3]}'",
        f"tied to '{paths[2]}'",
        "gate_up_proj holds a gradient",
    ]
    assert all(words in reasons[path] for words, path in zip(expected, paths, strict=True))
    ALL_EXPERTS_FUNCTIONS.register("mine", mine)
    monkeypatch.setattr(model.config, "_experts_implementation_internal", "mine")
    del modules[0].forward
    assert "computed by 'mine'" in gk.fuse(modules[0], packed=True)["left"][0]["reason"]
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop("mine", None)


def test_narrow_experts_and_those_that_compute_themselves():
    narrow = made("Qwen3MoeForCausalLM", moe_intermediate_size=8)
    left = {one["module"]: one["reason"] for one in gk.fuse(narrow, packed=True, attention=False)["left"]}
    assert left["model.layers.0.mlp.experts"] == "packed, its weights would take no less memory"
    config = transformers.Llama4TextConfig(
        **SIZES, head_dim=32, num_local_experts=2, intermediate_size_mlp=128
    )
    model = transformers.Llama4ForCausalLM._from_config(config, dtype=torch.bfloat16)
    left = {one["module"]: one["reason"] for one in gk.fuse(model, packed=True, attention=False)["left"]}
    assert "it is a Llama4TextExperts" in left["model.layers.0.feed_forward.experts"]


def test_narrow_experts_stay_plain_while_loading(tmp_path):
    plain = made("Qwen3MoeForCausalLM", moe_intermediate_size=40)
    plain.save_pretrained(tmp_path)
    loaded = load_packed(tmp_path)
    live = copy.deepcopy(plain)
    gk.fuse(live, packed=True, attention=False)
    kinds = [[type(module).__name__ for module in model.modules()] for model in (loaded, live)]
    assert kinds[0] == kinds[1] and "Qwen3MoeExperts" in kinds[0]
    assert same(loaded.state_dict(), plain.state_dict())
    assert any(isinstance(module, PackedLinear) for module in loaded.modules())


class Adapted(nn.Module):
    """What PEFT puts around a module to whose parameter it adds a low-rank product while it runs."""

    def __init__(self, base_layer, parameter_name):
        super().__init__()
        self.base_layer, self.parameter_name = base_layer, parameter_name


def test_experts_with_an_adapter_on_a_parameter_stay_plain():
    model = made()
    experts = experts_of(model)
    model.model.layers[0].mlp.experts = Adapted(Adapted(experts, "down_proj"), "gate_up_proj")
    report = gk.fuse(model, packed=True, attention=False)
    reasons = [
        one["reason"] for one in report["left"] if one["module"].endswith("experts.base_layer.base_layer")
    ]
    assert len(reasons) == 1 and "target_parameters" in reasons[0]
    assert type(experts.down_proj) is nn.Parameter and len(packed_experts_of(model)) == 1


def test_an_adapter_around_packed_experts_trains():
    """Low-rank products before and after a frozen mixture learn as they do around the plain one."""
    losses = []
    for packed in (False, True):
        torch.manual_seed(1)
        model = made()
        if packed:
            gk.fuse(model, packed=True, attention=False)
        model.requires_grad_(False)
        adapter = nn.Linear(128, 128, bias=False, dtype=torch.bfloat16)
        nn.init.zeros_(adapter.weight)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda _, x, add=adapter: (x[0] + add(x[0]),))
        optimizer = torch.optim.SGD(adapter.parameters(), 1.0)
        steps = []
        for _ in range(3):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(loss.item())
        losses.append(steps)
    plain, ours = losses
    assert ours[-1] < ours[0] and abs(ours[-1] - plain[-1]) <= 0.02 * (plain[0] - plain[-1]) + 1e-2
