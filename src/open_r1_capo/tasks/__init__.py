"""Where policies and problems come from, and how answers are scored."""
