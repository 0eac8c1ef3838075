"""The seam with TRL: `trainer.py` carries the method, the other files are what it needs at one step or one run."""
