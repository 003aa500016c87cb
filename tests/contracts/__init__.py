"""One suite per port, run against every adapter: the promises that the ports' docstrings make."""
