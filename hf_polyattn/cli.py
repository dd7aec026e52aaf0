"""The command line: `polyattn bench` and `polyattn build`."""

from __future__ import annotations

import argparse
import sys

from . import bench
from .errors import PolyAttnError
from .ops import build


def main() -> None:
    """Runs `polyattn`; an error of the package ends it with its message and status 1."""
    parser = argparse.ArgumentParser(prog="polyattn", description="Polynomial attention for pretrained Transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser(
        "bench", help="time polynomial attention next to softmax on this machine", description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    bench.add_arguments(timing)
    commands.add_parser("build", help="compile the CPU kernels now instead of at first use")
    arguments = parser.parse_args()
    try:
        if arguments.command == "bench":
            bench.run(arguments)
        else:
            print(build.build())
    except PolyAttnError as error:
        sys.exit(f"polyattn: {error}")


if __name__ == "__main__":
    main()
