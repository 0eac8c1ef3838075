"""The runs of a figure, made and drawn; and experiments on the method itself."""
