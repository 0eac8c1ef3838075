"""Figures and tables from the runs of an experiment."""
