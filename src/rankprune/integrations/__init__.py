"""Callbacks that add Trained Rank Pruning to other libraries' trainers."""
