"""Data for post-training: rows, versioned manifests, builders, teachers, margins and preferences."""
