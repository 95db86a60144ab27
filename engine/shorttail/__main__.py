"""The `shorttail` command, also as `python -m shorttail`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. Ctrl-C while its modules are imported ends it like Ctrl-C in a command."""
    try:
        from shorttail.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
