"""Evaluation: judges that need no network, and the benchmarks that use them."""
