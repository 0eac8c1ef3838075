"""Curvature-Aware Policy Optimization (CAPO) for reasoning LLMs."""
