"""The engine: a front end that takes requests, and one process a rank that runs them in lockstep."""
