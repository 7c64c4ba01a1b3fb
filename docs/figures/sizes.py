"""Draws sizes.svg, the README's picture, from a measurement made on the spot: all-MiniLM-L6-v2 in bfloat16.

    python docs/figures/sizes.py

Measured are the weights file before and after packing, and the memory of the model's parameters and buffers, plain and
with weights that stay packed.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModel

import gaugekit as gk
from gaugekit.pages.charts import Bar, bars
from gaugekit.pages.numbers import change

STYLE = """<style>
text { font: 12px system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: #566267; }
.label, .value, .heading { fill: #1c2326; } .heading { font-weight: 650; }
.bar { fill: #0072b2; } .bar.other { fill: #8d979b; }
</style><rect x="-16" y="-16" width="100%" height="100%" rx="10" fill="#fff"/>"""


def measured() -> list[Bar]:
    source = gk.samples.minilm()
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder, "plain"), Path(folder, "packed.safetensors")
        gk.convert(source, plain, [], dtype="bfloat16")
        file = gk.codec.pack(plain / "model.safetensors", packed)
        model = AutoModel.from_pretrained(plain, dtype=torch.bfloat16)
        memory = gk.fuse(model, packed=True, attention=False)
    rows = []
    for group, report in (("the weights file", file), ("memory of the running model", memory)):
        before, after = report["bytes_before"], report["bytes_after"]
        rows.append(Bar("before", before, "other", f"{before / 1e6:.1f} MB", group))
        rows.append(Bar("after", after, "ours", f"{after / 1e6:.1f} MB, {change(after / before)}", group))
    return rows


def main() -> None:
    rows = measured()
    drawing = bars(
        rows,
        title="all-MiniLM-L6-v2 in bfloat16, before and after packing",
        desc="; ".join(f"{row.group} {row.label}: {row.text}" for row in rows),
        x_label="all-MiniLM-L6-v2 in bfloat16; not a bit is lost",
        width=560,
        room=120,
    )
    head, body = drawing.split(">", 1)
    width, height = (int(number) for number in head.split('viewBox="0 0 ')[1].split('"')[0].split())
    head = head.replace(f"0 0 {width} {height}", f"-16 -16 {width + 32} {height + 32}")
    head = head.replace("<svg", f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 32}"', 1)
    title, rest = body.split("</desc>", 1)
    Path(__file__).with_suffix(".svg").write_text(f"{head}>{title}</desc>{STYLE}{rest}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
