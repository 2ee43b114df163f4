"""`python -m nonet`: the same as the `nonet` command."""

from nonet.cli.main import app

app()
