"""Asks: the client library and the command line."""
