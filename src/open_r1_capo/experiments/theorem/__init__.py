"""The paper's theorem of monotonic improvement (Theorem 5.1, App. E and K) put to the test on small exact problems."""
