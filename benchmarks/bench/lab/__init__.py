"""Many cells, each a bundle, a workload, a device and settings: described as data, measured one by one, resumable."""
