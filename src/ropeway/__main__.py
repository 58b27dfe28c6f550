"""`python -m ropeway` is the command `ropeway`."""

from ropeway.cli.main import main

main()
