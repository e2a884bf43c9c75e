"""`python -m asyncds` is the command `asyncds`."""

from asyncds.cli import main

main()
