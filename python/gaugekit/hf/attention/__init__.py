"""transformers' attention interface on ``gaugekit.shaped_attention``: its masks, and the probe that tries it."""
