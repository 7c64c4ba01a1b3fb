"""Writes the README's table of model families anew, from what the adapters in gaugekit.models say.

    python docs/families.py

Which groups gauge fixing removes, whether ranks can be lowered and whether the stream can be sliced, is asked of each
adapter for a small config of the family; nothing of it stands here. tests/test_families_table.py fails where the README
is not what this writes.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from gaugekit.hf.attention import neutreno
from gaugekit.models import FAMILIES, family
from gaugekit.rank.truncation import check
from gaugekit.symmetry import count

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- families: written by docs/families.py -->\n", "<!-- end of families -->\n"
TITLES = {
    "bert": "BERT", "roberta": "RoBERTa", "xlm-roberta": "XLM-R", "camembert": "CamemBERT", "mpnet": "MPNet",
    "deberta-v2": "DeBERTa v2, v3", "gpt2": "GPT-2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "qwen3_moe": "Qwen3 MoE", "olmo2": "OLMo 2", "olmo3": "OLMo 3", "gemma3_text": "Gemma 3 (text)",
    "chameleon": "Chameleon", "stablelm": "StableLM", "opt": "OPT", "phi": "Phi-1, 1.5, 2", "t5": "T5", "mt5": "mT5",
    "umt5": "UMT5", "vit": "ViT", "deit": "DeiT", "dinov2": "DINOv2", "dinov2_with_registers": "DINOv2 with registers",
    "distilbert": "DistilBERT", "electra": "ELECTRA", "albert": "ALBERT", "modernbert": "ModernBERT",
    **dict.fromkeys(("clip", "clip_text_model", "clip_vision_model"), "CLIP"),
    **dict.fromkeys(("siglip", "siglip_text_model", "siglip_vision_model"), "SigLIP"),
    "whisper": "Whisper", "bart": "BART", "mbart": "mBART", "pegasus": "Pegasus", "marian": "Marian",
    "blenderbot": "BlenderBot", "blenderbot-small": "BlenderBot small", "m2m_100": "M2M100, NLLB", "plbart": "PLBart",
    "ministral": "Ministral", "mixtral": "Mixtral", "qwen2_moe": "Qwen2 MoE", "olmo": "OLMo", "granite": "Granite",
    "arcee": "Arcee", "starcoder2": "StarCoder2",
    "gemma": "Gemma", "gemma2": "Gemma 2", "smollm3": "SmolLM3", "cohere": "Cohere", "cohere2": "Cohere 2",
    "glm": "GLM", "helium": "Helium", "gptj": "GPT-J", "gpt_neo": "GPT-Neo", "gpt_neox": "GPT-NeoX, Pythia",
    "phi3": "Phi-3, Phi-4", "bloom": "BLOOM", "mpt": "MPT", "falcon": "Falcon", "gpt_bigcode": "GPT-BigCode",
}  # fmt: skip
# What published checkpoints have otherwise than the default config.
PUBLISHED = {
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
}
SWITCHES = ("attention_bias", "bias")  # of biases
GROUPS = {
    "value_output": "values and output",
    "query_key": "queries and keys",
    "key_bias": "key bias",
    "value_bias": "value bias",
}


def row(name: str) -> tuple[str, str, str, str]:
    """(what gauge fixing removes, whether ranks can be lowered, whether the stream can be sliced, whether NeuTRENO can
    be fused) in a family."""
    config = AutoConfig.for_model(name).to_dict()
    # A bias that a config can switch on counts: the table says what holds, not what one checkpoint has.
    switches = {switch: True for switch in SWITCHES if switch in config}
    adapter = family(config | switches | PUBLISHED.get(name, {}))
    views = [adapter.outline(layer) for layer in range(adapter.layers)]
    removes = _removed([count(view) for view in views])
    try:
        for view in views:
            check(view)
        pairs = any(view.rotary == view.k.weight.shape[2] for view in views)
        ranks = "in whole rotary pairs" if pairs else "yes"
    except ValueError:
        ranks = "–"
    try:
        adapter.stream()
        slices = "yes"
    except ValueError:
        slices = "–"
    return removes, ranks, slices, "yes" if name in neutreno.FAMILIES else "–"


def _removed(counts: list[dict[str, int]]) -> str:
    """What gauge fixing removes from layers of these ``counts``, in words."""
    everywhere = [name for group, name in GROUPS.items() if all(layer[group] for layer in counts)]
    somewhere = [name for group, name in GROUPS.items() if any(layer[group] for layer in counts)]
    if len(everywhere) == len(GROUPS):
        return "everything"
    more = [name for name in somewhere if name not in everywhere]
    return ", ".join(everywhere) + (f"; {', '.join(more)} in some layers" if more else "")


def table() -> str:
    """The table as Markdown: families of which the same holds share a row."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for name in FAMILIES:
        rows.setdefault(row(name), []).append(TITLES[name])
    lines = [
        "| family | `--gauge` removes | `--rank` | `--slice` | NeuTRENO |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {', '.join(dict.fromkeys(names))} | {' | '.join(cells)} |" for cells, names in rows.items()]
    lines.append("| every other | – | – | – | – |")
    return "\n".join(lines) + "\n"


def main() -> None:
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}{table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
