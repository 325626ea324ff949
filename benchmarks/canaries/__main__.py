"""Notes the canaries of rows that were made before there were any, where the code behind them is still the same.

    python -m benchmarks.canaries length paper

Rows whose code is another one now have to be made anew, and note their canaries then.
"""

import argparse
import sys

from benchmarks import audit
from benchmarks.canaries.files import FILES
from benchmarks.canaries.stored import note
from benchmarks.common import read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", choices=sorted(FILES), help="of rows, in benchmarks/results")
    refused = 0
    for file in parser.parse_args().files:
        rows = read_rows(file)
        why = {commit: audit.changed_since(commit, audit.BEHIND[file]) for commit in {row["commit"] for row in rows}}
        for commit in (commit for commit, changed in why.items() if changed):
            print(f"{file}.csv: rows of {commit}: {why[commit]}: make them anew", file=sys.stderr)
            refused += 1
        note(file, [row for row in rows if not why[row["commit"]]])
    sys.exit(2 if refused else 0)


if __name__ == "__main__":
    main()
