"""All-to-alls: one file each, found by name. Each offers `create(spec) -> All2All`."""
