"""The big process: step loop, resident memory, ledger."""
