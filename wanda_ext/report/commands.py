"""The commands on report.html: to prune again, to load, and to measure."""

from __future__ import annotations

import shlex

from wanda_ext.methods import METHODS, UPDATES, parse_sparsity
from wanda_ext.report.report import PruneReport
from wanda_ext.report.words import name_of, sources

OPTIONS = ("nsamples", "seqlen", "seed", "batch_size", "protocol", "device", "blocks", "states")


def reproduce_command(report: PruneReport) -> str:
    """The shell command, or why there is none: data or options that only Python can name."""
    asked = report.arguments
    method = name_of(asked.get("method"), METHODS)
    update = name_of(asked.get("update"), UPDATES)
    missing = [
        f"{word}={asked.get(word)}"
        for word, named in (
            ("calib", _is_named(asked.get("calib"))),
            ("sparsity", _is_sparsity(asked.get("sparsity"))),
            ("method", method),
            ("update", update or asked.get("update") is None),
        )
        if not named
    ]
    if missing:
        return f"# No command can name {', '.join(missing)}: call Python with the arguments below."
    words = ["wanda-ext", "prune", asked["model"], "--out", report.saved.get("directory", "pruned")]
    for source in sources(asked["calib"]):
        words += ["--calib", source]
    words += ["--sparsity", asked["sparsity"], "--method", str(method)]
    if update is not None:
        words += ["--update", update]
    for option in OPTIONS:
        if asked.get(option) is not None:
            words += [f"--{option.replace('_', '-')}", str(asked[option])]
    for glob in asked.get("ignore", ()):
        words += ["--ignore", glob]
    if "states" not in asked and not report.repair and not report.gate:
        words.append("--in-memory")
    if report.saved.get("packed"):
        words.append("--packed")
    if report.repair:
        words.append("--repair")
    if report.gate:
        words += ["--gate", f"{report.gate['max_ratio']:g}"]
        if report.gate["restored"]:
            words.append("--fallback")
    return shlex.join(words)


def load_command(report: PruneReport) -> str:
    """Python that loads the saved model."""
    use = "import wanda_ext  # which loads packed linears\n" if report.saved.get("packed") else ""
    return (
        f"import transformers\n{use}\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({_where(report)!r})"
    )


def measure_command(report: PruneReport) -> str:
    """The perplexity of the saved model and of the one it was made from."""
    names = (str(report.arguments.get("model", "MODEL")), _where(report))
    return "\n".join(shlex.join(["wanda-ext", "eval", name]) for name in names)


def _where(report: PruneReport) -> str:
    return str(report.saved.get("directory", "pruned"))


def _is_named(calib: object) -> bool:
    """Whether it is what a user wrote; the report has the type's name of anything else."""
    if isinstance(calib, list):
        return all(_is_named(source) for source, _ in calib)
    types = ("NoneType", "list", "tuple", "Tensor", "DataLoader", "Dataset", "IterableDataset")
    return isinstance(calib, str) and calib not in types


def _is_sparsity(text: object) -> bool:
    try:
        parse_sparsity(str(text))
    except ValueError:
        return False
    return True
