"""Small models of random weights in every layout that is served, and what they say by themselves."""

import string

import torch
import transformers

import gaugekit as gk
from gaugekit import codec
from gaugekit.integrations.sas import SASConfig, SASForCausalLM
from sliceable import WORDS, build
from tiny import add_tokenizer

LETTERS = string.ascii_lowercase + string.digits + "!?.,;:+-*/=<>()[]{}#%&@"[:22]
SIZES = dict(window=32, windows=8)
# of the paged cache: by itself it takes more than half of the machine's memory
PAGES = ["--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]


def write(folder):
    """{kind: directory}: plain, packed, converted, sliced and sas."""
    plain = folder / "plain"
    build("llama", max_position_embeddings=512).float().save_pretrained(plain)
    sas = SASForCausalLM(SASConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, rope=True,
                                   num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=0))  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in sas.parameters():
            parameter.normal_(0.5 if parameter.dim() == 1 else 0.0, 0.3)
    sas.save_pretrained(folder / "sas")
    for kind in ("plain", "sas"):
        add_tokenizer(folder / kind, LETTERS)
    (folder / "text.txt").write_text(WORDS * 12)
    codec.pack(plain, folder / "packed")
    gk.convert(plain, folder / "converted", [gk.symmetry.GaugeFix()])
    gk.slicing.slice(
        plain, folder / "sliced", 0.25, calibration=folder / "text.txt", rotation="polar", **SIZES
    )
    return {kind: folder / kind for kind in ("plain", "packed", "converted", "sliced", "sas")}


def own(directory, prompts, tokens, dtype=torch.float64, **options):
    """What the model of ``directory`` says by itself, greedily, of each prompt, up to ``tokens`` (or one number each):
    its texts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = []
    for prompt, most in zip(
        prompts, [tokens] * len(prompts) if isinstance(tokens, int) else tokens, strict=True
    ):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        said = model.generate(
            ids, max_new_tokens=most, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0
        )
        texts.append(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))
    return texts
