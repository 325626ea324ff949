"""Whether the report can be trusted: `python -m benchmarks.report --check`.

A table is what one function of `benchmarks.tables` writes into the report. Its rows come from one run of one commit,
which stands below it; columns that quote another table name that one's commit beside them. Rows are stale where their
canaries (`benchmarks.canaries`) come to something else now. That code is another one now than at their commit is told
as a note: comments, docstrings, imports and layout do not count.
"""

import ast
import itertools
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.common import DIRTY, RESULTS, ROOT, read_rows

TECHNIQUES = tuple(f"mminfer/{room}" for room in ("positions", "tokens", "operators", "cache", "technique/entries.py"))
# What decides which rows and entries there are, and what is read among them.
PASS = (
    "mminfer/layout",
    *(f"mminfer/models/{name}.py" for name in ("entry", "internvl", "packing")),
    *(
        f"mminfer/forward/{name}.py"
        for name in (
            "attention",
            "branches",
            "layer_attention",
            "packed_attention",
            "packed_layer",
            "prefill",
            "replay",
        )
    ),
    *(f"mminfer/forward/{name}.py" for name in ("replayed_rows", "rotary", "rows", "kv_layer")),
)
ASKED = ("mminfer/nano/checkpoint/model.safetensors", "mminfer/bench/contexts.py", "mminfer/metrics/fidelity.py")
FIDELITY = (*TECHNIQUES, *PASS, *ASKED)
SPEED = (*TECHNIQUES, *PASS, "mminfer/forward", "kernels/mminfer_kernels", "csrc/include", "csrc/cpu")
YARDSTICK = (*TECHNIQUES, *PASS, "benchmarks/reader", *(f"benchmarks/quality/{x}.py" for x in ("smol", "smol_cells")))
# By file of rows, the code whose change may make them stale.
BEHIND: dict[str, tuple[str, ...]] = {
    "answers": (*SPEED, "benchmarks/models/answers.py"),
    "batch_decode": (*SPEED, "benchmarks/models/batch_decode.py"),
    "calibrated": (
        *FIDELITY,
        "mminfer/calibration",
        *(f"benchmarks/quality/calibrated{x}.py" for x in ("", "_models")),
    ),
    "decode": (*SPEED, "benchmarks/models/caches.py", "benchmarks/models/decode.py"),
    "film": (*FIDELITY, *(f"benchmarks/quality/{name}.py" for name in ("film", "lot", "needle"))),
    "kernels": ("kernels/mminfer_kernels", "csrc/include", "csrc/cpu", "benchmarks/kernels"),
    "length": (*FIDELITY, "benchmarks/quality/length.py"),
    "long_context": (*SPEED, "benchmarks/models/long_context.py"),
    "lost": (*YARDSTICK, "benchmarks/quality/lost.py"),
    "merge_stage": ("mminfer/tokens", "kernels/mminfer_kernels", "csrc/cpu", "benchmarks/models/merge_stage.py"),
    "needle": (*FIDELITY, "benchmarks/quality/needle.py", "benchmarks/quality/settings.py"),
    "paper": ("mminfer/metrics/flops.py", "mminfer/tokens", "benchmarks/paper"),
    "peers": (*FIDELITY, "benchmarks/peers"),
    "prompt_pass": (*SPEED, "benchmarks/models/prompt_pass.py"),
    "regions": (*FIDELITY, *(f"benchmarks/quality/{name}.py" for name in ("needle", "settings", "lot"))),
    "replay": (*FIDELITY, "benchmarks/quality/needle.py", "benchmarks/quality/settings.py"),
    "replay_cost": (*SPEED, "benchmarks/models/replay_cost.py"),
    "scores": ("mminfer/cache", *PASS, "benchmarks/quality/scores.py"),
    "serving": (*SPEED, "mminfer/scheduling", "mminfer/serving", "benchmarks/serving"),
    "smol": YARDSTICK,
    "smol_regions": YARDSTICK,
    "streamed": (*FIDELITY, "benchmarks/quality/streamed.py"),
    "tower": (
        "mminfer/tower",
        "mminfer/cells.py",
        *(f"mminfer/models/{name}.py" for name in ("encoder_cache", "encoding", "ragged", "qwen2_vl", "qwen2_5_vl")),
        *(f"benchmarks/models/{name}.py" for name in ("sheets", "tower")),
    ),
    "turns": (*TECHNIQUES, *PASS, "benchmarks/models/turns.py"),
}
SHOWN = 3  # changed files that a note names


