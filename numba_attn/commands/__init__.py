"""The commands of `numba_attn.cli`, a module each: `run(options)`, which gives the exit status."""
