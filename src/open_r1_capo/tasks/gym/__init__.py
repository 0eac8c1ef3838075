"""Problems of reasoning-gym (the extra `gym`): generated from a seed, and scored by their own verifiers.

`problems` draws them and looks their settings over, `scores` judges answers in worker processes.
"""
