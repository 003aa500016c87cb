"""The local stack: the whole constellation on one machine, each part a process of its own, without containers.

Knows how to start, check and stop processes; what they compute is theirs.
"""
