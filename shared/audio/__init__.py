"""Recordings and their features: files to samples, samples to samples, samples to what the models read."""
