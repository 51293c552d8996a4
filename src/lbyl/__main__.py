"""``python -m lbyl``."""

from lbyl.cli import main

main()
