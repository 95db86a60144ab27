"""`python -m shorttail` is the `shorttail` command."""

from shorttail.cli import main

main()
