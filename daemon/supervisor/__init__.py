"""The small process: server, sensor, budget, library index, child processes. Imports no torch, numba or numpy."""
