"""`python -m editx` is the command `editx`."""

from editx.cli import main

main()
