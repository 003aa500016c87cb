"""`python -m editx.cli` is the command `editx`."""

from editx.cli import main

main()
