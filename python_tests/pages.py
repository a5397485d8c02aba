"""Reports that the tests of report.html draw: one with everything in it, one of a large model."""

from __future__ import annotations

from wanda_ext.methods import Wanda
from wanda_ext.report.report import LinearReport, PruneReport

NASTY = "models/<b>&\"'</b><script>alert(1)</script>"
KINDS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def linears(blocks: int) -> list[LinearReport]:
    return [
        LinearReport(
            name=f"model.layers.{block}.{kind}",
            shape=shape,
            dtype="bfloat16",
            asked="2:4",
            reached=0.5,
            status="pruned",
            score_kept=0.9 - 0.02 * column - 0.1 * block / blocks,
            score_lost=0.1 + 0.02 * column + 0.1 * block / blocks,
            tokens=262144,
            seconds=0.004,
            path="cpu",
        )
        for block in range(blocks)
        for column, (kind, shape) in enumerate(KINDS.items())
    ]


def small_report() -> PruneReport:
    """Packed, repaired, gated, one linear restored, with text that must be escaped."""
    report = PruneReport(
        linears(3), 10**9, "swapped <nothing>", "each block ran by itself", "complete", 9
    )
    restored = report.linears[6]
    restored.status, restored.reached, restored.score_lost = "restored by the gate", 0.0, 0.0
    names = [f"model.layers.{i}" for i in range(3)]
    per_block = [[line.name for line in report.linears if line.name.startswith(n)] for n in names]
    report.gate = {
        "max_ratio": 1.1,
        "dense": 12.5,
        "pruned": 20.0,
        "final": 13.25,
        "ratio": 1.06,
        "tokens": 4096,
        "passed": True,
        "restored": [restored.name],
        "blocks": [
            {"name": name, "own": 0.1, "grown": 0.1 * i, "linears": dict.fromkeys(inside, 0.05 * i)}
            for i, (name, inside) in enumerate(zip(names, per_block, strict=True))
        ],
    }
    report.repair = {
        "blocks": [{"name": n, "error_before": 0.3, "error_after": 0.2} for n in names]
    }
    about = {"shape": [4096, 4096], "dtype": "bfloat16", "linears": 6, "m": 8}
    unmeasured = {"packed_us": None, "dense_us": None}
    report.kernels = [{**about, "path": "cpu", "why": "packed, on the CPU", **unmeasured}]
    report.saved = {"directory": "out dir", "packed": True, "bytes": 2 * 10**9}
    report.model_weights, report.shared = 10**9, [["embed.weight", "head.weight"]]
    report.left = {"old.bin": "weights in another form"}
    texts = [("Once <upon>", " a time\n", " & again"), ("Two", " three", " two")]
    report.continuations = {
        "texts": [{"prompt": p, "dense": dense, "pruned": pruned} for p, dense, pruned in texts]
    }
    report.timings = {"calibration": 0.5, "blocks": 1.5}
    report.versions = {"torch": "2.1.0"}
    report.peak_memory = {"cpu": 2**31}
    report.arguments = {
        "model": NASTY,
        "calib": "builtin",
        "sparsity": "2:4",
        "method": repr(Wanda()),
        "nsamples": 16,
        "seqlen": None,
        "seed": 3,
        "ignore": ["*.a b"],
        "swap": False,
    }
    return report


def large_report() -> PruneReport:
    """80 blocks of 7 linears, with everything that can be drawn, and none of it a constant."""
    report = small_report()
    report.linears = linears(80)
    report.gate["blocks"] = [
        {
            "name": f"model.layers.{block}",
            "own": 0.05,
            "grown": 0.05 + block / 200,
            "linears": {f"model.layers.{block}.{kind}": block / 1000 for kind in KINDS},
        }
        for block in range(80)
    ]
    for line in report.linears:
        line.reached = 0.6 if "mlp" in line.name else 0.5
    return report
