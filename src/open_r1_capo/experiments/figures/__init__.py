"""Figures and tables, from what the runs of an experiment have written."""
