"""Expert kernels: one file each, found by name. Each offers `create() -> Experts`."""
