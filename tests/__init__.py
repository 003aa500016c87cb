"""The tests, in the tree of the code that they test."""
