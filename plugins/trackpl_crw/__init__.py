"""Multiscale contrastive random walks as a `trackpl` method."""
