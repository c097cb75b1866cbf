"""Prepare training data: `python -m train.prepare COMMAND --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from train.prepare.commands import add_jsonl, add_parquet, add_webdataset
from train.prepare.moments import add_moments
from train.prepare.recaption import add_recaption
from train.prepare.rejects import PrepareFailed
from train.prepare.shapes import add_shapes
from train.shapes.corpus import BadArgument


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns 0, 1 if it cannot go on, or 2 for a bad argument, each said in one line."""
    parser = _Parser(prog="python -m train.prepare", description="Turns pictures and captions into training shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    add_shapes(commands)
    add_jsonl(commands)
    add_webdataset(commands)
    add_parquet(commands)
    add_recaption(commands)
    add_moments(commands)
    options = vars(parser.parse_args(argv))
    prepare = options.pop("prepare")
    try:
        prepare(**options)
    except BadArgument as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except (OSError, PrepareFailed) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
