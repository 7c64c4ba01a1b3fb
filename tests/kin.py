"""What every family has to pass: a tiny random model of the real class, in float64, and through every verb."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pytest
import torch
import transformers

import gaugekit as gk
import gaugekit.integrations.transformers
from gaugekit.models import FAMILIES, Live, left_alone
from gaugekit.symmetry import REMOVED, SYMMETRIES

ENCODER = dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=32)
TEXT = dict(ENCODER, vocab_size=60, max_position_embeddings=20)
IMAGE = dict(ENCODER, image_size=16, patch_size=8)
BIASES = {"value_output": 64, "value_bias": 8}
ALL = {**BIASES, "query_key": 64, "key_bias": 8}


@dataclass(frozen=True)
class Kin:
    """A family: its model and config class, small sizes, and for each layer the groups that hold there, with what each
    of three heads of width 8 has of them."""

    kind: str
    config: str
    sizes: dict[str, Any]
    groups: list[dict[str, int]]
    attention: str | None = "gaugekit"  # the implementation after fuse; None: its own stays
    near: float = 1e-12  # of a view to the module: more where the module has float32 in its scores

    @cached_property
    def counts(self) -> dict[str, int]:
        """What can be fixed, by group."""
        counts = dict.fromkeys(REMOVED, 0)
        for layer in self.groups:
            for group, size in layer.items():
                counts[group] += 3 * size
        return {**counts, "total": sum(counts.values())}

    def model(self, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
        """The tiny model, its weights and biases random, so that no zero hides an error."""
        torch.manual_seed(0)
        model = getattr(transformers, self.kind)(getattr(transformers, self.config)(**self.sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.requires_grad:  # sines of positions, which some families do not store
                    continue
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.to(dtype).eval()


def removable(report: gk.Report) -> dict[str, int]:
    """What ``inspect`` says of the groups that gauge fixing removes, with their total."""
    counts = {group: report["unobservable"][group] for group in REMOVED}
    return {**counts, "total": report["removable"]}


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Seeded random inputs, two of each."""
    torch.manual_seed(1)
    config, main = model.config, model.main_input_name
    ids = torch.randint(3, 59, (2, 9))
    ids[:, -1] = 59  # where a text ends
    images = torch.randn(2, 3, 16, 16, dtype=model.dtype)
    if main == "input_features":
        sounds = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, dtype=model.dtype)
        inputs = {"input_features": sounds}
    elif main == "pixel_values":
        inputs = {"pixel_values": images}
    else:
        inputs = {"input_ids": ids} | ({"pixel_values": images} if hasattr(model, "vision_model") else {})
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = torch.randint(3, 59, (2, 7))
    return inputs


