"""The KL budget inside other trainers, loaded by them; each file needs its trainer, and nobody else imports it."""
