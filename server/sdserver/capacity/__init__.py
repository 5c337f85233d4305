"""How many GPUs how many images need: `sdserver plan`.

`workload` is what callers ask for, `outcome` what becomes of it, `events` time, `gpu` and `server` who does it,
`simulation` puts them together, `planning` looks for the number of GPUs.
"""
