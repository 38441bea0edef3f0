"""Adding a model: calibrate, encode, order, measure, write; each job in a process of its own."""
