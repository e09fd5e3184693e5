"""The ops over the CPU's own kernels: `calls` writes them down or runs them, `tape` holds and replays them."""
