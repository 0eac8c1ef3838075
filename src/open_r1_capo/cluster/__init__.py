"""Slurm jobs and vLLM servers."""