def mixed(name: str, table: str) -> list[str]:
    """What is wrong with where a table's rows come from, as it says itself: nothing, if it names one commit.

    Args:
        name: of the table.
        table: its text.
    """
    if "\n| " not in f"\n{table}":
        return []  # a sentence that there are no rows
    told = [re.findall("`([^`]+)`", names) for names in re.findall(r"ommit ((?:`[^`]+`(?:, )?)+)", table)]
    if not told:
        return [f"{name}: names no commit"]
    return [f"{name}: mixed, of {len(commits)} commits ({', '.join(commits)})" for commits in told if len(commits) > 1]


def stale(files: Iterable[str] | None = None, root: Path = ROOT) -> tuple[list[str], list[str]]:
    """Findings about rows of no commit, and notes on rows that are older than code which may change them.

    Args:
        files: names of results; None: all there are.
        root: of the checkout.
    """
    history = _git(root, "rev-parse", "--is-shallow-repository")
    if history != "false":
        why = "there is no git history here" if history is None else "the clone is shallow"
        return [], [f"not looked at whether rows are older than the code behind them: {why}"]
    findings, notes = [], []
    for name in sorted(path.stem for path in RESULTS.glob("*.csv")) if files is None else files:
        if name not in BEHIND:
            findings.append(f"{name}.csv: nobody says which code changes its rows: add it to BEHIND")
            continue
        for commit in dict.fromkeys(row["commit"] for row in read_rows(name)):
            why = changed_since(commit, BEHIND[name], root)
            if why:
                (findings if commit.endswith(DIRTY) else notes).append(f"{name}.csv: rows of {commit}: {why}")
    return findings, notes


def changed_since(commit: str, paths: Sequence[str], root: Path = ROOT) -> str:
    """What has changed in these files and folders since a commit that rows name; "": nothing that could change them."""
    if commit.endswith(DIRTY):
        return "made with changes that no commit has"
    if _git(root, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        return "no such commit in the history"
    differing = (_git(root, "diff", "--name-only", "--no-renames", commit, "--", *paths) or "").splitlines()
    changed = (path for path in differing if meaning(path, _at(root, commit, path)) != meaning(path, _now(root, path)))
    shown = list(itertools.islice(changed, SHOWN + 1))
    if not shown:
        return ""
    return f"since then {', '.join(shown[:SHOWN])}{' and others' if len(shown) > SHOWN else ''} changed"


def meaning(path: str, text: str | None) -> str | None:
    """A source without what changes nothing: comments, docstrings, imports, layout; None: there is no such file."""
    if text is None:
        return None
    if path.endswith(".py"):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                body[:] = [x for x in body if not _is_idle(x)]
        return ast.dump(tree)
    if path.endswith((".h", ".cpp", ".cu", ".cuh")):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
        return " ".join(text.split())
    return None if path.endswith(".md") else text


def _is_idle(node: ast.AST) -> bool:
    """A docstring, or an import, without whose use nothing changes."""
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or isinstance(node, (ast.Import, ast.ImportFrom))


def _at(root: Path, commit: str, path: str) -> str | None:
    return _git(root, "show", f"{commit}:{path}")


def _now(root: Path, path: str) -> str | None:
    file = root / path
    return file.read_text("utf-8", errors="replace").strip() if file.is_file() else None


def _git(root: Path, *arguments: str) -> str | None:
    """What git says; None where it fails or is not there."""
    try:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.decode("utf-8", errors="replace").strip()
