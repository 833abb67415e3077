"""The pages of the browser app: each shows one run in one way and computes nothing."""
