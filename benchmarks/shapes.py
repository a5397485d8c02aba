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
