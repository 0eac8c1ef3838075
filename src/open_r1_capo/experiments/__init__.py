"""Runs the experiments behind the figures, draws them, and looks into what masking does."""
