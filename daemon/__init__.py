"""Decides: the supervisor, the worker with its engine, and the jobs that fill the library."""
