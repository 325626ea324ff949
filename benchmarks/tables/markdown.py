"""Markdown tables, and where their rows come from."""

from collections.abc import Mapping, Sequence


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column to the left, figures to the right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, align, *rows])


def origin(rows: list[dict[str, str]]) -> str:
    """Where rows come from, for the line below a table: every value that some of them have."""
    threads = {"1": "1 thread"}

    def told(name: str) -> str:
        return " or ".join(filter(None, dict.fromkeys(row[name] for row in rows)))

    counted = " or ".join(threads.get(n, f"{n} threads") for n in dict.fromkeys(row["threads"] for row in rows))
    seed = f", seed {told('seed')}" if told("seed") else ""
    versions = f"torch {told('torch')}, transformers {told('transformers')}"
    return f"{told('device')}, {counted}, float32, {versions}{seed}, {commits(rows)}"


def commits(rows: Sequence[Mapping[str, str]]) -> str:
    """The commit of rows, which `python -m benchmarks.report --check` wants to be one in each table."""
    return f"commit {', '.join(f'`{commit}`' for commit in dict.fromkeys(row['commit'] for row in rows))}"
