"""How long a whole step may be: rules that shorten, follow or skip it, in nats of KL. torch only."""
