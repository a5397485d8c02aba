"""Memory and time of prune_checkpoint, on synthetic bf16 Llama checkpoints, each in a new process.

Memory: the peak (VmHWM) of a process that prunes 16 blocks of hidden size 4096, and 32 of them.
Time: beside loading, pruning and saving in memory, on a size that both can do, in turns. Needs
30 GB of disk under --folder; `--small` shrinks everything, to see it run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import save, timing_of

SAMPLES = 16
REPEATS = 3


@dataclass(frozen=True)
class Size:
    hidden: int
    intermediate: int
    vocab: int
    seqlen: int
    blocks: tuple[int, ...]  # whose peaks are compared
    both: int  # blocks of the comparison with memory

    def config(self, blocks: int) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab,
            num_hidden_layers=blocks,
            num_attention_heads=self.hidden // 128,
            num_key_value_heads=self.hidden // 128,
            max_position_embeddings=self.seqlen,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
        )


LARGE = Size(4096, 11008, 32000, 512, (16, 32), 4)
SMALL = Size(256, 512, 1000, 32, (2, 4), 2)


def write_checkpoint(folder: Path, size: Size, blocks: int) -> int:
    """One file a block, as written by whoever shards; returns the bytes of all tensors."""
    import transformers

    from wanda_ext.checkpoint.convert import write_json
    from wanda_ext.checkpoint.reader import INDEX
    from wanda_ext.files.shards import write_shard

    folder.mkdir(parents=True)
    config = size.config(blocks)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    total = 0
    torch.manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for file, names in shards.items():
        tensors = {name: _weights(shapes[name]) for name in names}
        total += write_shard(folder / file, tensors).nbytes
    layout = {name: file for file, names in shards.items() for name in names}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": layout})
    return total


def _weights(shape: torch.Size) -> torch.Tensor:
    if len(shape) == 1:  # gains of a norm: with all alike Wanda is magnitude
        return torch.randn(shape).exp().bfloat16()
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def work(how: str, src: str, out: str, seqlen: int) -> dict[str, float]:
    """The body of a fresh process: prunes, and tells its seconds and its peak."""
    import wanda_ext
    from wanda_ext.checkpoint import load_pretrained

    generator = torch.Generator().manual_seed(1)
    vocab = json.loads((Path(src) / "config.json").read_text())["vocab_size"]
    ids = torch.randint(0, vocab, (SAMPLES, seqlen), generator=generator)
    before = _peak()
    start = time.perf_counter()
    if how == "stream":
        wanda_ext.prune_checkpoint(src, out, ids, progress=False)
    else:
        model, _ = load_pretrained(src, dtype="auto")
        wanda_ext.prune_model(model, ids, swap=False, progress=False)
        wanda_ext.save_pretrained(model, out)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": _peak(), "imports": before}


def _peak() -> int:
    """VmHWM in bytes: of this process since its exec, unlike getrusage's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measured(how: str, src: Path, size: Size) -> dict[str, float]:
    """`work` in a new process; what it wrote is removed."""
    out = src.with_name("out")
    command = [sys.executable, __file__, "--work", how, str(src), str(out), str(size.seqlen)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(out)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def peaks(folder: Path, size: Size) -> list[dict[str, float]]:
    found = []
    for blocks in size.blocks:
        src = folder / "src"
        total = write_checkpoint(src, size, blocks)
        found.append({"blocks": blocks, "checkpoint": total, **measured("stream", src, size)})
        shutil.rmtree(src)
        print(found[-1])
    return found


def times(folder: Path, size: Size) -> dict[str, Any]:
    src = folder / "src"
    write_checkpoint(src, size, size.both)
    seconds: dict[str, list[float]] = {"stream": [], "memory": []}
    for _ in range(REPEATS):
        for how, found in seconds.items():
            found.append(measured(how, src, size)["seconds"])
    shutil.rmtree(src)
    timings = {how: timing_of([1e3 * one for one in found]) for how, found in seconds.items()}
    ratio = timings["stream"].median_ms / timings["memory"].median_ms
    return {"blocks": size.both, "timings": timings, "stream / memory": round(ratio, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--folder", help="for the checkpoints (a temporary one)")
    parser.add_argument("--out", default="stream.json", help="in benchmarks/results")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        how, src, out, seqlen = arguments.work
        print(json.dumps(work(how, src, out, int(seqlen))))
        return
    size = SMALL if arguments.small else LARGE
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        free = shutil.disk_usage(name).free
        if not arguments.small and free < 30e9:
            raise SystemExit(f"{name} has {free / 1e9:.0f} GB free, and 30 are needed: --folder")
        results = {"memory": peaks(Path(name), size), "time": times(Path(name), size)}
    low, high = (peak["peak"] for peak in results["memory"])
    results["peak ratio"] = round(high / low, 3)
    save(arguments.out, {"samples": SAMPLES, "seqlen": size.seqlen, **results})


if __name__ == "__main__":
    main()
