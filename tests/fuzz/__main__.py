"""Mutated inputs against edgephi: `python -m tests.fuzz --kind gguf --count 2000`.

Prints a table and every cause of failure, and ends with status 1 when an input was neither refused nor accepted.
Input N of a kind is the same everywhere: `--kind gguf --seed N --count 1` repeats it, `--write DIR` writes it out.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tests.fuzz import campaign
from tests.fuzz.cases import KINDS, make_case
from tests.fuzz.tree import OUTSIDE, write_outside, write_tree


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--kind", choices=KINDS, action="append", help="kind of file; repeatable; all of them otherwise"
    )
    parser.add_argument("--count", type=int, default=500, help="mutations of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first mutation; the others follow")
    parser.add_argument("--parallel", type=int, default=2, help="worker processes")
    parser.add_argument("--timeout", type=float, default=campaign.TIMEOUT_S, help="seconds after which an input hangs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every record there")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the input of --seed there and run nothing")
    arguments = parser.parse_args()
    kinds = arguments.kind or list(KINDS)
    if arguments.write:
        for kind in kinds:
            case = make_case(kind, arguments.seed)
            folder = arguments.write / f"{kind}-{arguments.seed}"
            write_tree(case.tree, folder / "input")
            write_outside(folder / OUTSIDE, case.original)
            print(f"{folder}: {case.precision}, {'; '.join(case.notes)!a}")
        return
    records = []
    for kind in kinds:
        seeds = range(arguments.seed, arguments.seed + arguments.count)
        records += campaign.run(kind, seeds, parallel=arguments.parallel, timeout_s=arguments.timeout)
        print(f"{kind}: done", file=sys.stderr)
        if arguments.json:  # after every kind: a run takes minutes, and may be stopped
            arguments.json.write_text(json.dumps([asdict(record) for record in records], indent=1))
    print(campaign.table(records))
    failed = campaign.causes(records)
    for line in failed:
        print(line)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
