"""Data sets, models and the training run behind the command line."""
