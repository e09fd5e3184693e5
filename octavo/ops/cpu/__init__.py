"""The ops over the CPU's own kernels: `calls` writes them down, `tape` replays them, `eager` runs each."""
