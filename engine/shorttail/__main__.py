"""The `shorttail` command, also as `python -m shorttail`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Final

# The niceness of commands: on a host that serves too, a CPU goes to a process that answers. Commands that hold the lock
# of writers for long are less nice, because the writer of a server waits for it.
NICE_READER: Final = 19
NICE: Final = dict.fromkeys(("serve", "bench", "predict", "features", "push", "delete"), 0) | dict.fromkeys(
    ("apply", "load", "materialize", "migrate", "models", "settings", "delete-entity"), 10
)


def main() -> None:
    """Run the command line. Ctrl-C while its modules are imported ends it like Ctrl-C in a command."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    with suppress(OSError):  # before the imports, which take longer than some commands
        nice = NICE.get(command, NICE_READER)
        os.setpriority(os.PRIO_PROCESS, 0, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))
    try:
        from shorttail.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
