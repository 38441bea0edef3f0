"""Inside the worker: network, linears, KV, scheduler, sampler, tokenizer."""
