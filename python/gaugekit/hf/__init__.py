"""How transformers sees what is on disk, and runs it; nothing here is imported unless it is used."""
