"""What is stored and sent: block kinds, the stack file, manifests, checkpoints, messages, errors, units.

Neither the stack container nor the messages need numpy; only `blocks` (payload layouts) and `checkpoint` do.
"""