def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output that is compared: logits, similarities or the last hidden states."""
    with torch.no_grad():
        return next(x for x in model(**inputs).to_tuple() if isinstance(x, torch.Tensor))


def check_groups(kin: Kin) -> None:
    """Every group that holds is fixed, random elements of it and the fixing move no output; what is barred would."""
    model = kin.model()
    inputs, live = inputs_of(model), Live(model)
    before = run(model, inputs)

    def moved(layer: int, group: str, freed: bool = False) -> float:
        symmetry, view = SYMMETRIES[group], live.attention(layer)
        tensors = live.family.store(layer, view).tensors
        view = replace(view, barred={}, rotary=0) if freed else view
        other = symmetry.act(view, symmetry.random(view, torch.Generator().manual_seed(layer)))
        live.write(live.family.store(layer, other).tensors)
        error = (run(model, inputs) - before).norm() / before.norm()
        if freed:
            live.write(tensors)
        return float(error)

    assert len(live) == len(kin.groups)
    for layer, groups in enumerate(kin.groups):
        for group in groups:
            assert moved(layer, group) < 1e-12, (layer, group)
        if "query_key" not in groups:
            assert moved(layer, "query_key", freed=True) > 1e-6, layer
    report = gk.symmetry.fix(model)
    assert (run(model, inputs) - before).norm() < 1e-12 * before.norm()
    assert report["removed"] == kin.counts
    assert all(layer["invariance_error"] < 1e-13 for layer in report["layers"])
    assert report.notes == left_alone([live.attention(layer).barred for layer in range(len(live))])
    check_fixed(model)


def check_fixed(model: torch.nn.Module, rows: str = "balanced") -> None:
    """A second fix changes nothing."""
    fixed = {name: parameter.clone() for name, parameter in model.named_parameters()}
    gk.symmetry.fix(model, rows=rows)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, fixed[name]), name


def check_adapter(kin: Kin) -> None:
    """The adapter names the tensors there are and stores what it read."""
    live = Live(kin.model())
    assert type(live.family) is FAMILIES[live.config["model_type"]]
    for layer in range(len(live)):
        view, outline = live.attention(layer), live.family.outline(layer)
        stored = live.family.store(layer, view).tensors
        assert {path: tuple(tensor.shape) for path, tensor in stored.items()} == live.family.shapes(layer)
        for path, tensor in stored.items():
            assert torch.equal(tensor, live.read(path)), path
        for part in "qkvo":
            assert getattr(outline, part).weight.is_meta
            assert getattr(outline, part).weight.shape == getattr(view, part).weight.shape
            module = live.prefix + live.family.projections(layer)[part]
            assert module.startswith(live.prefix + live.family.block(layer) + ".")


def check_view(kin: Kin) -> None:
    """A view computes what the attention computes, held against what the real modules read and answer in a run."""
    model = kin.model()
    live = Live(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:  # ``attend`` leaves biases of position out
                parameter.zero_()
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}

    def keep(layer: int, part: str, tensor: torch.Tensor) -> None:
        seen.setdefault((layer, part), []).append(tensor)

    for layer in range(len(live)):
        q, k, o = (model.get_submodule(live.prefix + live.family.projections(layer)[part]) for part in "qko")
        q.register_forward_pre_hook(lambda _, read, layer=layer: keep(layer, "x", read[0]))
        k.register_forward_pre_hook(lambda _, read, layer=layer: keep(layer, "memory", read[0]))
        o.register_forward_hook(lambda _, __, out, layer=layer: keep(layer, "out", out))
    run(model, inputs_of(model))
    for layer in range(len(live)):
        view = live.attention(layer)
        runs = list(zip(*(seen[layer, name] for name in ("x", "memory", "out")), strict=True))
        assert runs
        for x, memory, out in runs:
            assert view.cross == (memory is not x)
            attended = view.attend(x, memory) if view.cross else view.attend(x)
            assert (attended - out).norm() < kin.near * out.norm(), layer


def check_verbs(kin: Kin, folder: Any) -> None:
    """Inspect, convert, verify and fuse take the family, from a directory and live; ranks where the scores allow."""
    model = kin.model(torch.float32)
    inputs, source = inputs_of(model), folder / "model"
    model.save_pretrained(source)
    output, tokens = run(model, inputs), greedy(model, inputs)
    read, seen = gk.inspect(source), gk.inspect(model)
    assert read["unobservable"] == seen["unobservable"] and removable(read) == kin.counts
    assert seen["parameters"] == sum(p.numel() for p in model.parameters())
    assert read["layers"] == seen["layers"]
    converted = {}
    for dense in (False, True):
        target = folder / f"dense {dense}"
        report = gk.convert(source, target, [gk.symmetry.GaugeFix()], dense=dense)
        gone = report["parameters_before"] - report["parameters_after"]
        assert gone == (0 if dense else kin.counts["total"]) and report["invariance_error"] < 1e-13
        loaded, info = type(model).from_pretrained(target, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert close(run(loaded.eval(), inputs), output)
        assert tokens is None or torch.equal(greedy(loaded, inputs), tokens)
        converted[dense] = loaded
    check_fixed(converted[True])
    assert gk.verify(source, folder / "dense False")["ok"]
    compact = converted[False]
    compact.save_pretrained(folder / "again")
    again = type(model).from_pretrained(folder / "again").eval()
    assert torch.equal(run(again, inputs), run(compact, inputs))
    check_ranks(model, inputs, source, folder / "rank")
    check_fuse(kin, model, inputs, output)


def check_ranks(model: torch.nn.Module, inputs: dict, source: Any, target: Any) -> None:
    live = Live(model)
    barred = [reason for layer in range(len(live)) for reason in live.attention(layer).barred.values()]
    if barred:
        with pytest.raises(ValueError, match=f"got a model in which {barred[0]}"):
            gk.convert(source, target, [gk.rank.Truncate(6)])
        return
    truncate = gk.rank.Truncate(6)
    rewrites = [truncate, gk.symmetry.GaugeFix(key_ranks=truncate.of(live.config))]
    report = gk.convert(source, target, rewrites)
    gone = report["parameters_before"] - report["parameters_after"]
    assert gone == sum(step["removed"]["total"] for step in report["steps"]) and len(report["steps"]) == 2
    truncated = type(model).from_pretrained(target, attn_implementation="eager").eval()
    output = run(model, inputs)
    assert 1e-5 * output.norm() < (run(truncated, inputs) - output).norm() < output.norm()


def check_fuse(kin: Kin, model: torch.nn.Module, inputs: dict, output: torch.Tensor) -> None:
    own = model.config._attn_implementation
    report = gk.fuse(model)
    assert len(report["left"]) == (kin.attention is None)
    assert report["attention"] == (kin.attention or own)
    assert report["parameters_before"] - report["parameters_after"] == kin.counts["total"]
    assert close(run(model, inputs), output)
    gk.unfuse(model)
    assert torch.equal(run(model, inputs), output)
    half = kin.model(torch.bfloat16)
    cast = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in inputs.items()}
    before = run(half, cast)
    packed = gk.fuse(half, packed=True, attention=False)
    assert packed["bytes_after"] <= packed["bytes_before"]
    assert torch.equal(run(half, cast), before)


Make = Callable[
    [torch.dtype], tuple[torch.nn.Module, dict]
]  # a model whose heads are of width 8, and its inputs


def turned(counts: dict[str, int]) -> dict[str, int]:
    """What goes where heads are turned: V (V − 1)/2 numbers in place of the V² in ``counts``."""
    parts = {name: count * 28 // 64 if name in ("value_output", "query_key") else count
             for name, count in counts.items() if name != "total"}  # fmt: skip
    return {**parts, "total": sum(parts.values())}


def check_turned(make: Make, counts: dict[str, int], near: float = 1e-12) -> None:
    """Turned heads are triangular without an output moving, and stay as they are under a second fix."""
    model, inputs = make(torch.float64)
    before = run(model, inputs)
    report = gk.symmetry.fix(model, rows="triangular")
    assert (run(model, inputs) - before).norm() < near * before.norm()
    assert report["removed"] == turned(counts)
    assert all(layer["invariance_error"] < 1e-13 for layer in report["layers"])
    check_fixed(model, "triangular")
    check_fixed(model.bfloat16(), "triangular")


def check_turned_files(make: Make, counts: dict[str, int], folder: Any) -> None:
    """What is written has no zeros, loads, and computes and generates the same; fused it is as small."""
    model, inputs = make(torch.float32)
    model.save_pretrained(folder / "model")
    output, tokens = run(model, inputs), greedy(model, inputs)
    rewrite, gone = gk.symmetry.GaugeFix(rows="triangular"), turned(counts)
    report = gk.convert(folder / "model", folder / "turned", [rewrite], pack=True)
    assert report["steps"][0]["removed"] == gone
    assert report["parameters_before"] - report["parameters_after"] == gone["total"]
    loaded, info = type(model).from_pretrained(folder / "turned", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "triangular_projection" in str(loaded.config.quantization_config)
    assert close(run(loaded.eval(), inputs), output)
    assert tokens is None or torch.equal(greedy(loaded, inputs), tokens)
    assert gk.verify(model, loaded)["ok"]
    report = gk.fuse(model, rows="triangular", attention=False)
    assert report["parameters_before"] - report["parameters_after"] == gone["total"]
    assert close(run(model, inputs), output)
    gk.unfuse(model)
    assert torch.equal(run(model, inputs), output)


def close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((result - expected).norm() < 1e-5 * expected.norm())


def greedy(model: torch.nn.Module, inputs: dict) -> torch.Tensor | None:
    """The likeliest next tokens, one after another, of a model that generates; None of any other."""
    if not model.can_generate():
        return None
    first = inputs.get("input_ids", inputs.get("input_features"))
    return model.generate(first, max_new_tokens=5, min_new_tokens=5, do_sample=False)
