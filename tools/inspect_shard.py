"""Prints what WebDataset shards hold: format, shapes, statistics, prompts, bad samples.

Exit code 2 if a shard cannot be read, or not to its end.
"""

import argparse
import sys
from collections.abc import Sequence

from rcm_mcore.data import inspect_shard


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", nargs="+", help="a tar file in the rCM format or in ours")
    code = 0
    for path in parser.parse_args(argv).shard:
        try:
            report = inspect_shard(path)
        except OSError as error:
            print(f"{path}: {error.strerror or error}", file=sys.stderr)
            code = 2
            continue
        print(report)
        if report.damage is not None:
            print(f"{path}: {report.damage}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
