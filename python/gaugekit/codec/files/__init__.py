"""One .safetensors file, packed or plain: headers, reading, saving, and streaming one into the other."""
