"""How ranks reach each other: collectives with timeouts, another rank's memory, and the host-side step exchange."""
