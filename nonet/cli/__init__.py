"""The command line. Each command's file imports what it needs only when it runs."""
