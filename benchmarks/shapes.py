"""The linears people prune: (out-features n, in-features k), fused where runtimes fuse them."""

LLAMA_7B = {
    "qkv": (12288, 4096),
    "o": (4096, 4096),
    "gate_up": (22016, 4096),
    "down": (4096, 11008),
}
LLAMA_13B = {
    "qkv": (15360, 5120),
    "o": (5120, 5120),
    "gate_up": (27648, 5120),
    "down": (5120, 13824),
}
LLAMA_70B = {
    "qkv": (10240, 8192),
    "o": (8192, 8192),
    "gate_up": (57344, 8192),
    "down": (8192, 28672),
}
LLAMA3_8B = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}

CPU = [(4096, 4096), (11008, 4096), (4096, 11008)]  # of Llama-7B, unfused: what a CPU is timed on

# What 2:4 is timed on: every linear of four models as a runtime fuses them, 15 in all for the two
# that share one, and some as transformers calls them.
PARTS = {
    "7b": list(LLAMA_7B.values()),
    "13b": list(LLAMA_13B.values()),
    "70b": list(LLAMA_70B.values()),
    "8b": [shape for name, shape in LLAMA3_8B.items() if name != "o"],  # in 7b
    "unfused": [(11008, 4096), (1024, 4096), (14336, 4096)],  # gate or up, k or v, gate or up
}
TOKENS = (1, 2, 3, 4, 8, 16, 17, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
