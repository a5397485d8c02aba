"""Every family through every way from a directory to a directory: nothing of it is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import families
import pytest
import torch
import transformers
from command_line import prune as prune_by_command
from safetensors.torch import load_file, save_file
from sample import sampled
from streamed import prune, tensors_of
from tiny_models import tiny_tokenizer, token_ids

import wanda_ext
from wanda_ext.checkpoint.reader import open_checkpoint
from wanda_ext.stream import NamesError

TEXT = [f"text {row}" for row in families.available()]
VISION = [f"vision {kind}" for kind in families.multimodal_available()]
JOINED = {"text sarvam_moe"}  # q, k and v are one tensor: packed, they are stored one by one
IGNORED = {"text gemma3n": "*.altup.*"}  # of two columns
NOT_STREAMED = {  # what is said of it; in memory it is pruned as the others are
    "text falcon_h1": "does not say how to compute its buffer",
    "text zamba2": "such blocks cannot be pruned one by one",
}
OWN_RULES = {"text mixtral", "text sarvam_moe", "vision qwen3_5", "vision llava"}
ROWS = sampled([*TEXT, *VISION], 9, [row for row in (*TEXT, *VISION) if row in OWN_RULES])
Made = Callable[[str, bool], Path]
WAYS = ["streamed", "in memory"]
# Of other classes than config.json's: what predicts several tokens ahead, one layer past the last.
MORE = {
    "mtp.fc.weight": torch.randn(8, 16).bfloat16(),
    "mtp.layers.0.self_attn.q_proj.weight": torch.randn(8, 16),
    "model.layers.9.self_attn.q_proj.weight": torch.randn(8, 16),
    "model.layers.9.eh_proj.weight": torch.randn(8, 16),
    "model.layers.9.embed_tokens.weight": torch.randn(8, 16),
    "counts": torch.arange(3),
}
PT = {"format": "pt"}
REWRITTEN = {"config.json", "model.safetensors.index.json", "wanda_ext.json"}
OTHER_FILES = {"README.md": "of it", "preprocessor_config.json": "{}", "deep/er/notes.txt": "n"}

pytestmark = pytest.mark.sampled


def build(row: str) -> transformers.PreTrainedModel:
    kind, name = row.split(" ", 1)
    return families.build(name, "eager") if kind == "text" else families.build_multimodal(name)


@pytest.fixture(scope="module", params=ROWS)
def row(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def src(row: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, with tensors that its class does not know and files that are no weights."""
    folder = tmp_path_factory.mktemp("models") / "src"
    build(row).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    save_file(load_file(folder / "model.safetensors") | MORE, folder / "model.safetensors", PT)
    for name, text in OTHER_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def made(row: str, src: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The pruned directory by the way it was made and whether it is packed, made when asked for."""
    home = tmp_path_factory.mktemp("made")
    ignore = [IGNORED[row]] if row in IGNORED else []
    return cache(lambda way, packed: pruned(src, home / f"{way} {packed}", way, packed, ignore))


def pruned(src: Path, dst: Path, way: str, packed: bool, ignore: Sequence[str] = ()) -> Path:
    if way == "streamed":
        prune(src, dst, calib=None, method="magnitude", packed=packed, ignore=ignore)
    else:
        words = ["--method", "magnitude", "--in-memory", *(["--packed"] if packed else [])]
        words += [word for glob in ignore for word in ("--ignore", glob)]
        assert prune_by_command(src, dst, *words) == 0
    return dst


def check_streamed(row: str, src: Path, made: Made, way: str) -> None:
    """Skips what cannot go block by block, once that was told before anything was written."""
    if way == "streamed" and row in NOT_STREAMED:
        with pytest.raises(NamesError, match=NOT_STREAMED[row]):
            made(way, False)
        pytest.skip(NOT_STREAMED[row])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def assert_config_kept(src: Path, dst: Path) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (src, dst))
    after.pop("quantization_config", None)
    assert after == before


def assert_files_kept(src: Path, dst: Path) -> None:
    for path in src.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in REWRITTEN:
            assert (dst / path.relative_to(src)).read_bytes() == path.read_bytes(), path


def own_class(folder: Path) -> type[transformers.PreTrainedModel]:
    return getattr(
        transformers, json.loads((folder / "config.json").read_text())["architectures"][0]
    )


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """As the class of config.json has it, dense."""
    model, told = own_class(folder).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not told["missing_keys"] and not told["mismatched_keys"], told
    if packed := any(isinstance(m, wanda_ext.SparseLinear24) for m in model.modules()):
        wanda_ext.unswap_linears(model)
    assert packed == ("quantization_config" in (folder / "config.json").read_text())
    return model.state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_a_prune_keeps_every_tensor_and_file(row: str, src: Path, made: Made, way: str) -> None:
    check_streamed(row, src, made, way)
    dst = made(way, False)
    before, after = tensors_of(src), tensors_of(dst)
    assert after.keys() == before.keys()
    changed = {name for name in before if not same(before[name], after[name])}
    assert changed and not changed & MORE.keys()
    assert not [name for name in changed if "vision" in name or "visual" in name]
    for name in changed:
        assert before[name].dtype == after[name].dtype, name
        assert ((after[name] == before[name]) | (after[name] == 0)).all(), name
    assert_config_kept(src, dst)
    assert_files_kept(src, dst)
    loaded(dst)


@pytest.mark.parametrize("way", WAYS)
def test_packed_is_the_same_model(row: str, src: Path, made: Made, way: str) -> None:
    check_streamed(row, src, made, way)
    dense, packed = made(way, False), made(way, True)
    expected, found = loaded(dense), loaded(packed)
    assert found.keys() == expected.keys()
    assert [name for name in found if not same(found[name], expected[name])] == []
    before, after = tensors_of(dense), tensors_of(packed)
    lost = before.keys() - after.keys()
    assert bool(lost) == (row in JOINED) and all("query_key_value" in name for name in lost)
    linears = open_checkpoint(packed).packed_linears()
    others = before.keys() - lost - {f"{name}.weight" for name in linears}
    assert [name for name in others if not same(before[name], after[name])] == []
    assert_config_kept(src, packed)
    assert_files_kept(src, packed)


def test_convert_keeps_every_tensor_and_file(row: str, made: Made, tmp_path: Path) -> None:
    way = "in memory" if row in NOT_STREAMED else "streamed"
    dense, packed = made(way, False), made(way, True)
    wanda_ext.convert(packed, tmp_path / "dense", "dense")
    wanda_ext.convert(dense, tmp_path / "packed", "packed")
    wanda_ext.convert(tmp_path / "packed", tmp_path / "again", "dense")
    before = tensors_of(dense)
    for name in ("again", *(() if row in JOINED else ("dense",))):
        after = tensors_of(tmp_path / name)
        assert after.keys() == before.keys()
        assert [name for name in before if not same(before[name], after[name])] == []
    expected = loaded(dense)
    for name in ("dense", "packed", "again"):
        found = loaded(tmp_path / name)
        assert [name for name in expected if not same(found[name], expected[name])] == []
        assert_files_kept(packed if name == "dense" else dense, tmp_path / name)


@pytest.mark.parametrize("kind", sampled(VISION, 4, ["vision qwen3_5"]))
def test_vision_models_are_calibrated_as_their_own_class(kind: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    model = build(kind)
    model.save_pretrained(src)
    tiny_tokenizer().save_pretrained(src)
    if kind == "vision idefics3":  # it moves embeddings to where its vision tower is
        with pytest.raises(NamesError, match=r"cannot run alone .*meta.*--in-memory"):
            prune(src, tmp_path / "dst")
        return
    prune(src, tmp_path / "dst")
    wanda_ext.prune_model(model, token_ids(), batch_size=2, progress=False, swap=False)
    model.save_pretrained(tmp_path / "memory")
    one, other = tensors_of(tmp_path / "dst"), tensors_of(tmp_path / "memory")
    assert one.keys() == other.keys()
    assert [name for name in one if not same(one[name], other[name])] == []


@pytest.mark.parametrize("kind", ["qwen3_5"])
def test_a_text_only_class_reads_packed_as_it_reads_dense(kind: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    model = families.build_multimodal(kind)
    model.save_pretrained(src)
    for form in (False, True):
        prune(src, tmp_path / str(form), calib=None, method="magnitude", packed=form)
    text = transformers.AutoModelForCausalLM
    models = [text.from_pretrained(tmp_path / str(form)) for form in (False, True)]
    assert type(models[0]) is not type(model) and type(models[0]) is type(models[1])
    packed_names = wanda_ext.unswap_linears(models[1])
    assert len(packed_names) >= 3 * 4
    one, other = (m.state_dict() for m in models)
    assert one.keys() == other.keys()
    assert [name for name in one if not same(one[name], other[name])] == []


def test_tied_tensors_that_the_files_hold_twice_are_kept(tmp_path: Path) -> None:
    src = tmp_path / "src"
    families.build("gpt2").save_pretrained(src)
    tiny_tokenizer().save_pretrained(src)
    tensors = load_file(src / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, src / "model.safetensors", PT)
    for way in WAYS:
        dst = pruned(src, tmp_path / way, way, packed=False)
        after = tensors_of(dst)
        assert after.keys() == tensors.keys()
        assert same(after["lm_head.weight"], tensors["lm_head.weight"])
