"""Model families: one file each. The file that lists the checkpoint's architecture serves it."""
