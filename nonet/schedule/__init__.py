"""Which tokens run in the next step, and where their keys and values go. Plain Python: no tensor is seen here."""
