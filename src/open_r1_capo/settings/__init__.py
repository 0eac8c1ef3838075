"""A recipe's settings, composed and checked. Pure: no torch, no CUDA, no environment variable is asked."""
