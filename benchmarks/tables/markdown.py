"""Markdown tables, and where their rows come from."""


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column to the left, figures to the right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, align, *rows])


def origin(rows: list[dict[str, str]]) -> str:
    """Where rows come from, for the line below a table; all of one machine, maybe of several commits."""
    r, commits = rows[0], dict.fromkeys(row["commit"] for row in rows)
    told = ", ".join(f"`{commit}`" for commit in commits)
    threads = "1 thread" if r["threads"] == "1" else f"{r['threads']} threads"
    return f"{r['device']}, {threads}, float32, torch {r['torch']}, transformers {r['transformers']}, commit {told}"
