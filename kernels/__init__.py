"""Computes: bits to numbers. Every kernel stands beside its slow reference; `table` lists both."""
